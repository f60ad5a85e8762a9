"""What `cook eval` has measured of a run (RUN/evals/*.json), as a table of a report: of one run, or of several side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from cookbook.charts import colour_class, figure
from cookbook.run_reader import PastRun

SHOWN = 20  # evaluations, the newest
CHOSEN = ("problems", "samples", "temperature", "max_tokens", "seed")  # what two evaluations by the same words may differ in

Figure: TypeAlias = dict[str, Any]  # value, low, high, num_items; with --against also against and difference


@dataclass(frozen=True)
class PastEval:
    """One file of `cook eval`."""

    time: str
    step: int | None
    against: str | None
    words: str  # typed to choose what is measured; "" for what the run itself held out
    choice: tuple[object, ...]
    figures: dict[str, Figure]


def past_evals(run: PastRun) -> tuple[list[PastEval], list[str]]:
    """Those that can be read, newest first, and a line for each file that cannot."""
    found, problems = [], []
    for file in sorted((run.directory / "evals").glob("*.json")):
        try:
            found.append(_past_eval(json.loads(file.read_bytes())))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            problems.append(f"evals/{file.name} cannot be read as an evaluation: left out")
    return sorted(found, key=lambda one: one.time, reverse=True), problems


def _past_eval(record: dict[str, Any]) -> PastEval:
    figures = {str(name): dict(values) for name, values in record["figures"].items()}
    for values in figures.values():
        for part in filter(None, (values, values.get("against"), values.get("difference"))):
            _with_interval(part)  # raises where a number is missing
    choice = tuple(record.get(name) for name in CHOSEN)
    return PastEval(
        str(record["time"]), record.get("step"), record.get("against"), " ".join(record.get("words", [])), choice, figures
    )


def evals_of(run: PastRun) -> str:
    """A row per figure, newest evaluation first; "" when there are none."""
    evals, _ = past_evals(run)
    if not evals:
        return ""
    with_other = any(one.against for one in evals)
    titles = ["metric", "value (95 %)", *(("against", "its value", "difference (95 %)") if with_other else ()), "items"]
    head = "<th>measured</th><th>checkpoint</th>" + "".join(
        f"<th{'' if title in ('metric', 'against') else _NUMBER}>{title}</th>" for title in titles
    )
    rows = "".join(_row(one, name, first, with_other) for one in evals[:SHOWN] for first, name in enumerate(one.figures))
    left = len(evals) - SHOWN
    more = f"<p>{left} older: {escape(str(run.directory / 'evals'))}</p>" if left > 0 else ""
    return f'<div class="scroll"><table class="measured"><tr>{head}</tr>{rows}</table></div>{more}'


_NUMBER = ' class="num"'


def _row(one: PastEval, name: str, index: int, with_other: bool) -> str:
    values = one.figures[name]
    theirs, apart = values.get("against"), values.get("difference")
    when = "" if index else one.time[:16].replace("T", " ")
    step = "" if index or one.step is None else f"step {one.step}"
    cells = [f"<td>{escape(when)}</td><td>{step}</td><td>{_named(name, one.words)}</td>", _number(_with_interval(values))]
    if with_other:
        cells.append(f"<td>{escape(one.against or '')}</td>")
        cells.append(
            _number(figure(float(theirs["value"])) if theirs else "") + _number(_with_interval(apart, "+") if apart else "")
        )
    return f"<tr>{''.join(cells)}{_number(str(values.get('num_items', '')))}</tr>"


def evals_compared(named: Mapping[str, PastRun], colours: Mapping[str, int]) -> str:
    """The newest value of each figure, a column per run; a row holds what was asked for in the same words and sizes."""
    table: dict[tuple[object, ...], dict[str, Figure]] = {}
    for run_name, run in named.items():
        for one in past_evals(run)[0]:
            for name, values in one.figures.items():
                table.setdefault((name, one.words, *one.choice), {}).setdefault(run_name, values)
    if not table:
        return ""
    heads = "".join(f'<th class="num"><i class="swatch {colour_class(colours[n])}"></i>{escape(n)}</th>' for n in named)
    rows = "".join(
        f"<tr><td>{_named(str(name), str(words))}</td>"
        + "".join(_number(_with_interval(of[run]) if run in of else "") for run in named) + "</tr>"
        for (name, words, *_), of in table.items()
    )  # fmt: skip
    note = "held_out/... is measured on the rows that each run held out. cook eval RUN --against RUN compares item by item."
    return f'<div class="scroll"><table class="measured"><tr><th>metric</th>{heads}</tr>{rows}</table></div><p>{note}</p>'


def _named(name: str, words: str) -> str:
    return escape(name) + (f"<small>{escape(words)}</small>" if words else "")


def _number(text: str) -> str:
    return f"<td{_NUMBER}>{escape(text)}</td>"


def _with_interval(of: Mapping[str, Any], sign: str = "") -> str:
    """0.873 (0.81..0.92)."""
    value, low, high = (None if of[key] is None else float(of[key]) for key in ("value", "low", "high"))
    told = f"{value:{sign}.3g}"
    return told if low is None or high is None else f"{told} ({low:{sign}.2g}..{high:{sign}.2g})"
