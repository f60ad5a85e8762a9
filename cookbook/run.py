"""The run directory, the record of a run: config, metrics, checkpoints, console, result; safe against `kill -9`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeVar

from cookbook import records
from cookbook.checkpoints import CheckpointRow, Checkpoints, note_best
from cookbook.config import LogConfig
from cookbook.errors import UsageError
from cookbook.interrupts import Interrupts
from cookbook.progress import Progress
from cookbook.report import AutoReport
from cookbook.result import Result, Status, closing_lines, way_out
from cookbook.run_reader import falls
from cookbook.run_record import note_data, prepare, run_directory
from cookbook.tracking import Tracker, Tracking, connect_trackers

if TYPE_CHECKING:
    from rich.console import Console

    from cookbook.row_report import RowReport

T = TypeVar("T")


class RunConfig(Protocol):
    """What Run reads of a recipe's Config (a dataclass)."""

    name: str | None
    run_dir: str | None
    keep_last: int
    log: LogConfig


class Run:
    """One run: `with Run(config, recipe="sft/chat") as run:`. The block's end writes result.json, also when it raises.

    Steps are counted in optimizer steps done: the first step's metrics are row 1, a checkpoint of step 20 has 20 in it.
    `best` names the eval metric (`eval/<name>/<metric>`) whose best checkpoint is kept; `best_is` says which way.
    `group` is the sweep, `tracker` replaces the one that config.log asks for, `console` the terminal.
    """

    def __init__(
        self,
        config: RunConfig,
        recipe: str,
        *,
        best: str | None = None,
        best_is: Literal["min", "max"] = "min",
        group: str | None = None,
        tracker: Tracker | None = None,
        console: Console | None = None,
    ) -> None:
        self.dir = run_directory(config.run_dir, config.name, recipe)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.at_end = contextlib.ExitStack()  # closed when the block ends, however it does
        self._lock = records.Lock(self.dir)
        try:
            self._open(config, recipe, best, best_is)
            self._progress = Progress(config.log, self.dir / "console.log", console)
            self._interrupts = Interrupts(self._progress.write_log, lambda: self._write_result("interrupted"))
            self._report = AutoReport(self.dir, self.note) if config.log.report else None
            self._tracking = Tracking([tracker] if tracker else self._connect_trackers(config, group), self.note)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, config: RunConfig, recipe: str, best: str | None, best_is: str) -> None:
        if not (self.dir / "config.yaml").exists():
            prepare(self.dir, recipe=recipe, config_yaml=_yaml(config), overrides=[])
        if best:
            note_best(self.dir / "run.json", best, best_is)
        self.store = self.dir / "checkpoints"
        self.metrics_file = self.dir / "metrics.jsonl"
        self.checkpoints = Checkpoints(self.dir, keep_last=config.keep_last, best=best, best_is=best_is)
        rows = records.keep_rows(self.metrics_file, lambda row: "progress/step" in row)
        self.step: int = rows[-1]["progress/step"] if rows else 0  # the last one logged
        self.evals: dict[str, dict[str, float]] = {}  # before, during (the latest), after
        self._pending: dict[str, float] = {}  # evaluated, waiting for the row of its step
        self._read_evals(rows)
        self._total: int | None = None
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._result: Result | None = None
        self._go_on: str | None = None  # the command, where resume is none

    def _connect_trackers(self, config: RunConfig, group: str | None) -> list[Tracker]:
        return connect_trackers(
            config.log,
            run_dir=self.dir,
            name=config.name or self.dir.name,
            config=dataclasses.asdict(config),  # type: ignore[call-overload]
            run_id=self.checkpoints.rows[-1]["loop"].get("wandb_id") if self.checkpoints.rows else None,
            resumed=bool(self.checkpoints.rows),
            group=group or config.log.group,
        )

    # What a recipe calls, in the order of its life.

    @property
    def resume_row(self) -> CheckpointRow | None:
        """The newest checkpoint that is there, before anyone tried to load it."""
        return self.checkpoints.newest

    def directory(self, row: CheckpointRow) -> Path | None:
        """Where the checkpoint lies now, wherever the run was moved to; None when it lies on a server."""
        return self.checkpoints.directory(row)

    def location(self, row: CheckpointRow) -> Path | str:
        """What a service loads the checkpoint from: its directory here, else its URI on the server."""
        return self.directory(row) or row["uri"]

    @property
    def console(self) -> Console:
        return self._progress.console

    def resume(self, load: Callable[[CheckpointRow], T]) -> tuple[CheckpointRow, T] | None:
        """Go back to the newest checkpoint that `load` can read: its row and what `load` made of it.

        Metrics, rollouts and checkpoints after its step are cut. None without a checkpoint: the record starts empty.
        """
        found = self.checkpoints.load_newest(load, self.note)
        self.step = found[0]["step"] if found else 0
        rows = records.keep_rows(self.metrics_file, lambda row: found is not None and row["progress/step"] <= self.step)
        for file in (self.dir / "rollouts").glob("*"):
            number = re.search(r"\d+", file.name)  # rollouts/<step>.jsonl
            if number and (found is None or int(number[0]) > self.step):
                file.unlink()
        self.evals = {}
        self._read_evals(rows)
        if found:
            self._seconds_before, self._started = float(found[0]["loop"].get("seconds", 0.0)), time.monotonic()
            self.note(f"resuming after step {self.step} ({found[0]['uri']})")
        return found

    def record(self, key: str, value: object) -> None:
        """Write a value settled at the start (`engine.token_budget`) into config.yaml, for resume and rerun."""
        from omegaconf import OmegaConf

        config = OmegaConf.load(self.dir / "config.yaml")
        OmegaConf.update(config, key, value)
        records.replace(self.dir / "config.yaml", OmegaConf.to_yaml(config))

    def reads(self, report: RowReport) -> None:
        """What was found in the data, for console.log. UsageError for a resumed run that would train on other rows."""
        self._progress.write_log("\n".join(report.account()))
        note_data(self.dir, report.fingerprint, goes_on=self.step > 0)

    def begin(self, total_steps: int) -> None:
        """Start the progress display; steps already done count, and there cannot be fewer in all."""
        if total_steps < self.step:
            raise UsageError(f"{total_steps} steps in all, but {self.step} are done: give more, or a new run (cook rerun)")
        self._total = total_steps
        (self.dir / "result.json").unlink(missing_ok=True)  # it spoke of an earlier end
        self._progress.begin(total_steps, self.step)

    @property
    def should_stop(self) -> bool:
        """Someone asked for a checkpoint and a clean exit (Ctrl-C, SIGTERM)."""
        return self._interrupts.stop.is_set()

    def stop(self) -> None:
        """Ask so from another thread."""
        self._interrupts.stop.set()

    def note(self, text: str) -> None:
        """A line for the screen and console.log."""
        self._progress.note(text)

    def log_eval(self, phase: Literal["before", "during", "after"], metrics: Mapping[str, float]) -> None:
        """Values at the weights as they are, names with or without `eval/`. `before` is row 0.

        The others join the row of their step: call this before `log` of that step. When that is logged already, its row
        is amended at the next checkpoint or the end.
        """
        named = {key if key.startswith("eval/") else f"eval/{key}": value for key, value in metrics.items()}
        self.evals[phase] = _short_names(named)
        if phase != "before":
            self._pending = {**self._pending, **named}
            return
        if self.step > 0:
            raise ValueError(f"log_eval('before') after {self.step} steps: a resumed run has it in run.evals")
        _refuse_not_finite(0, named)
        records.write_rows(self.metrics_file, [{"progress/step": 0, **named}])
        self._rated = (0, named)
        self._show({"progress/step": 0, **named})

    @property
    def is_best(self) -> bool:
        """Whether the evaluation just logged beats every checkpoint's: these weights deserve one of their own."""
        return self.checkpoints.beaten_by(self._pending or self._rated[1])

    def add_rows(self, table: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Rows for a table of W&B, sent with the next step's metrics; the run directory holds them in rollouts/."""
        self._tracking.add_rows(table, rows)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step, right after it: one line of metrics.jsonl, one call of W&B, the display.

        FloatingPointError when the evaluation that joins the row is no number: these weights are not to be saved.
        """
        if step <= self.step:
            raise ValueError(f"step {step} logged after step {self.step}: one row a step (call run.resume first)")
        row = {"progress/step": step, **metrics, **self._pending}
        records.append_row(self.metrics_file, row)
        named, self._pending = self._pending, {}
        self._rated = (step, named) if named else self._rated
        self.step = step
        self._show(row)
        _refuse_not_finite(step, named)

    def checkpoint(
        self,
        step: int,
        uri: str,
        *,
        loop: Mapping[str, object],
        path: str | Path | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> CheckpointRow:
        """Enter a finished save into checkpoints.jsonl and prune.

        `path` is its directory (None: where `uri` lies in run.store, if it does), `metrics` the eval/* of these weights
        (None: the evaluation of this step, if there was one). Log the step first: a kill between the two would
        otherwise leave a gap in the metrics.
        """
        if step != self.step:
            raise ValueError(f"checkpoint of step {step}, but the last step logged is {self.step}")
        self._amend()
        directory = Path(path) if path is not None else self.store / uri.removeprefix("tinker://")
        if metrics is None:
            metrics = self._rated[1] if self._rated[0] == step else {}
        row = CheckpointRow(
            step=step,
            uri=uri,
            path=os.path.relpath(directory.resolve(), self.dir.resolve()) if directory.is_dir() else None,
            loop={**loop, "seconds": round(self.seconds, 3), "wandb_id": self._tracking.id},
            metrics=dict(metrics),
        )
        records.sync(self.metrics_file)
        self.checkpoints.add(row)
        if self._report:
            self._report.at_checkpoint()
        return row

    def finish(self, status: Status | None = None, *, steps: int | None = None, checkpoint: str | None = None) -> Result:
        """Write result.json and say it on the screen. The end of the block does it for a recipe that does not.

        Defaults: `interrupted` when someone asked to stop before the last step, else `completed`; the last step logged;
        the newest checkpoint.
        """
        self._amend()
        if status is None:
            early = self.should_stop and (self._total is None or self.step < self._total)
            status = "interrupted" if early else "completed"
        if status == "completed" and self._rated[0] == self.step > 0:  # a session that found the run complete
            self.evals.setdefault("after", _short_names(self._rated[1]))
        result = self._result = self._write_result(status, steps=steps, checkpoint=checkpoint)
        self._close_display(result)
        return result

    @property
    def seconds(self) -> float:
        """Of all sessions together; after a resume counted from the checkpoint's."""
        return self._seconds_before + time.monotonic() - self._started

    # How it ends.

    def __enter__(self) -> Self:
        self._interrupts.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        failed = error is not None and not isinstance(error, KeyboardInterrupt)
        diverged = error if isinstance(error, FloatingPointError) else None
        error = self._of_diverged(diverged) if diverged else error
        try:
            if error is None:
                if self._result is None:
                    self.finish()
            elif isinstance(error, KeyboardInterrupt):
                self.finish("interrupted")
            else:
                self._fail(error)
        finally:
            self.at_end.close()
            self._progress.close()
            self._tracking.finish(1 if failed else 0)
            self._interrupts.restore()
            self._lock.release()
            if self._report and (self.step or not failed) and not records.disk_full(error):
                self._report.at_end()
        if records.disk_full(error):
            free = shutil.disk_usage(self.dir).free // 2**20
            advice = f"make room, then `cook resume {self.dir}`"
            raise UsageError(f"the disk of {self.dir} is full ({free} MiB free): {advice}") from error
        if diverged:
            assert error is not None
            raise error from diverged

    def _of_diverged(self, error: FloatingPointError) -> UsageError:
        """A resumed run would take the same step again, so the way out is another run."""
        sound = self.checkpoints.sound(self.step)
        advice, self._go_on = way_out(self.dir, sound and str(self.location(sound)), has_begun=self._total is not None)
        return UsageError(f"{error}. {advice}")

    def _fail(self, error: BaseException) -> None:
        is_mistake, text = isinstance(error, UsageError), " ".join(str(error).split())
        if is_mistake and self._total is None and (self.dir / "result.json").exists():
            return  # a refused resume: the run ended as it had ended before
        if not is_mistake:
            text = f"{type(error).__name__}: {text}"
            self._progress.write_log("".join(traceback.format_exception(error)))
        with contextlib.suppress(OSError):  # a full disk may be what brought us here
            result = self._write_result("failed", error=text)
            if self.step or not is_mistake:  # one seen before step 1 is the CLI's one line
                self._close_display(result)

    def _write_result(
        self, status: Status, *, steps: int | None = None, checkpoint: str | None = None, error: str | None = None
    ) -> Result:
        newest, best = self.checkpoints.newest, self.checkpoints.best
        result = Result(
            status=status,
            steps=self.step if steps is None else steps,
            seconds=round(self.seconds, 3),
            eval={phase: self.evals[phase] for phase in ("before", "after") if phase in self.evals},
            best={},
            checkpoint=checkpoint or (newest["uri"] if newest else None),
        )
        if best and (metric := self.checkpoints.best_metric):
            figure = {metric.removeprefix("eval/"): best["metrics"][metric]}
            result["best"] = {"step": best["step"], **figure, "checkpoint": best["uri"]}
        if error is not None:
            result["error"] = error
        if self._go_on:
            result["go_on"] = self._go_on
        records.replace(self.dir / "result.json", json.dumps(records.strict(result), indent=1) + "\n")
        return result

    def _close_display(self, result: Result) -> None:
        self._progress.close()
        newest = self.checkpoints.newest
        for line in closing_lines(result, self.dir, self.directory(newest) if newest else None, self._report is not None):
            self.note(line)

    def _show(self, row: Mapping[str, float]) -> None:
        self._progress.step(int(row["progress/step"]), row)
        self._tracking.log(row)

    def _amend(self) -> None:
        """Put an evaluation that came after its step's row into that row."""
        if not self._pending:
            return
        rows = records.read_rows(self.metrics_file)
        last = rows.pop() if rows and rows[-1]["progress/step"] == self.step else {"progress/step": self.step}
        records.write_rows(self.metrics_file, [*rows, {**last, **self._pending}])
        self._rated, self._pending = (self.step, self._pending), {}
        self._show({"progress/step": self.step, **self._rated[1]})

    def _read_evals(self, rows: list[records.Row]) -> None:
        """Of an earlier session: the evaluation before step 1, and the latest one with its step."""
        self._rated: tuple[int, dict[str, float]] = (-1, {})
        for row in [*rows[:1], *rows[-1:]]:
            named = {key: value for key, value in row.items() if key.startswith("eval/")}
            named = {key: float(v) if v in records.NOT_FINITE else v for key, v in named.items()}
            if named:
                self._rated = (row["progress/step"], named)
            if row["progress/step"] == 0:
                self.evals["before"] = _short_names(named)


def _short_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """eval/held_out/nll -> held_out/nll."""
    return {key.removeprefix("eval/"): value for key, value in metrics.items()}


def _refuse_not_finite(step: int, evaluated: Mapping[str, float]) -> None:
    """FloatingPointError for a loss that is no number; a reward that is none is its author's."""
    for key, value in _short_names(evaluated).items():
        if falls(key) and not math.isfinite(value):
            raise FloatingPointError(f"step {step}: {key} is {value}")


def _yaml(config: RunConfig) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
