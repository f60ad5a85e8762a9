"""The commands on runs that exist. Each imports what it needs when it is called, as in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()
dashboard_app = typer.Typer(help="A workspace on W&B with charts for our metrics.", no_args_is_help=True)
app.add_typer(dashboard_app, name="dashboard")

RunArg = Annotated[str, typer.Argument(help="A run directory, or its name under runs/.", metavar="RUN")]


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
