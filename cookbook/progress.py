"""What a person sees of a run: a live bar on a terminal, lines elsewhere; console.log keeps every line."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cookbook import records
from cookbook.config import LogConfig

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

CONSOLE: ContextVar[Console | None] = ContextVar("console", default=None)  # of a run that is a thread of a sweep
SHOWN = {  # metric -> how a step line says it, in this order
    "train/nll": "nll {:.4f}",
    "train/loss": "loss {:.4f}",
    "dpo/loss": "loss {:.4f}",
    "dpo/accuracy": "accuracy {:.3f}",
    "env/all/reward": "reward {:.3f}",
    "env/all/correct": "correct {:.3f}",
    "optim/lr": "lr {:.2e}",
    "perf/train_tokens_per_second": "{:,.0f} tok/s",
    "perf/sample_tokens_per_second": "{:,.0f} sampled tok/s",
}
SHOWN_EVALS = ("nll", "loss", "reward", "correct", "accuracy")  # last part of eval/<name>/<metric>


class Screen(Console):
    """Whoever reads it may go (cook sft | head): then console.log alone has the rest."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class Progress:
    """Terminal and console.log of one run. `begin` starts the bar; `note` works at any time."""

    def __init__(self, log: LogConfig, console_log: Path, console: Console | None = None) -> None:
        self.console = console or CONSOLE.get() or Screen()
        self.console_log = console_log
        self.every = max(1, log.every)
        # rich draws one live display at a time, so a job that runs as a thread of a sweep prints lines
        self.live = log.progress and self.console.is_terminal and threading.current_thread() is threading.main_thread()
        self._bar: Bar | None = None
        self._total: int | None = None
        self._evals = ""

    def begin(self, total: int, done: int) -> None:
        self.close()
        self._total, self._first, self._since = total, done, time.monotonic()
        if self.live:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}", markup=False)
            self._bar = Bar(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done: move the bar, or print its line if it is due. Lines with an evaluation always are."""
        evals = _evals(metrics)
        figures = [text.format(float(metrics[name])) for name, text in SHOWN.items() if name in metrics]
        eta = self._eta(step)
        of_total = f"/{self._total}" if self._total is not None else ""
        line = "  ".join(part for part in (f"step {step}{of_total}", *figures, evals, eta) if part)
        if self._bar is not None:
            self._evals = evals or self._evals
            description = "  ".join(part for part in (*figures, self._evals, eta) if part)
            self._bar.update(self._task, completed=step, description=description)
        if evals or (self._bar is None and (step % self.every == 0 or step == self._total)):
            self.note(line)
        elif step % self.every == 0:
            self.write_log(line)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        self.write_log(text)

    def write_log(self, text: str) -> None:
        """Into console.log only. A full disk must not hide the error that it causes elsewhere."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            records.append(self.console_log, "".join(f"{stamp} {line}\n" for line in text.splitlines()))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _eta(self, step: int) -> str:
        if self._total is None or not self._first < step < self._total:
            return ""
        return "eta " + duration((time.monotonic() - self._since) / (step - self._first) * (self._total - step))


def _evals(metrics: Mapping[str, float]) -> str:
    shown = []
    for key, value in metrics.items():
        _eval, *name, metric = key.split("/")
        if _eval == "eval" and metric in SHOWN_EVALS:
            shown.append(f"eval {'/'.join([*name, metric])} {float(value):.4f}")
    return "  ".join(shown)


def duration(seconds: float) -> str:
    """75.2 -> "1:15", 4000 -> "1:06:40"."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
