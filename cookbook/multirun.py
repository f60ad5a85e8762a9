"""`-m`: words with several values become jobs, through Hydra's sweepers and launchers (any installed plugin of these too).

Hydra sees only the words that vary, as keys without a schema; each job is composed by cookbook/compose.py from all words,
and all that can be is checked before the first one starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cookbook.compose import Composed, plugins_on_path
from cookbook.errors import UsageError
from cookbook.keys import group_files
from cookbook.overrides import key_of, one_line
from cookbook.run_reader import RUNS, falls

plugins_on_path()

from hydra._internal.config_loader_impl import ConfigLoaderImpl  # noqa: E402
from hydra._internal.utils import create_config_search_path  # noqa: E402
from hydra.core.config_store import ConfigStore  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.core.override_parser.types import Glob, Override  # noqa: E402
from hydra.core.plugins import Plugins  # noqa: E402
from hydra.core.utils import JobReturn, JobStatus  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from hydra.types import HydraContext, RunMode  # noqa: E402
from omegaconf import open_dict, read_write  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

if TYPE_CHECKING:
    from rich.console import Console

ComposeJob = Callable[[list[str]], Composed]
PRIMARY = "cook_sweep"
OWN = ("name", "run_dir")  # of each run
SWEPT = re.compile(r"^[+~]*[^=]+=.*(,|\b(choice|range|interval|glob|shuffle|sort|tag)\()")
DEFAULT_METRIC = {"sft": "eval/held_out/nll", "rl": "env/all/reward", "dpo": "eval/held_out/accuracy"}
QUIET = ("hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null", "hydra.job.chdir=false")


@dataclass(frozen=True)
class Words:
    """What was typed, by what it is for."""

    constant: list[str]  # the same for every job
    swept: list[str]  # several values
    hydra: list[str]  # hydra/launcher=..., hydra.sweeper.n_trials=...

    @property
    def is_search(self) -> bool:
        """By a sweeper of a plugin's, in place of Hydra's own grid."""
        return any(word.startswith("hydra/sweeper=") and word != "hydra/sweeper=basic" for word in self.hydra)

    @property
    def is_ours(self) -> bool:
        """Whether the launcher is one of ours, which hold the signals themselves."""
        launchers = [word.partition("=")[2] for word in self.hydra if word.startswith("hydra/launcher=")]
        return not launchers or launchers[-1] in ("process", "shared")


def sorted_words(words: Sequence[str]) -> Words:
    hydra = [word for word in words if word.startswith(("hydra.", "hydra/"))]
    swept = [word for word in words if word not in hydra and _is_sweep(word)]
    constant = [word for word in words if word not in hydra and word not in swept]
    return Words(constant, [_expanded(word) for word in swept], hydra)


def _is_sweep(word: str) -> bool:
    if not SWEPT.match(word):
        return False
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return False


@dataclass
class Task:
    """A sweep: how a job is composed and where it goes. Launchers of ours hand their jobs to `launch`, others call it."""

    compose: ComposeJob
    constant: list[str]
    directory: Path
    metric: str | None  # what jobs are compared by; None: the metric that rates a run's checkpoints
    is_ours: bool = True  # the launcher: ours tells what its jobs do
    owner: int = field(default_factory=os.getpid)  # the process of the sweep; another launcher's jobs run in others
    values: list[tuple[Path, list[str]]] = field(default_factory=list)  # of the jobs begun, what they differ in

    def launch(self, how: str, job_overrides: Sequence[Sequence[str]], first: int, at_a_time: int | None) -> list[JobReturn]:
        from cookbook import sweep

        batch = [[word.lstrip("+") for word in words] for words in job_overrides]
        jobs = [self.job(first + i, words) for i, words in enumerate(batch)]  # all composed before one starts
        if sweep.run_jobs(how, jobs, at_a_time):
            raise Stopped
        returns = []
        for job, words in zip(jobs, job_overrides, strict=True):
            value = sweep.final_value(job.directory, self.metric)
            returned = JobReturn(overrides=list(words), status=JobStatus.COMPLETED)
            returned.return_value = value
            returns.append(returned)
        return returns

    @property
    def asks(self) -> Path:
        """A file that asks jobs to stop, in whatever process they run; there while a sweep of another's launcher is stopped."""
        return self.directory / ".stop"

    def note(self, varied: Sequence[Sequence[str]], first: int) -> None:
        """Jobs that begin now, wherever they run."""
        if self.asks.exists():
            raise Stopped
        if not self.is_ours:
            from cookbook.sweep import short

            print(f"{len(varied)} job{'s' * (len(varied) != 1)} in {short(self.directory)}", flush=True)
        self.values += [(self.directory / job_name(first + i, words), list(words)) for i, words in enumerate(varied)]

    def job(self, number: int, varied: list[str]) -> Any:
        from cookbook.sweep import Job

        directory = self.directory / job_name(number, varied)
        own = [f"name={directory.name}", f"run_dir={directory}", f"log.group={self.directory.name}"]
        return Job(self.compose([*self.constant, *varied, *own]), directory, varied)

    def __call__(self, _: Any) -> float | None:
        """A job of another launcher's (joblib, submitit, ray), in a process that it chose. None when the job failed."""
        from hydra.core.hydra_config import HydraConfig

        from cookbook import sweep

        is_elsewhere = os.getpid() != self.owner
        if is_elsewhere and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C between two jobs is for the sweep's process to answer
        if self.asks.exists():
            return None
        its = HydraConfig.get()
        job = self.job(int(its.job.num), [word.lstrip("+") for word in its.overrides.task])
        if sweep.run_jobs("shared", [job], 1, self.asks if is_elsewhere else None):
            self.asks.touch()
        return sweep.final_value(job.directory, self.metric)


