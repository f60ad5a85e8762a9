"""Weights & Biases and trackio, when asked for. Another one is another class with the members of Tracker."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cookbook.config import LogConfig
from cookbook.errors import UsageError

MODES = ("off", "online", "offline")
TABLE_ROWS = 2000  # of one table in one session; what comes later is in rollouts/ alone
INCREMENT = 25  # rows

Tables = Mapping[str, Sequence[Mapping[str, object]]]  # name -> new rows, all with the same keys


class Tracker(Protocol):
    title: str  # what people call it
    id: str | None  # of the tracked run, where it must be given back to go on there after a resume

    def log(self, row: Mapping[str, float], tables: Tables) -> None:
        """One step: a flat row of numbers that holds `progress/step`, and what tables gain. Called once per step."""
        ...

    def finish(self, exit_code: int) -> None: ...


class Tracking:
    """The trackers of a run. One that fails is let go with a note: a lost viewer is no reason to lose the run."""

    def __init__(self, trackers: Sequence[Tracker], note: Callable[[str], None]) -> None:
        self._trackers, self._note = list(trackers), note
        self._tables: dict[str, list[Mapping[str, object]]] = {}
        self.id = next((tracker.id for tracker in trackers if tracker.id), None)

    def add_rows(self, table: str, rows: Sequence[Mapping[str, object]]) -> None:
        """They wait for the next step, since a step is one log."""
        if self._trackers:
            self._tables.setdefault(table, []).extend(rows)

    def log(self, row: Mapping[str, float]) -> None:
        tables, self._tables = self._tables, {}
        for tracker in list(self._trackers):
            try:
                tracker.log(row, tables)
            except Exception as error:
                self._trackers.remove(tracker)
                self._note(f"{tracker.title} stopped ({type(error).__name__}: {error}); metrics.jsonl goes on")

    def finish(self, exit_code: int) -> None:
        for tracker in self._trackers:
            try:
                tracker.finish(exit_code)
            except Exception as error:
                self._note(f"{tracker.title} did not finish ({type(error).__name__}: {error})")


class WandbTracker:
    title = "W&B"

    def __init__(
        self, log: LogConfig, *, run_dir: Path, name: str, config: dict, run_id: str | None, group: str | None
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it sends its own crashes home, offline too
        import wandb
        import wandb.errors

        if log.wandb == "online" and not wandb.login(prompt=False):
            advice = "run `wandb login` (or set WANDB_API_KEY), or use log.wandb=offline"
            raise UsageError(f"log.wandb=online, but there is no W&B login: {advice}")
        try:
            self._run = wandb.init(
                project=log.wandb_project,
                name=name,
                id=run_id,
                group=group,
                resume="allow",
                config=config,
                dir=run_dir,
                mode="online" if log.wandb == "online" else "offline",
                reinit="create_new",  # jobs of a sweep may be threads of one process
                settings=wandb.Settings(console="off", silent=True),  # banners would cut the progress bar
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            advice = "check network and login, or use log.wandb=offline"
            raise UsageError(f"W&B refused the run ({reason}): {advice}") from error
        self.id: str | None = self._run.id
        self.url: str | None = self._run.url
        self._run.define_metric("progress/step")
        self._run.define_metric("*", step_metric="progress/step")  # its own axis counts log() calls
        self._tables: dict[str, _Table] = {}
        self._step = 0.0

    def log(self, row: Mapping[str, float], tables: Tables) -> None:
        for name, rows in tables.items():
            if rows:
                self._tables.setdefault(name, _Table(list(rows[0]))).add(rows)
        self._step = row["progress/step"]
        self._run.log({**row, **{name: table.sent() for name, table in self._tables.items() if table.is_due}})

    def finish(self, exit_code: int) -> None:
        if left := {name: table.sent() for name, table in self._tables.items() if table.waiting}:
            self._run.log({"progress/step": self._step, **left})
        self._run.finish(exit_code=exit_code)


class _Table:
    """A table of W&B that sends what is new: INCREMENTAL, since the default shows the last step alone.

    Its first rows at once, later ones INCREMENT at a time: W&B asks for at most a hundred increments.
    """

    def __init__(self, columns: list[str]) -> None:
        import wandb

        self._table = wandb.Table(columns=list(columns), log_mode="INCREMENTAL")
        self._size = 0
        self.waiting = 0  # rows added and not sent

    def add(self, rows: Sequence[Mapping[str, object]]) -> None:
        for row in rows[: TABLE_ROWS - self._size]:
            self._table.add_data(*row.values())
            self._size += 1
            self.waiting += 1

    @property
    def is_due(self) -> bool:
        return self.waiting >= (INCREMENT if self._size > self.waiting else 1)

    def sent(self) -> Any:
        self.waiting = 0
        return self._table


class TrackioTracker:
    """A SQLite file per project on this machine, looked at with `trackio show`. The same names; no tables."""

    title = "trackio"
    id: str | None = None  # it finds a run by its name

    def __init__(self, log: LogConfig, *, name: str, config: dict, resumed: bool, group: str | None) -> None:
        import trackio

        options = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False, "resume": "allow" if resumed else "never"}
        with contextlib.redirect_stdout(io.StringIO()):  # its banner would cut the progress bar
            # in a context of its own: there, and not here, it remembers the run as the one to end before another begins
            self._run = contextvars.copy_context().run(
                trackio.init, project=log.wandb_project, name=name, group=group, config=config, **options
            )

    def log(self, row: Mapping[str, float], tables: Tables) -> None:
        self._run.log(dict(row), step=int(row["progress/step"]))

    def finish(self, exit_code: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


def check_log(log: LogConfig) -> None:
    if log.wandb not in MODES:
        raise UsageError(f"log.wandb={log.wandb} is unknown: it is one of {', '.join(MODES)}")
    if log.trackio and importlib.util.find_spec("trackio") is None:
        raise UsageError("log.trackio=true, but trackio is not installed: uv sync --extra trackio (or pip install trackio)")


def connect_trackers(
    log: LogConfig,
    *,
    run_dir: Path,
    name: str,
    config: dict,
    run_id: str | None = None,
    resumed: bool = False,
    group: str | None = None,
) -> list[Tracker]:
    """What `log.wandb` and `log.trackio` ask for; where they are off nothing is imported or sent.

    `config` is a plain nested dict, `run_id` the run of W&B to go on with, `group` the sweep.
    """
    check_log(log)
    trackers: list[Tracker] = []
    if log.trackio:
        trackers.append(TrackioTracker(log, name=name, config=config, resumed=resumed, group=group))
    if log.wandb != "off":
        trackers.append(WandbTracker(log, run_dir=run_dir, name=name, config=config, run_id=run_id, group=group))
    return trackers
