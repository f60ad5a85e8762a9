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

RunArg = Annotated[str, typer.Argument(help="A run directory, or its name under runs/.", metavar="RUN")]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", help="newest, best, or a step.", metavar="WHICH")]
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
    checkpoint: CheckpointOption = "newest",
    quantize: Annotated[Literal["f16", "q8_0"], typer.Option("--quantize", help="Of --format gguf.")] = "f16",
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
    checkpoint: CheckpointOption = "newest",
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; else it is private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and the files; send nothing.")] = False,
    verify: VerifyOption = True,
) -> None:
    """Upload to the Hugging Face hub with a model card; shows what would leave this machine, and asks."""
    from cookbook.exporting.push import push

    push(run, repository, form, console(), checkpoint, public=public, yes=yes, dry_run=dry_run, verify=verify)


@dashboard_app.command("push")
def dashboard_push(
    entity: Annotated[str | None, typer.Option("--entity", help="User or team; default: the login's own.")] = None,
    project: Annotated[str, typer.Option("--project", help="As in log.wandb_project.")] = "cook",
) -> None:
    """Save a workspace with our metrics in a project on W&B. Sends its layout there (no run, no data); needs a W&B key."""
    from cookbook.dashboard import push

    push(entity, project, console())


def console() -> Console:
    from rich.console import Console

    return Console()