class Stopped(Exception):
    """The jobs were asked to stop: a search is not to begin others."""


@contextlib.contextmanager
def _stopped_by_file(task: Task) -> Iterator[None]:
    """While another's launcher runs jobs: the first Ctrl-C or SIGTERM asks them to stop, a second Ctrl-C is the launcher's."""
    from cookbook.sweep import STOPPING

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not task.asks.exists():
            task.directory.mkdir(parents=True, exist_ok=True)
            task.asks.touch()
            os.write(2, STOPPING)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except RuntimeError:  # a pool may break when its processes are asked to stop while they start
        if not task.asks.exists():
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        task.asks.unlink(missing_ok=True)


def multirun(compose: ComposeJob, words: Sequence[str], kind: str, metric: str | None, console: Console) -> int:
    """Run all jobs and tell what came of them. Exit status 1 when one failed.

    UsageError before the first job where one could not be composed.
    """
    from cookbook.sweep_summary import summarise

    parts = sorted_words(words)
    if not parts.swept:
        raise UsageError("-m without a key that has several values, as in learning_rate=1e-4,3e-4")
    if named := [word for word in parts.swept if key_of(word) in OWN]:
        raise UsageError(f"{named[0]}: jobs are named after what differs; name= and run_dir= name the sweep, with one value")
    given = {key_of(word): word.partition("=")[2] for word in parts.constant if key_of(word) in OWN}
    constant = [word for word in parts.constant if key_of(word) not in given]
    name = given.get("name", f"sweep-{kind}-{time.strftime('%m%d-%H%M%S')}")
    directory = Path(given.get("run_dir", RUNS / name)).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} is not empty: choose another name= or run_dir= for the sweep")
    check_words(compose, constant, parts.swept)
    task = Task(compose, constant, directory, metric, parts.is_ours)
    status = 0
    try:
        with contextlib.nullcontext() if parts.is_ours else _stopped_by_file(task):
            _sweep(task, parts, _direction(kind, metric))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(one_line(error)) from error
    except Stopped:
        pass
    except (ValueError, RuntimeError) as error:  # of optuna: no job has a value; its grid, after one that failed
        if not task.values or not parts.is_search:
            raise
        console.print(f"the search broke off: {error}", highlight=False, markup=False)
        status = 1
    except KeyboardInterrupt:  # a second one at another's launcher, which has ended its jobs
        status = 130
    jobs = summarise(directory, task.values, metric, console)
    failed = any(job.state in ("failed", "killed") for job in jobs) or len(jobs) < len(task.values)
    return status or (1 if failed else 0)


