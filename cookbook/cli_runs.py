"""The commands on runs that exist. Each imports what it needs when it is called, as in cli.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()

RunArg = Annotated[str, typer.Argument(help="A run directory, or its name under runs/.", metavar="RUN")]


@app.command()
def runs(
    number: Annotated[int, typer.Option("--number", "-n", help="How many of the newest; 0: all.", min=0)] = 20,
    json: Annotated[bool, typer.Option("--json", help="A JSON list.")] = False,
) -> None:
    """List the runs under ./runs, newest first: state, recipe, metric, steps, time."""
    from cookbook.run_list import print_runs

    print_runs(console(), number, as_json=json)


def console() -> Console:
    from rich.console import Console

    return Console()
