"""Runs on disk, found by directory or by name, going on, ended, killed, torn or of an older version. They are read and never
written, but for adapters that are fetched from a server.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from cookbook import records
from cookbook.checkpoints import CheckpointRow
from cookbook.errors import UsageError
from cookbook.keys import did_you_mean
from cookbook.overrides import typed_words
from cookbook.remote_adapter import local_adapter, place_of

State: TypeAlias = Literal["running", "completed", "interrupted", "failed", "killed"]
Direction: TypeAlias = Literal["min", "max"]

RUNS = Path("runs")
FALLING = ("nll", "loss")  # last part of a metric's name: less is better


@dataclass(frozen=True)
class PastRun:
    """A run directory. What its files say is read anew each time one asks, since the run may be going on."""

    directory: Path  # absolute
    recipe: str  # "sft/chat", or the path of somebody's own file; "" when run.json does not tell
    config: dict[str, Any]  # config.yaml
    overrides: list[str]  # as typed, those of resumes included
    run: dict[str, Any]  # run.json
    unreadable: list[str]  # a line for each of these files that cannot be read or lacks what it should have

    @property
    def name(self) -> str:
        """What to call it on a command line: its name under ./runs, else its directory."""
        return name_of(self.directory)

    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl; NaN and the infinities are numbers again, what is no number is left out."""
        return [_numbers(row) for row in self.rows("metrics.jsonl")[0]]

    def metrics_from(self, offset: int) -> tuple[list[dict[str, float]], int]:
        """The rows behind the first `offset` bytes of metrics.jsonl, and from where to ask next: for looks again and again."""
        path = self.directory / "metrics.jsonl"
        if not path.is_file():
            return [], offset
        with path.open("rb") as file:
            file.seek(offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        return [_numbers(row) for row in _parsed(whole, path.name)[0]], offset + len(whole)

    def rows(self, file: str) -> tuple[list[records.Row], list[str]]:
        """The rows of a .jsonl file of the run, and a line for each that cannot be read. A torn last line is no row."""
        return read_tolerant(self.directory / file)

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json; None while the run goes on, and after a kill."""
        return _json_object(self.directory / "result.json")

    @property
    def state(self) -> State:
        """`killed`: nobody holds the run, and it left no result."""
        if records.is_locked(self.directory):
            return "running"
        status = (self.result or {}).get("status")
        return cast(State, status) if status in ("completed", "interrupted", "failed") else "killed"

    @property
    def checkpoints(self) -> list[CheckpointRow]:
        """Those that still exist, or lie on a server; oldest first."""
        rows = [cast(CheckpointRow, row) for row in self.rows("checkpoints.jsonl")[0] if "step" in row and "uri" in row]
        return [row for row in rows if row.get("path") is None or (self.directory / str(row["path"])).is_dir()]

    @property
    def newest(self) -> CheckpointRow | None:
        return next(reversed(self.checkpoints), None)

    @property
    def best(self) -> CheckpointRow | None:
        """The checkpoint with the best value of `best_metric`; None when none was evaluated."""
        metric, direction = self.best_metric or ("", "min")
        rated = [(value, row) for row in self.checkpoints if (value := _number(row.get("metrics", {}).get(metric))) is not None]
        finite = [pair for pair in rated if math.isfinite(pair[0])]
        chosen = min if direction == "min" else max
        return chosen(finite, key=lambda pair: pair[0])[1] if finite else None

    @property
    def best_metric(self) -> tuple[str, Direction] | None:
        """The eval/<name>/<metric> that rates its checkpoints, and which way is better."""
        if metric := self.run.get("best"):
            return str(metric), "max" if self.run.get("best_is") == "max" else "min"
        best = (self.result or {}).get("best") or {}
        named = [f"eval/{key}" for key in best if key not in ("step", "checkpoint")]  # a run from before run.json told
        named += [key for row in self.checkpoints[-1:] for key in row.get("metrics", {})]
        return (named[0], "min" if falls(named[0]) else "max") if named else None

    def directory_of(self, row: CheckpointRow) -> Path:
        """Where the checkpoint lies; of one on a server, where its adapter is once it has been fetched."""
        path = row.get("path")
        return place_of(self.directory, row["uri"]) if path is None else self.directory / str(path)

    def checkpoint(self, which: Literal["newest", "best"] | int = "newest") -> CheckpointRow:
        """By step or as named. UsageError if there is none."""
        rows = self.checkpoints
        if not rows:
            what = "wait for its first" if self.state == "running" else f"cook resume {self.name}"
            raise UsageError(f"{self.name} has no checkpoint yet ({self.state}): {what}")
        row = self.newest if which == "newest" else self.best if which == "best" else None
        if isinstance(which, int):
            row = next((row for row in rows if row["step"] == which), None)
        steps = ", ".join(str(row["step"]) for row in rows)
        if row is None:
            lacks = "evaluated checkpoint" if which == "best" else f"checkpoint of step {which}"
            raise UsageError(f"{self.name} has no {lacks}; there are those of steps {steps}")
        return row

    def adapter(self, which: Literal["newest", "best"] | int = "newest") -> Path:
        """The directory of such a checkpoint; one on a server is fetched. UsageError if it cannot be had."""
        row = self.checkpoint(which)
        if row.get("path") is None:
            return local_adapter(self.directory, self.config.get("service"), row["uri"])
        return self.directory_of(row)


def read_run(run: str | Path) -> PastRun:
    """The run of that directory, or of that name under ./runs. UsageError when there is none."""
    import yaml

    directory = find_run(run)
    config, unreadable = {}, []
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        unreadable.append(f"config.yaml cannot be read: {' '.join(str(error).split())}")
    if not isinstance(config, dict):
        unreadable.append(f"config.yaml holds a {type(config).__name__}, expected keys and values")
        config = {}
    record = _json_object(directory / "run.json")
    if record is None:
        unreadable.append("run.json is missing or torn")
    else:
        unreadable += [f"run.json has no {key}" for key in ("recipe", "overrides") if key not in record]
    record = record or {}
    words = typed_words(record) if "overrides" in record else []
    return PastRun(directory, str(record.get("recipe", "")), config, words, record, unreadable)


def find_run(run: str | Path) -> Path:
    """Its absolute directory. UsageError with the one that was meant, or the runs of a sweep."""
    for directory in (Path(run), RUNS / run):
        if (directory / "config.yaml").is_file():
            return directory.absolute()
    for directory in (Path(run), RUNS / run):
        if jobs := runs_in(directory):
            names = ", ".join(map(name_of, jobs[:5])) + (", ..." if len(jobs) > 5 else "")
            raise UsageError(f"{run} is a folder of runs: name one of {names}")
    if Path(run).is_dir():
        raise UsageError(f"{run} holds no run: there is no config.yaml in it")
    names = [name_of(path) for path in run_directories()]
    meant = did_you_mean(str(run).removeprefix(f"{RUNS}/"), names)
    raise UsageError(f"no run {run}{meant}; the newest are {', '.join(names[:5]) or '(none in ./runs)'}")


def run_directories() -> list[Path]:
    """The runs under ./runs, those of sweeps (runs/<sweep>/<job>) too, newest first."""
    found = list(_run_directories())
    return sorted(found, key=lambda path: (path / "config.yaml").stat().st_mtime, reverse=True)


def _run_directories() -> Iterator[Path]:
    for directory in RUNS.iterdir() if RUNS.is_dir() else ():
        if (directory / "config.yaml").is_file():
            yield directory
        else:
            yield from runs_in(directory)


def runs_in(directory: Path) -> list[Path]:
    """The runs right below a directory, as a sweep has them, by name: 2 before 10."""
    return sorted((path.parent for path in directory.glob("*/config.yaml")), key=_by_number)


def _by_number(path: Path) -> tuple[int, str]:
    number = re.match(r"\d+", path.name)
    return int(number[0]) if number else -1, path.name


def falls(metric: str) -> bool:
    """Whether less of it is better."""
    return metric.rpartition("/")[2] in FALLING


def name_of(directory: Path) -> str:
    """runs/a -> a, runs/sweep/0 -> sweep/0; a run elsewhere keeps its path."""
    try:
        return str(directory.absolute().relative_to(RUNS.absolute()))
    except ValueError:
        return str(directory)


def read_tolerant(path: Path) -> tuple[list[records.Row], list[str]]:
    """Every row of a .jsonl file that can be read, and a line for each that cannot; a torn last line is neither."""
    if not path.is_file():
        return [], []
    return _parsed(path.read_bytes(), path.name)


def _parsed(text: bytes, name: str) -> tuple[list[records.Row], list[str]]:
    *lines, _torn = text.split(b"\n")
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append(f"{name}:{number} is not a JSON object ({line[:40]!r}): left out")
    return rows, problems


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _numbers(row: records.Row) -> dict[str, float]:
    return {key: number for key, value in row.items() if (number := _number(value)) is not None}


def _number(value: object) -> float | None:
    """1 -> 1.0, "NaN" -> nan, "text" -> None."""
    if isinstance(value, int | float) or value in records.NOT_FINITE:
        return float(cast(float, value))
    return None
