"""The command line. Typer owns the flags, compose the key=value words; no torch before a recipe starts."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cookbook import cli_runs
from cookbook.cli_runs import RunArg
from cookbook.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from cookbook.compose import Composed

app = typer.Typer(
    name="cook",
    help="Post-train language models: LoRA fine-tuning on your own machine.",
    epilog="Start with: cook sft   (settings: cook sft --cfg job; any of them as key=value)",
    add_completion=False,  # `cook completion` prints our own, which completes key=value
    pretty_exceptions_show_locals=False,
)
data_app = typer.Typer(help="Look at training data before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
envs_app = typer.Typer(help="List environments, play them, check them.", invoke_without_command=True)
app.add_typer(envs_app, name="envs")
sweep_app = typer.Typer(help="A sweep elsewhere; here it is -m: cook sft -m learning_rate=1e-4,3e-4", no_args_is_help=True)
app.add_typer(sweep_app, name="sweep")

Overrides = Annotated[list[str] | None, typer.Argument(help="As in steps=100.", metavar="[KEY=VALUE]...")]
Cfg = Annotated[Literal["job"] | None, typer.Option("--cfg", help="Print the composed configuration and stop.")]
ConfigDir = Annotated[Path | None, typer.Option("--config-dir", help="Your own model/, env/, data/, experiment/ files.")]
Many = Annotated[bool, typer.Option("--multirun", "-m", help="A sweep: keys may have several values, as in seed=0,1,2.")]
Metric = Annotated[str | None, typer.Option("--metric", help="What a sweep compares jobs by.", metavar="NAME")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read data, show an example, estimate memory and time.")]
EnvName = Annotated[str, typer.Argument(help="One of those that `cook envs` lists.", metavar="NAME")]
EnvKeys = Annotated[list[str] | None, typer.Argument(help="Of the env, as in digits=3.", metavar="[KEY=VALUE]...")]

ServeWords = Annotated[list[str] | None, typer.Argument(help="As in port=8000; or keys ...", metavar="[WORD]...")]


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 failed, 2 the user's mistake, 130 interrupted."""
    args = sys.argv[1:] if argv is None else argv
    try:
        return app(args=args or ["--help"], prog_name="cook", standalone_mode=False) or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except typer.TyperException as error:  # a wrong flag or command
        print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130


@app.command()
def sft(
    overrides: Overrides = None, many: Many = False, metric: Metric = None, cfg: Cfg = None,
    config_dir: ConfigDir = None, dry_run: DryRun = False,
) -> int | None:  # fmt: skip
    """Fine-tune on conversations: cook sft model=qwen3-8b data=no_robots"""
    from cookbook.compose import compose

    compose_job = partial(compose, "sft", config_dir=config_dir)
    return _start_any(compose_job, overrides, "sft", many, metric, cfg, dry_run)


@app.command()
def rl(
    overrides: Overrides = None, many: Many = False, metric: Metric = None, cfg: Cfg = None,
    config_dir: ConfigDir = None, dry_run: DryRun = False,
) -> int | None:  # fmt: skip
    """Learn from rewards: cook rl env=gsm8k, or cook rl data=prompts.jsonl reward=my.py:score"""
    from cookbook.compose import compose

    compose_job = partial(compose, "rl", config_dir=config_dir)
    return _start_any(compose_job, overrides, "rl", many, metric, cfg, dry_run)


@app.command()
def dpo(
    overrides: Overrides = None, many: Many = False, metric: Metric = None, cfg: Cfg = None,
    config_dir: ConfigDir = None, dry_run: DryRun = False,
) -> int | None:  # fmt: skip
    """Learn from preferences: cook dpo data=ultrafeedback, or cook dpo data=file data.path=pairs.jsonl"""
    from cookbook.compose import compose

    compose_job = partial(compose, "dpo", config_dir=config_dir)
    return _start_any(compose_job, overrides, "dpo", many, metric, cfg, dry_run)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A .py file with Config and main.", metavar="FILE")],
    overrides: Overrides = None,
    many: Many = False,
    metric: Metric = None,
    cfg: Cfg = None,
    config_dir: ConfigDir = None,
) -> int | None:
    """Run a recipe file of your own."""
    from cookbook.compose import compose_file

    return _start_any(lambda words: compose_file(file, words, config_dir), overrides, file.stem, many, metric, cfg)


@sweep_app.command("wandb")
def sweep_wandb(
    kind: Annotated[Literal["sft", "rl", "dpo"], typer.Argument(help="sft, rl or dpo", metavar="RECIPE")],
    overrides: Overrides = None,
    metric: Metric = None,
    config_dir: ConfigDir = None,
) -> None:
    """Print the file that `wandb sweep` takes for the same axes: cook sweep wandb sft learning_rate=1e-4,3e-4 > sweep.yaml"""
    from cookbook.compose import compose
    from cookbook.sweep_wandb import sweep_file

    options = ["--config-dir", str(config_dir.absolute())] if config_dir else []
    print(sweep_file(kind, overrides or [], metric, lambda words: compose(kind, words, config_dir=config_dir), options), end="")


@app.command()
def resume(run: RunArg, overrides: Overrides = None, cfg: Cfg = None) -> int | None:
    """Continue a run from its newest checkpoint, with more steps if wanted: cook resume RUN steps=200"""
    from cookbook.launch import reopen

    composed, run_dir = reopen(run, overrides or [])
    return _start(composed, cfg, run_dir=run_dir)


