"""`cook runs`: what there is under ./runs, a line or a JSON object each."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook import records
from cookbook.charts import figure
from cookbook.errors import UsageError
from cookbook.progress import SHOWN, SHOWN_EVALS, duration
from cookbook.run_reader import PastRun, State, read_run, run_directories

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 1000  # columns of a terminal that has none
STYLES: dict[State, str] = {
    "running": "cyan", "completed": "green", "interrupted": "yellow", "failed": "red", "killed": "magenta",
}  # fmt: skip


@dataclass(frozen=True)
class RunLine:
    name: str
    directory: str
    state: State
    recipe: str
    metric: str | None  # the one that rates the run, its newest value
    value: float | None
    before: float | None  # the same before the first step
    steps: int
    seconds: float | None
    started: str | None  # as in 2026-11-27T14:04:09+0100


def print_runs(console: Console, number: int, *, as_json: bool) -> None:
    """The newest `number` runs (0: all)."""
    directories = run_directories()
    lines = [line_of(read_run(directory)) for directory in directories[: number or None]]
    if as_json:
        console.file.write(json.dumps(records.strict([asdict(line) for line in lines]), indent=1) + "\n")
        return
    if not lines:
        raise UsageError(f"there are no runs in {Path('runs').absolute()}: start one with `cook sft`, or go to where they are")
    _print_table(console, lines)
    if len(directories) > len(lines):
        console.print(f"\n{len(directories) - len(lines)} older: cook runs -n 0", highlight=False)


def _print_table(console: Console, lines: list[RunLine]) -> None:
    """Names are never cut, since one types them; where the terminal is narrow, columns go. A pipe gets them all."""
    columns = ["run", "state", "recipe", "metric", "before", "now", "steps", "time", "started"]
    room = console.width if console.is_terminal else WIDE
    console.width = WIDE
    table = _table(lines, columns)
    for column in ("started", "before", "recipe", "time", "metric"):
        if console.measure(table).maximum <= room:
            break
        columns.remove(column)
        table = _table(lines, columns)
    console.print(table)


def _table(lines: list[RunLine], columns: list[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in columns:
        table.add_column(title, justify="right" if title in ("before", "now", "steps", "time") else "left", no_wrap=True)
    for line in lines:
        cells = {
            "run": line.name, "state": Text(line.state, style=STYLES[line.state]), "recipe": line.recipe,
            "metric": (line.metric or "").removeprefix("eval/"), "before": _figure(line.before), "now": _figure(line.value),
            "steps": str(line.steps), "time": "" if line.seconds is None else duration(line.seconds),
            "started": (line.started or "")[:16].replace("T", " "),
        }  # fmt: skip
        table.add_row(*(cell if isinstance(cell := cells[title], Text) else Text(cell) for title in columns))
    return table


def line_of(run: PastRun) -> RunLine:
    """What one line tells; metrics.jsonl is read only for runs that result.json does not tell about."""
    state, result = run.state, run.result or {}
    evals = result.get("eval") or {}
    metric, value, before = _headline(run, evals.get("before") or {}, evals.get("after") or {})
    steps, seconds = result.get("steps"), result.get("seconds")
    if value is None or steps is None or state == "running":
        rows = run.metrics()
        first = rows[0] if rows and rows[0].get("progress/step") == 0 else {}
        newest: dict[str, float] = {}
        for row in rows:
            newest |= row
        metric, value, before = _headline(run, _evals(first), _evals(newest))
        if value is None:
            metric = next((name for name in SHOWN if name in newest), None)
            value = newest.get(metric) if metric else None
        steps = int(newest.get("progress/step", 0))
        seconds = _seconds(run, state, rows) if state == "running" or seconds is None else seconds
    recipe = run.recipe if not run.recipe.endswith(".py") else Path(run.recipe).name
    started = run.run.get("started")
    return RunLine(run.name, str(run.directory), state, recipe, metric, value, before, int(steps), seconds, started)


def _headline(
    run: PastRun, before: Mapping[str, float], after: Mapping[str, float]
) -> tuple[str | None, float | None, float | None]:
    """(eval/<name>/<metric>, its newest value, its first one): the metric that rates the run, else one that a person reads."""
    rated = run.best_metric[0].removeprefix("eval/") if run.best_metric else None
    named = rated if rated in after else next((n for n in after if n.rpartition("/")[2] in SHOWN_EVALS), None)
    if named is None:
        return None, None, None
    return f"eval/{named}", float(after[named]), float(before[named]) if named in before else None


def _evals(row: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}


def _seconds(run: PastRun, state: State, rows: list[dict[str, float]]) -> float | None:
    """Of the steps logged, which a resumed run has from all its sessions; of a first session by the clock."""
    resumed = run.run.get("resumed")
    if steps := [row["time/step"] for row in rows if "time/step" in row]:
        return round(sum(steps), 3)
    if resumed or state != "running" or not run.run.get("started"):
        return None
    started = time.mktime(time.strptime(run.run["started"][:19], "%Y-%m-%dT%H:%M:%S"))
    return round(time.time() - started, 3)


def _figure(value: float | None) -> str:
    return "" if value is None else figure(value)