def _direction(kind: str, metric: str | None) -> str | None:
    """Which way a search goes; None where nothing tells."""
    name = metric or DEFAULT_METRIC.get(kind)
    return name and ("minimize" if falls(name) else "maximize")


def _sweep(task: Task, parts: Words, direction: str | None) -> None:
    chosen = [] if any(word.startswith("hydra/launcher=") for word in parts.hydra) else ["hydra/launcher=process"]
    if "hydra/sweeper=optuna" in parts.hydra and not any("sweeper.direction=" in word for word in parts.hydra):
        if direction is None:
            raise UsageError("hydra/sweeper=optuna: which way? give --metric, or hydra.sweeper.direction=maximize or minimize")
        chosen.append(f"hydra.sweeper.direction={direction}")
    ConfigStore.instance().store(PRIMARY, {})
    loader = ConfigLoaderImpl(create_config_search_path(None))
    where = [f"hydra.sweep.dir='{task.directory}'", "hydra.sweep.subdir=."]
    config = loader.load_configuration(PRIMARY, [*QUIET, *where, *chosen, *parts.hydra], RunMode.MULTIRUN)
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.launcher = {"_target_": "hydra_plugins.cook_launchers.Noting", "launcher": config.hydra.launcher}
    context = HydraContext(config_loader=loader, callbacks=_no_callbacks(config))
    sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=task, config=config)
    plus = "" if parts.is_search else "+"  # Hydra's own composes each job, and has no schema here
    sweeper.sweep([plus + word.lstrip("+") for word in parts.swept])


def _no_callbacks(config: Any) -> Any:
    from hydra._internal.callbacks import Callbacks

    return Callbacks(config)


def _expanded(word: str) -> str:
    """glob(...) over the files of a group, as Hydra has it, spelt out: Hydra does not see our groups here."""
    override = OverridesParser.create().parse_override(word)
    pattern, group = override._value, override.get_key_element()
    if not isinstance(pattern, Glob):
        return word
    there = list(group_files(group))
    if not (names := pattern.filter(there)):
        raise UsageError(f"{word}: matches nothing; there are {', '.join(there) or 'no files for this key'}")
    return f"{group}={','.join(names)}"


def check_words(compose: ComposeJob, constant: list[str], swept: list[str]) -> None:
    """Compose once for each value of each word, the others at their first: what is wrong is told before any job starts."""
    values = {word: _values(OverridesParser.create().parse_override(word)) for word in swept}
    first = {word: found[0] for word, found in values.items()}
    for word, found in values.items():
        for value in found:
            compose([*constant, *({**first, word: value}).values()])


def _values(override: Override) -> list[str]:
    """The words that a swept word stands for; the ends of an interval."""
    if override.is_discrete_sweep():
        key = override.get_key_element()
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    interval = override.value()
    return [f"{override.get_key_element()}={end}" for end in (interval.start, interval.end)]  # type: ignore[union-attr]


def job_name(number: int, varied: Sequence[str]) -> str:
    """3_learning_rate=1e-4_lora.rank=8, made of characters that need no quotes."""
    told = "_".join(re.sub(r"[^A-Za-z0-9._=+-]+", "-", word) for word in varied)
    return f"{number}_{told}"[:100].rstrip("-_.")


@dataclass(frozen=True)
class Axis:
    """What a key may be."""

    values: list[str]  # as typed; of an interval its two ends
    is_interval: bool
    is_log: bool  # tag(log, interval(...)), as the optuna sweeper has it


def axes(swept: Sequence[str]) -> dict[str, Axis]:
    return {override.get_key_element(): _axis(override) for override in map(OverridesParser.create().parse_override, swept)}


def _axis(override: Override) -> Axis:
    values = [word.partition("=")[2] for word in _values(override)]
    return Axis(values, not override.is_discrete_sweep(), "log" in getattr(override.value(), "tags", ()))
