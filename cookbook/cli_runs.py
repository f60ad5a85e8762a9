"""The commands on runs that exist. Each imports what it needs when it is called, as in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()
dashboard_app = typer.Typer(help="A workspace on W&B with charts for our metrics.", no_args_is_help=True)
app.add_typer(dashboard_app, name="dashboard")

Target = Annotated[str, typer.Argument(help="A run, a tinker:// URI, an adapter directory, or model=NAME.", metavar="RUN")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", help="newest, best, or a step.", metavar="WHICH")]
WORDS = "KEY=VALUE..."
System = Annotated[str | None, typer.Option("--system", help="The system message.")]
RunArg = Annotated[str, typer.Argument(help="A run directory, or its name under runs/.", metavar="RUN")]
VerifyOption = Annotated[bool, typer.Option("--verify/--no-verify", help="Reload it and compare logprobs.")]


@app.command()
def runs(
    number: Annotated[int, typer.Option("--number", "-n", help="How many of the newest; 0: all.", min=0)] = 20,
    json: Annotated[bool, typer.Option("--json", help="A JSON list.")] = False,
) -> None:
    """List the runs under ./runs, newest first: state, recipe, metric, steps, time."""
    from cookbook.run_list import print_runs

    print_runs(console(), number, as_json=json)


@app.command()
def report(
    names: Annotated[list[str], typer.Argument(help="Runs, or sweeps: all their runs.", metavar="RUN...")],
    to: Annotated[Path | None, typer.Option("--to", help="Where to write the page.", metavar="FILE")] = None,
) -> None:
    """Write report.html of a run, or compare several: cook report RUN RUN --to runs.html"""
    from cookbook.report import report

    print(report(names, to))


@app.command()
def export(
    run: RunArg,
    to: Annotated[Path, typer.Option("--to", help="A new or empty folder.", metavar="DIR")],
    form: Annotated[Literal["peft", "merged", "gguf"], typer.Option("--format", help="What to write.")] = "peft",
    checkpoint: Checkpoint = "newest",
    quantize: Annotated[
        Literal["f16", "q8_0"] | None, typer.Option("--quantize", help="Of --format gguf; f16 unless told.")
    ] = None,
    verify: VerifyOption = True,
) -> None:
    """Take a result away: the adapter, the merged model, or a GGUF file, reloaded and compared before it is kept."""
    from cookbook.exporting.export import export

    export(run, to, form, console(), checkpoint, quantize, verify)


@app.command()
def push(
    run: RunArg,
    repository: Annotated[str, typer.Argument(help="On the hub.", metavar="ORG/NAME")],
    form: Annotated[Literal["peft", "merged"], typer.Option("--format", help="What to send.")] = "peft",
    checkpoint: Checkpoint = "newest",
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; else it is private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and the files; send nothing.")] = False,
    verify: VerifyOption = True,
) -> None:
    """Upload to the Hugging Face hub with a model card; shows what would leave this machine, and asks."""
    from cookbook.exporting.push import push

    push(run, repository, form, console(), checkpoint, public=public, yes=yes, dry_run=dry_run, verify=verify)


@app.command()
def chat(
    run: Target,
    checkpoint: Checkpoint = "newest",
    base: Annotated[bool, typer.Option("--base", help="The base model answers too, below.")] = False,
    system: System = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of one reply.")] = 512,
) -> None:
    """Talk to a run's policy; it may use the tools of the run's env. Ctrl-D leaves."""
    from cookbook.chat import chat

    chat(run, checkpoint, base, system, temperature, max_tokens, console())


@app.command()
def sample(
    run: Target,
    prompt: Annotated[str, typer.Argument(help="The message, or - to read it from stdin.", metavar="PROMPT")],
    number: Annotated[int, typer.Option("--number", "-n", help="How many replies.", min=1)] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the likeliest token.", min=0)] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of one reply.", min=1)] = 256,
    raw: Annotated[bool, typer.Option("--raw", help="Go on from the text, without a chat template.")] = False,
    json: Annotated[bool, typer.Option("--json", help="A JSON list.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="The same replies again.")] = None,
    checkpoint: Checkpoint = "newest",
    system: System = None,
) -> None:
    """Print replies to one prompt: cook sample RUN "What is 3 + 4?" -n 4"""
    from cookbook.sample import sample

    sample(
        run, prompt, checkpoint, number=number, temperature=temperature, max_tokens=max_tokens, raw=raw, system=system,
        seed=seed, as_json=json, notes=console(stderr=True),
    )  # fmt: skip


@app.command(name="eval")
def evaluate(
    run: Target,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="On what: env=gsm8k, data=rows.jsonl ...", metavar=WORDS)
    ] = None,
    checkpoint: Checkpoint = "newest",
    against: Annotated[str | None, typer.Option("--against", help="base, or another RUN: compared item by item.")] = None,
    problems: Annotated[int, typer.Option("--problems", help="Of an env.", min=1)] = 64,
    samples: Annotated[int, typer.Option("--samples", help="Attempts at each; from 2 on with pass@k.", min=1)] = 1,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 for one sample, 1 for several, unless told.", min=0)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Of a reply; else as in the run.", min=1)] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    inspect: Annotated[str | None, typer.Option("--inspect", help="A task of inspect-ai.", metavar="FILE@TASK")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON in place of the table.")] = False,
    to: Annotated[Path | None, typer.Option("--to", help="In place of RUN/evals/<time>.json.", metavar="FILE")] = None,
) -> None:
    """Measure a run with confidence intervals: its held-out rows or problems, or env=... or data=... given here."""
    from cookbook.evaluate import evaluate
    from cookbook.measures import Choice

    choice = Choice(problems, samples, temperature, max_tokens, seed)
    screen = console(stderr=json)
    evaluate(run, overrides or [], checkpoint, choice, screen, against=against, inspect=inspect, as_json=json, to=to)


@app.command()
def generate(
    run: Target,
    overrides: Annotated[
        list[str], typer.Argument(help="data=prompts.jsonl n=8 keep=best reward=my.py:score to=FILE ...", metavar=WORDS)
    ],
    checkpoint: Checkpoint = "newest",
) -> None:
    """Write replies to many prompts, the best of n by a reward, as rows for cook sft; goes on where it was stopped."""
    from cookbook.generate import generate

    generate(run, overrides, checkpoint, console())


@dashboard_app.command("push")
def dashboard_push(
    entity: Annotated[str | None, typer.Option("--entity", help="User or team; default: the login's own.")] = None,
    project: Annotated[str, typer.Option("--project", help="As in log.wandb_project.")] = "cook",
) -> None:
    """Save a workspace with our metrics in a project on W&B. Sends its layout there (no run, no data); needs a W&B key."""
    from cookbook.dashboard import push

    push(entity, project, console())


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)