@app.command()
def rerun(
    run: RunArg, overrides: Overrides = None, cfg: Cfg = None, config_dir: ConfigDir = None, dry_run: DryRun = False
) -> int | None:
    """Start a new run with the configuration of an old one: cook rerun RUN seed=1"""
    from cookbook.launch import repeat

    return _start(repeat(run, overrides or [], config_dir), cfg, dry_run)


app.add_typer(cli_runs.app)  # without a name: its commands are cook's own


@data_app.command("check")
def data_check(overrides: Overrides = None, config_dir: ConfigDir = None) -> int:
    """Read every row and tell which would be trained on: cook data check my.jsonl"""
    from cookbook.compose import compose
    from cookbook.data_cli import check

    return check(compose("sft", _data_words(overrides), config_dir=config_dir).config, _console())


@data_app.command("show")
def data_show(
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", help="How many rows.", min=1)] = 3,
    config_dir: ConfigDir = None,
) -> None:
    """Show rows as the model sees them, trained tokens coloured: cook data show data=no_robots -n 2"""
    from cookbook.compose import compose
    from cookbook.data_cli import show

    show(compose("sft", _data_words(overrides), config_dir=config_dir).config, rows, _console())


@envs_app.callback()
def envs(context: typer.Context) -> None:
    """List environments, play them, check them."""
    if context.invoked_subcommand is None:
        from cookbook.envs_cli import print_envs

        print_envs(_console())


@envs_app.command("play")
def envs_play(
    name: EnvName,
    overrides: EnvKeys = None,
    seed: Annotated[int, typer.Option("--seed", help="Which problem.")] = 0,
    split: Annotated[Literal["train", "eval"], typer.Option("--split", help="train or eval")] = "train",
    config_dir: ConfigDir = None,
) -> None:
    """Be the policy: what you type is the reply; /call TOOL {"x": 1} calls a tool; Ctrl-D leaves."""
    from cookbook.envs_cli import env_section, play

    play(env_section(name, overrides or [], config_dir), seed, split, _console())


@envs_app.command("check")
def envs_check(
    name: EnvName,
    overrides: EnvKeys = None,
    problems: Annotated[int, typer.Option("--problems", "-n", help="How many problems of each split.", min=1)] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the problems.")] = 0,
    config_dir: ConfigDir = None,
) -> int:
    """Verify that solutions score 1, junk scores low, a seed repeats itself, and eval is not in train."""
    from cookbook.envs_cli import check, env_section

    return check(env_section(name, overrides or [], config_dir), problems, seed, _console())


@app.command()
def models(config_dir: ConfigDir = None) -> None:
    """List the models of conf/model and which of them lie on this machine."""
    from cookbook.catalog import print_models

    print_models(_console(), config_dir)


@app.command()
def recipes() -> None:
    """List the recipes."""
    from cookbook.catalog import print_recipes

    print_recipes(_console())


@app.command()
def serve(
    words: ServeWords = None,
) -> None:
    """Offer the engine to Tinker clients: cook serve model=qwen3-8b; cook serve keys create|list|revoke"""
    from cookbook.serving.cli import main as serve_main

    serve_main(words or [], _console())


@app.command()
def doctor() -> None:
    """Tell versions, devices, memory and what is missing, with the command that adds it."""
    from cookbook.doctor import doctor

    doctor(_console())


@app.command()
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="bash, zsh or fish")]) -> None:
    """Print a completion script: eval "$(cook completion bash)" """
    from cookbook.complete import SCRIPTS

    print(SCRIPTS[shell])


@app.command("_complete", hidden=True)
def complete(shell: str, line: str) -> None:
    """What could follow `line`; called by the completion scripts."""
    from cookbook.complete import answers

    print("\n".join(answers(typer.main.get_command(app), shell, line)))


def _start(composed: Composed, cfg: str | None, dry_run: bool = False, run_dir: Path | None = None) -> int | None:
    from cookbook.launch import check_start, launch

    if cfg:
        print(composed.yaml, end="")
        return None
    if dry_run:
        check_start(composed)
    if dry_run and composed.recipe.startswith("rl/"):
        from cookbook.rl_dryrun import dry_run as estimate_rl

        return estimate_rl(composed.config, _console())
    if dry_run:
        from cookbook.dryrun import dry_run as estimate

        return estimate(composed.recipe, composed.config)
    return launch(composed, run_dir)


def _start_any(
    compose: Callable[[list[str]], Composed], words: list[str] | None, kind: str, many: bool, metric: str | None,
    cfg: str | None, dry_run: bool = False,
) -> int | None:  # fmt: skip
    """One run, or with -m a sweep."""
    if many:
        return _start_many(compose, words, kind, metric, cfg, dry_run)
    if metric is not None:
        raise UsageError("--metric is what a sweep compares jobs by: give -m too, and a key with several values")
    return _start(compose(words or []), cfg, dry_run)


def _start_many(
    compose: Callable[[list[str]], Composed], words: list[str] | None, kind: str, metric: str | None, cfg: str | None,
    dry_run: bool = False,
) -> int:  # fmt: skip
    """A sweep; exit status 1 when a job failed."""
    from cookbook.multirun import multirun

    if cfg or dry_run:
        raise UsageError(f"-m with {'--cfg' if cfg else '--dry-run'}: look at one job, with one value for each key")
    return multirun(compose, words or [], kind, metric, _console())


def _data_words(overrides: list[str] | None) -> list[str]:
    """`cook data check my.jsonl` is short for data=file data.path=my.jsonl."""
    words = overrides or []
    if words and "=" not in words[0] and not words[0].startswith("~"):
        return ["data=file", f"data.path={words[0]}", *words[1:]]
    return words


def _console() -> Console:
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    sys.exit(main())
