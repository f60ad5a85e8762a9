"""The jobs of a sweep: each in a process of its own, or all as threads that share one engine; watched, and stopped together.

A job that diverges (cookbook/divergence.py) is asked to stop with a checkpoint. Nothing that happens to a job touches another
one, and each can be resumed alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from cookbook.compose import Composed
from cookbook.divergence import Watch
from cookbook.errors import UsageError
from cookbook.run_reader import PastRun, read_run

SHOWN = ("train/nll", "train/loss", "dpo/loss", "env/all/reward")
LOOK_SECONDS = 0.5
STOPPING = b"\nstopping all jobs with a checkpoint each (Ctrl-C exits at once)\n"


@dataclass
class Job:
    """One run to be."""

    composed: Composed
    directory: Path
    varied: list[str]  # the words that it does not share with the others
    stopped: bool = False  # because it diverged
    stop: threading.Event = field(default_factory=threading.Event)  # of a thread
    process: subprocess.Popen[bytes] | None = None
    run: PastRun | None = None  # once there is something of it
    watch: Watch = field(default_factory=Watch)
    last: dict[str, float] = field(default_factory=dict)  # row of metrics.jsonl
    num_read: int = 0  # bytes of metrics.jsonl

    def look(self) -> None:
        """Read what the run has written since the last look: it is twice a second, beside the threads of a shared sweep."""
        if self.run is None and (self.directory / "config.yaml").is_file():
            self.run = read_run(self.directory)
        if self.run is not None:
            rows, self.num_read = self.run.metrics_from(self.num_read)
            self.watch.see(rows)
            self.last = rows[-1] if rows else self.last


def out_of(directory: Path) -> Path:
    """What a job prints, beside its run directory."""
    return directory.with_name(f"{directory.name}.out")


def run_jobs(how: str, jobs: Sequence[Job], at_a_time: int | None, asks: Path | None = None) -> bool:
    """Run all to their ends; the first Ctrl-C or SIGTERM stops them with a checkpoint each, a second Ctrl-C at once.

    `asks`: a file whose appearance asks the same, of a process that somebody else watches: it says nothing of it then.
    Whether they were asked to stop.
    """
    with _Screen(jobs) as screen, _Stopping(jobs, asks) as stopping:
        if how == "shared":
            _run_threads(jobs, at_a_time or len(jobs), stopping, screen)
        else:
            _run_processes(jobs, at_a_time, stopping, screen)
    return stopping.asked


# ---- a process for each


def _run_processes(jobs: Sequence[Job], at_a_time: int | None, stopping: _Stopping, screen: _Screen) -> None:
    gpus = _gpus()
    room = at_a_time or max(1, len(gpus))
    waiting, places = list(jobs), list(range(room))
    running: dict[int, Job] = {}
    while waiting or running:
        while waiting and places and not stopping.asked:
            place, job = places.pop(0), waiting.pop(0)
            _start(job, gpus[place % len(gpus)] if gpus else None)
            running[place] = job
        if stopping.asked:
            waiting.clear()
        time.sleep(LOOK_SECONDS)
        for place, job in list(running.items()):
            assert job.process
            _watch(job)
            if job.process.poll() is not None:
                del running[place]
                places.append(place)
        screen.show()


def _start(job: Job, gpu: str | None) -> None:
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    words = [word for word in job.composed.overrides if not word.startswith("recipe=")]
    recipe = job.composed.recipe
    kind, _, file = recipe.partition("/")
    command = ["run", recipe] if recipe.endswith(".py") else [kind, f"recipe={file}"]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})}
    with out_of(job.directory).open("wb") as out:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "cookbook.cli", *command, *words, *_config_dir(job)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is for us to pass on
        )  # fmt: skip


def _config_dir(job: Job) -> list[str]:
    return [] if job.composed.config_dir is None else ["--config-dir", str(job.composed.config_dir)]


def _gpus() -> list[str]:
    """Their numbers, as CUDA_VISIBLE_DEVICES has them; asked of a process, so that this one holds no context."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [number for number in visible.split(",") if number]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, line in enumerate(listed.splitlines()) if line.startswith("GPU")]


# ---- threads of one process


