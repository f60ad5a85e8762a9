"""Weights & Biases, when asked for. Another backend is another class with the members of Tracker."""

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
    id: str | None = None

    def log(self, row: Mapping[str, float]) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass


class WandbTracker:
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

    def log(self, row: Mapping[str, float]) -> None:
        self._run.log(dict(row))

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def connect_tracker(
    log: LogConfig, *, run_dir: Path, name: str, config: dict, run_id: str | None = None, group: str | None = None
) -> Tracker:
    """The tracker that `log.wandb` asks for; for `off` nothing is imported or sent.

    `config` is a plain nested dict, `run_id` the tracked run to go on with, `group` the sweep.
    """
    if log.wandb not in MODES:
        raise UsageError(f"log.wandb={log.wandb} is unknown: it is one of {', '.join(MODES)}")
    if log.wandb == "off":
        return NoTracker()
    return WandbTracker(log, run_dir=run_dir, name=name, config=config, run_id=run_id, group=group)
