"""checkpoints.jsonl: which checkpoints a run has, which of them stay, and the newest one that still loads."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

from cookbook import records
from cookbook.errors import UsageError

T = TypeVar("T")


class CheckpointRow(TypedDict):
    step: int  # optimizer steps done
    uri: str
    path: str | None  # relative to the run directory; null: the checkpoint lies on a server
    loop: dict[str, Any]  # what the recipe needs to go on, with the run's `seconds` and `wandb_id`
    metrics: dict[str, float]  # eval/* of these very weights, when they were evaluated


def note_best(run_json: Path, best: str, best_is: str) -> None:
    """For whoever reads the run later: which evaluation rates its checkpoints, and which way."""
    record = json.loads(run_json.read_text())
    if (record.get("best"), record.get("best_is")) != (best, best_is):
        records.amend(run_json, best=best, best_is=best_is)


class Checkpoints:
    """The rows of RUN/checkpoints.jsonl, oldest first. A row is appended once its directory is complete."""

    def __init__(self, run_dir: Path, *, keep_last: int, best: str | None, best_is: str) -> None:
        self.run_dir = run_dir
        self.file = run_dir / "checkpoints.jsonl"
        self.keep_last = max(1, keep_last)  # the final one always stays
        self.best_metric = best
        self.best_sign = {"min": 1.0, "max": -1.0}[best_is]
        rows = records.keep_rows(self.file, lambda row: True)
        for row in rows:
            if lacking := sorted(CheckpointRow.__required_keys__ - row.keys()):
                what = f"a row of another version, without {', '.join(lacking)}: {records.encode(row)[:60]}"
                raise UsageError(f"{self.file} holds {what}")
        self.rows = cast(list[CheckpointRow], rows)
        self.let_go: Callable[[str], None] = lambda uri: None  # of a checkpoint on a server that the run does not keep

    def directory(self, row: CheckpointRow) -> Path | None:
        return None if row["path"] is None else self.run_dir / row["path"]

    @property
    def newest(self) -> CheckpointRow | None:
        """The newest row whose directory exists (or which lies on a server)."""
        present = (row for row in reversed(self.rows) if (path := self.directory(row)) is None or path.is_dir())
        return next(present, None)

    @property
    def best(self) -> CheckpointRow | None:
        rated = [row for row in self.rows if math.isfinite(self._rating(row))]
        return min(rated, key=self._rating, default=None)

    def sound(self, step: int) -> CheckpointRow | None:
        """The newest whose weights are known to give finite numbers: they were evaluated, or a step trained on them is
        among the `step` steps logged.
        """
        def finite(metrics: Mapping[str, float]) -> bool:
            return bool(metrics) and all(math.isfinite(float(value)) for value in metrics.values())

        known = (row for row in reversed(self.rows) if row["step"] < step or finite(row["metrics"]))
        return next((row for row in known if (path := self.directory(row)) is None or path.is_dir()), None)

    def beaten_by(self, metrics: Mapping[str, float]) -> bool:
        """Whether weights with these metrics would be the best."""
        best = self.best
        return self._rate(metrics) < (self._rating(best) if best else math.inf)

    def _rating(self, row: CheckpointRow) -> float:
        return self._rate(row["metrics"])

    def _rate(self, metrics: Mapping[str, float]) -> float:
        value = metrics.get(self.best_metric) if self.best_metric else None
        return math.inf if value is None or math.isnan(float(value)) else self.best_sign * float(value)

    def add(self, row: CheckpointRow) -> None:
        """Append the row, then let go of what is neither among the newest nor the best."""
        records.append_row(self.file, row, sync=True)
        self.rows = [*(old for old in self.rows if old["step"] != row["step"]), row]
        kept = [old for old in self.rows if old in self.rows[-self.keep_last :] or old is self.best]
        dropped = [old["uri"] for old in self.rows if old not in kept and old["path"] is None]
        self._rewrite(kept)
        for uri in dropped:
            self.let_go(uri)
        self._sweep(up_to=row["step"])  # a later one may be complete and on its way here

    def _rewrite(self, kept: list[CheckpointRow]) -> None:
        """Always before the directories go: a kill in between leaves a stray directory, not a row without one."""
        if len(kept) != len(records.read_rows(self.file)):
            records.write_rows(self.file, cast(list[Mapping[str, object]], kept))
        self.rows = kept

    def _sweep(self, up_to: float) -> None:
        """Delete step checkpoints in RUN/checkpoints that no row knows, half-written ones too; other names stay."""
        known = {path.resolve() for row in self.rows if (path := self.directory(row))}
        for directory in (self.run_dir / "checkpoints").glob("*/weights/*"):
            step = re.fullmatch(r"(\d+)|\.(\d+)\..+", directory.name)  # 000020, or .000020.x8f2 on its way to that name
            if step and int(step[1] or step[2]) <= up_to and directory.resolve() not in known:
                shutil.rmtree(directory, ignore_errors=True)

    def load_newest(
        self, load: Callable[[CheckpointRow], T], note: Callable[[str], None]
    ) -> tuple[CheckpointRow, T] | None:
        """Try `load` on the rows, newest first; what fails is reported and set aside as `<name>.damaged`.

        None without rows. UsageError when there are rows and none loads: starting over would erase the run.
        """
        reason = ""
        for index in reversed(range(len(self.rows))):
            row = self.rows[index]
            try:
                loaded = load(row)
            except (UsageError, MemoryError):
                raise
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                fallback = f"falling back to {self.rows[index - 1]['step']:06d}" if index else "none is left"
                note(f"checkpoint {row['step']:06d} is damaged ({reason}): {fallback}")
                continue
            self._drop_after(index)
            return row, loaded
        if self.rows:
            raise UsageError(f"none of the {len(self.rows)} checkpoints of {self.run_dir} loads (oldest: {reason})")
        return None

    def _drop_after(self, index: int) -> None:
        for row in self.rows[index + 1 :]:
            path = self.directory(row)
            if path is not None and path.is_dir():
                shutil.rmtree(path.with_name(path.name + ".damaged"), ignore_errors=True)
                path.rename(path.with_name(path.name + ".damaged"))
        self._rewrite(self.rows[: index + 1])
        self._sweep(up_to=math.inf)