def _run_threads(jobs: Sequence[Job], at_a_time: int, stopping: _Stopping, screen: _Screen) -> None:
    import datasets  # noqa: F401  here and now: two threads at an import meet half a module
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import core.engine  # noqa: F401

    room = threading.Semaphore(at_a_time)
    threads = [threading.Thread(target=_run_thread, args=(job, room), name=job.directory.name) for job in jobs]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(LOOK_SECONDS)
        for job in jobs:
            _watch(job)
        stopping.look()
        screen.show()


def _run_thread(job: Job, room: threading.Semaphore) -> None:
    with room:
        if not job.stop.is_set():
            contextvars.copy_context().run(_run_quietly, job)


def _run_quietly(job: Job) -> None:
    from rich.console import Console

    from cookbook.interrupts import STOP
    from cookbook.launch import launch
    from cookbook.progress import CONSOLE

    job.directory.parent.mkdir(parents=True, exist_ok=True)
    # a full disk has no room for what a job says of it either: the summary tells
    with contextlib.suppress(OSError), out_of(job.directory).open("w", encoding="utf-8") as out:
        CONSOLE.set(Console(file=out, width=120))
        STOP.set(job.stop)
        try:
            launch(job.composed)
        except UsageError as error:
            out.write(f"error: {error}\n")
        except Exception:
            import traceback

            traceback.print_exc(file=out)  # its run directory says so too; the others go on


# ---- watching


def _watch(job: Job) -> None:
    job.look()
    if job.watch.diverged and not job.stopped:
        job.stopped = True
        stop_job(job)


def stop_job(job: Job) -> None:
    """Ask for a checkpoint and a clean exit."""
    job.stop.set()
    if job.process is not None and job.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            job.process.send_signal(signal.SIGTERM)


class _Stopping:
    """Holds the two signals while jobs run: the first asks every job to stop, a second Ctrl-C ends them at once."""

    def __init__(self, jobs: Sequence[Job], asks: Path | None = None) -> None:
        self.jobs, self.asked, self._asks = jobs, False, asks
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        for job in self.jobs:  # an error of ours leaves no job behind
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
                job.process.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            if self._asks is None:
                os.write(2, STOPPING)
            self._ask()
        elif number == signal.SIGINT:
            for job in self.jobs:
                if job.process is not None and job.process.poll() is None:
                    job.process.kill()
            os._exit(130)

    def look(self) -> None:
        """Whether the file that asks is there by now."""
        if not self.asked and self._asks is not None and self._asks.exists():
            self._ask()

    def _ask(self) -> None:
        self.asked = True
        for job in self.jobs:
            stop_job(job)


class _Screen:
    """What a person sees while jobs run: a table that is kept up to date on a terminal, else a line when a job ends."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        from rich.console import Console

        self.jobs, self.console = jobs, Console()
        self._told: set[Path] = set()
        self._live = None

    def __enter__(self) -> _Screen:
        jobs = "1 job" if len(self.jobs) == 1 else f"{len(self.jobs)} jobs"
        self.console.print(f"{jobs} in {short(self.jobs[0].directory.parent)}", highlight=False)
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self.show()

    def show(self) -> None:
        for job in self.jobs:
            job.look()
            ended = job.run is not None and job.run.state not in ("running", "killed")
            if ended and job.directory not in self._told:
                self._told.add(job.directory)
                self.console.print(f"{job.directory.name}: {_told(job)}", highlight=False, markup=False)
        if self._live and self._live.is_started:
            from rich.table import Table

            table = Table("job", "", box=None)
            for job in self.jobs:
                table.add_row(job.directory.name, _told(job))
            self._live.update(table, refresh=True)


def _told(job: Job) -> str:
    if job.run is None:
        return "waiting"
    values = [f"{name.rpartition('/')[2]} {job.last[name]:.4f}" for name in SHOWN if name in job.last]
    state = "diverged" if job.watch.diverged else job.run.state if job.run.state != "killed" else "starting"
    return "  ".join([state, f"step {int(job.last.get('progress/step', 0))}", *values])


def final_value(directory: Path, metric: str | None) -> float | None:
    """What a job is compared by: the last value of `metric`, by default of the one that rates its checkpoints.

    None of a job that failed or has no finite one: a search counts it as failed and goes on.
    """
    try:
        run = read_run(directory)
    except UsageError:
        return None
    if run.state == "failed":
        return None
    name = metric or (run.best_metric or ("", ""))[0]
    values = [row[name] for row in run.metrics() if name in row]
    return values[-1] if values and math.isfinite(values[-1]) else None


def short(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
