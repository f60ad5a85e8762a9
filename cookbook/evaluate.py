"""`cook eval`: a trained policy measured on held-out rows, pairs, an env's problems or prompts with rewards, with intervals;
`--against` measures another on the same items and compares them pair by pair.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook import records
from cookbook.errors import UsageError
from cookbook.estimates import Difference, Estimate, Item, difference, estimate
from cookbook.measures import Choice, InspectTask, Measured, measures_of
from cookbook.past_policy import PastPolicy, find_policy, open_policy

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One figure of an evaluation."""

    name: str
    estimate: Estimate
    other: Estimate | None = None
    difference: Difference | None = None


def evaluate(
    target: str, words: Sequence[str], checkpoint: str, choice: Choice, console: Console, *, against: str | None = None,
    inspect: str | None = None, as_json: bool = False, to: Path | None = None,
) -> None:  # fmt: skip
    """Print a table (or JSON) and leave <run>/evals/<time>.json, or `to`; the base model leaves a file only there."""
    choice.check()
    if inspect and words:
        raise UsageError(f"--inspect {inspect} and {words[0]}: one at a time")
    if to is not None and to.exists():
        raise UsageError(f"--to {to} exists already: name another file")

    def say(line: str) -> None:
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    found = find_policy(target, checkpoint)
    beside = found.run.directory / "evals" if found.run else to.parent if to else Path()  # of what is left on disk
    measures = [InspectTask(inspect, choice, beside / "inspect", say)] if inspect else measures_of(found, words, choice, say)
    policy = open_policy(target, checkpoint)
    other = _other(policy, against)
    say(f"{policy.name}, {policy.model.name}" + (f"; against {other.name}" if other else ""))
    if other and _others_rows_differ(policy, other, words or inspect):
        say(f"{other.name} held other rows out (its seed or data differ): it may have trained on these")
    rows: list[Row] = []
    items: dict[str, dict[str, list[Item]]] = {}
    attempts: list[records.Row] = []
    for measure in measures:
        mine = measure(policy)
        theirs = measure(other) if other else None
        attempts += mine.attempts
        for name, of_mine in mine.items.items():
            rows.append(_row(name, of_mine, theirs))
            items[name] = {"values": of_mine} | ({"against": theirs.items[name]} if theirs and name in theirs.items else {})
    record = _record(policy, other, words, choice, rows, items)
    written = to or (_place(beside, policy.step) if policy.run else None)
    if written is not None:
        written.parent.mkdir(parents=True, exist_ok=True)
        records.replace(written, records.encode(record) + "\n")
        if attempts:
            records.write_rows(written.with_suffix(".rollouts.jsonl"), attempts)
    if as_json:
        print(json.dumps(records.strict({key: value for key, value in record.items() if key != "items"}), indent=1))
        return
    console.print(_table(rows, other))
    if written is not None:
        say(str(written))


def _other(policy: PastPolicy, against: str | None) -> PastPolicy | None:
    if against is None:
        return None
    if against == "base":
        return policy.base()
    return open_policy(against, service=policy.service if find_policy(against).model.name == policy.model.name else None)


def _others_rows_differ(policy: PastPolicy, other: PastPolicy, chosen: object) -> bool:
    """Whether both are runs with held-out data of their own, and not the same, while those of `policy` are measured."""
    if chosen or policy.run is None or other.run is None or "data" not in policy.run.config:
        return False
    mine, theirs = policy.run.config, other.run.config
    return any(mine.get(key) != theirs.get(key) for key in ("data", "seed"))


def _row(name: str, items: list[Item], theirs: Measured | None) -> Row:
    others = theirs.items.get(name) if theirs else None
    if others is None:
        return Row(name, estimate(items))
    if len(others) != len(items):
        raise UsageError(f"{name}: {len(items)} items here and {len(others)} there: they cannot be compared one by one")
    return Row(name, estimate(items), estimate(others), difference(items, others))


def _record(
    policy: PastPolicy, other: PastPolicy | None, words: Sequence[str], choice: Choice, rows: Sequence[Row],
    items: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return {
        "policy": policy.name, "model": policy.model.name, "step": policy.step,
        "against": other.name if other else None,
        "words": list(words), **asdict(choice), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "figures": {
            row.name: asdict(row.estimate)
            | ({"against": asdict(row.other), "difference": asdict(row.difference)} if row.other and row.difference else {})
            for row in rows
        },
        "items": items,
    }  # fmt: skip


def _place(folder: Path, step: int | None) -> Path:
    stem = time.strftime("%Y%m%d-%H%M%S") + (f"-step{step}" if step is not None else "")
    places = (folder / f"{stem}{end}.json" for end in ("", *(f"-{n}" for n in range(2, 100))))
    return next(place for place in places if not place.exists())


def _table(rows: Sequence[Row], other: PastPolicy | None) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    for name in ("value (95 %)", *(("against", "difference (95 %)") if other else ()), "items"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.name, _with_interval(row.estimate)]
        if other:
            cells += [
                f"{row.other.value:.3g}" if row.other else "",
                _with_interval(row.difference, "+") if row.difference else "",
            ]
        table.add_row(*cells, str(row.estimate.num_items))
    return table


def _with_interval(of: Estimate | Difference, sign: str = "") -> str:
    interval = "" if of.low is None else f" ({of.low:{sign}.2g}..{of.high:{sign}.2g})"
    return f"{of.value:{sign}.3g}{interval}"
