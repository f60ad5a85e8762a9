"""result.json, and the same said to a person: the last lines on the screen."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from cookbook.progress import duration

Status = Literal["completed", "interrupted", "failed"]


class Result(TypedDict):
    status: Status
    steps: int
    seconds: float  # of all sessions together
    eval: dict[str, dict[str, float]]  # "before", "after" -> metric (without eval/) -> value
    best: dict[str, Any]  # step, checkpoint and the metric of the best checkpoint; empty without evaluated ones
    checkpoint: str | None  # uri of the newest
    error: NotRequired[str]
    go_on: NotRequired[str]  # the command that does, where resume would fail in the same way


def closing_lines(result: Result, run_dir: Path, checkpoint_dir: Path | None, has_report: bool) -> list[str]:
    """What happened, before and after, where things lie, and commands that go on from here."""
    plural = "" if result["steps"] == 1 else "s"
    lines = ["", f"{result['status']}: {result['steps']} step{plural} in {duration(result['seconds'])}"]
    if "error" in result:
        lines[-1] += f" ({result['error']})"
    lines += _before_after(result["eval"].get("before", {}), result["eval"].get("after", {}))
    run = _short(run_dir)
    lines += ["", f"run         {run}"]
    if result["checkpoint"]:
        lines.append(f"checkpoint  {_short(checkpoint_dir) if checkpoint_dir else result['checkpoint']}")
    if result["best"]:
        figures = {key: value for key, value in result["best"].items() if key not in ("step", "checkpoint")}
        named = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
        lines.append(f"best        step {result['best']['step']} ({named})")
    if has_report:
        lines.append(f"report      {_short(run_dir / 'report.html')}")
    return [*lines, *_next_commands(result, shlex.quote(run))]


def way_out(run_dir: Path, good: str | None, has_begun: bool) -> tuple[str, str | None]:
    """(what to do, the command) after numbers that are not finite; `good` is the newest checkpoint known to be so."""
    if not has_begun and good is None:
        return "No weight has moved yet: the model, the adapter of init_from or the rows are at fault", None
    run = shlex.quote(_short(run_dir))
    if good is None:
        command = f"cook rerun {run} learning_rate=..."
        return f"No checkpoint is known to be good: start again with a lower learning_rate ({command})", command
    good = shlex.quote(good if "://" in good else _short(Path(good)))
    command = f"cook rerun {run} init_from={good} learning_rate=..."
    return f"{good} is good: go on from it with a lower learning_rate ({command})", command


def _before_after(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    names = list(dict.fromkeys([*before, *after]))
    if not names:
        return []
    width = max(len(name) for name in names)
    table = ["", f"{'':{width}}  {'before':>10}  {'after':>10}  {'change':>7}"]
    for name in names:
        old, new = before.get(name), after.get(name)
        change = f"{(new - old) / abs(old):+.0%}" if old and new is not None and math.isfinite(new) else ""
        table.append(f"{name:{width}}  {_figure(old):>10}  {_figure(new):>10}  {change:>7}")
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _next_commands(result: Result, run: str) -> list[str]:
    again = (f"cook rerun {run} learning_rate=1e-4", "the same with other values, as a new run")
    if result["status"] == "completed":
        commands = [(f"cook resume {run} steps={max(1, 2 * result['steps'])}", "train on"), again]
    elif "go_on" in result:
        commands = [(result["go_on"], "with a lower rate: resume would end in the same way")]
    elif result["checkpoint"]:
        commands = [(f"cook resume {run}", "go on from the checkpoint")]
    else:
        commands = [(f"cook resume {run}", "start over: no checkpoint yet")]
    width = max(len(command) for command, _ in commands)
    return [f"{'next' if not index else '':12}{text:{width}}  # {what}" for index, (text, what) in enumerate(commands)]


def _short(path: Path) -> str:
    """Relative to where the person stands when it lies below, so that it can be typed."""
    here = Path(os.path.relpath(path))
    return str(path) if here.parts[:1] == ("..",) else str(here)
