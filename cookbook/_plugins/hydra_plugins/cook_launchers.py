"""Our launchers for Hydra's sweepers, which find them only in this namespace: hydra/launcher=process and =shared.

What a launcher does with its jobs is in cookbook/sweep.py: the task function is a cookbook.multirun.Task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

from cookbook.errors import UsageError


class ProcessLauncher(Launcher):
    """Each job in a fresh process: one per GPU at a time, without GPUs one at a time, or `jobs`."""

    how = "process"

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        if self.jobs is not None and (type(self.jobs) is not int or self.jobs < 1):
            came = str(self.jobs).lower() if isinstance(self.jobs, bool) else self.jobs
            raise UsageError(f"hydra.launcher.jobs={came}: expected null or a whole number of at least 1")
        self.task = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        return self.task.launch(self.how, job_overrides, initial_job_idx, self.jobs)


class SharedLauncher(ProcessLauncher):
    """All jobs (or `jobs` at a time) are threads of this process and tenants of one engine."""

    how = "shared"


class Noting(Launcher):
    """Around the launcher that was chosen: tells the task which jobs begin, as another's launcher runs them elsewhere."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.task = task_function
        self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        varied = [[word.lstrip("+") for word in words] for words in job_overrides]
        self.task.note(varied, initial_job_idx)
        # a + before each: searches leave it out, and the keys have no schema here
        return self.launcher.launch([[f"+{word}" for word in words] for words in varied], initial_job_idx)


# jobs: at a time; null: one per GPU or one, and of a shared sweep all. Plain nodes: Hydra reads this file before it is a module
for kind in (ProcessLauncher, SharedLauncher):
    node = {"_target_": f"hydra_plugins.cook_launchers.{kind.__name__}", "jobs": None}
    ConfigStore.instance().store(group="hydra/launcher", name=kind.how, node=node, provider="cook")
