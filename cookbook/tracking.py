"""Weights & Biases, when asked for. Another backend is another class with these three members and a line in `connect_tracker`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cookbook.config import LogConfig
from cookbook.errors import UsageError

MODES = ("off", "online", "offline")


class Tracker(Protocol):
    id: str | None  # of the tracked run; a resumed run passes it back and goes on there

    def log(self, row: Mapping[str, float]) -> None:
        """One step: a flat row of numbers that holds `progress/step`. Called once per step."""
        ...

    def finish(self, exit_code: int) -> None: ...


class NoTracker:
    id = None

    def log(self, row: Mapping[str, float]) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass


class WandbTracker:
    def __init__(self, log: LogConfig, *, run_dir: Path, name: str, config: dict, run_id: str | None, group: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb-core would report its own crashes home, offline too
        import wandb

        if log.wandb == "online" and not wandb.login(prompt=False):
            raise UsageError("log.wandb=online needs a W&B login: run `wandb login` (or set WANDB_API_KEY), or use log.wandb=offline")
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
                settings=wandb.Settings(console="off", silent=True),  # console.log is ours; its banners would cut the progress bar
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"W&B refused the run ({reason}): check network and login, or use log.wandb=offline") from error
        self.id: str | None = self._run.id
        self.url: str | None = self._run.url
        self._run.define_metric("progress/step")
        self._run.define_metric("*", step_metric="progress/step")  # W&B's own counter counts log() calls, also of repeated steps

    def log(self, row: Mapping[str, float]) -> None:
        self._run.log(dict(row))

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def connect_tracker(
    log: LogConfig, *, run_dir: Path, name: str, config: dict, run_id: str | None = None, group: str | None = None
) -> Tracker:
    """The tracker that `log.wandb` asks for; nothing is imported or sent for `off`. `config` is a plain nested dict, `run_id` the run to go on with."""
    if log.wandb not in MODES:
        raise UsageError(f"log.wandb={log.wandb} is unknown: it is one of {', '.join(MODES)}")
    if log.wandb == "off":
        return NoTracker()
    return WandbTracker(log, run_dir=run_dir, name=name, config=config, run_id=run_id, group=group)
