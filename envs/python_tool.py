"""Problems too long to work out by hand, with a tool that runs Python in a sandbox."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, isqrt
from typing import final

from envs.answers import final_number, is_number, text_of
from envs.code_blocks import code_in
from envs.env import Env, Message, Problem, StepResult
from envs.sandbox import Limits, Sandbox, detect
from envs.streams import check_split, generator, held_apart
from envs.tools import ToolError

INSTRUCTION = "Use the tool `python`, then answer with the number only."

# Question and an expression that gives the answer; {n} is the large number, {e} an exponent, {a} < {b} small, {d} a digit.
_TASKS = (
    ("What is the sum of all primes below {n}?", "sum(p for p in range(2, {n}) if all(p % q for q in range(2, isqrt(p) + 1)))"),
    ("How many primes are below {n}?", "sum(all(p % q for q in range(2, isqrt(p) + 1)) for p in range(2, {n}))"),
    ("How many positive integers below {n} are divisible by {a} or {b}?",
     "sum(x % {a} == 0 or x % {b} == 0 for x in range(1, {n}))"),
    ("How many positive integers below {n} are coprime to {n}?", "sum(gcd(x, {n}) == 1 for x in range(1, {n}))"),
    ("What is the sum of the digits of {a} to the power of {e}?", "sum(map(int, str({a} ** {e})))"),
    ("How often does the digit {d} occur in the numbers from 1 to {n}?", "sum(str(x).count('{d}') for x in range(1, {n} + 1))"),
    ("What is the remainder of {a} to the power of {n}, divided by {b}0007?", "pow({a}, {n}, {b}0007)"),
    ("How many integers from 1 to {n} read the same backwards?", "sum(str(x) == str(x)[::-1] for x in range(1, {n} + 1))"),
    ("What is the sum of all divisors of {n}, itself included?", "sum(x for x in range(1, {n} + 1) if {n} % x == 0)"),
)  # fmt: skip


@dataclass
class Config:
    largest: int = 5000  # of the numbers in the questions
    cpu_seconds: float = 5.0  # of CPU time that one program may use
    seconds: float = 20.0  # on the clock
    memory_mb: int = 512  # of one program
    disk_mb: int = 16  # of the folder that a program runs in, empty at its start
    allow_unsandboxed: bool = False  # run programs with limits only where this machine has no sandbox: they may do what you may


@final
class PythonTool(Env):
    """Reward 1 when the reply without a call ends on the answer; `ran` counts programs that ended well."""

    def __init__(self, question: str, answer: int, sandbox: Sandbox, limits: Limits) -> None:
        self.question, self.answer = question, answer
        self.sandbox, self.limits = sandbox, limits
        self.num_ran = 0
        self.tools = [self.python]

    def reset(self) -> list[Message]:
        return [{"role": "user", "content": f"{self.question} {INSTRUCTION}"}]

    def python(self, code: str) -> str:
        """Run a Python program and read what it prints.

        Args:
            code: The whole program; it starts afresh each time, with the standard library and without network
        """
        outcome = self.sandbox.run(code_in(code, "python", "py"), limits=self.limits)
        printed = (outcome.stdout + outcome.stderr).strip("\n")
        if said := outcome.explain():
            raise ToolError("failed", f"{said}\n{printed}".strip("\n"))
        self.num_ran += 1
        return printed or "(the program printed nothing)"

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        correct = float(final_number(text) == self.answer)
        metrics = {"correct": correct, "format": float(is_number(text)), "ran": float(self.num_ran)}
        return StepResult(reward=correct, metrics=metrics)


@final
@dataclass(frozen=True)
class PythonProblem(Problem):
    question: str
    expression: str
    sandbox: Sandbox
    limits: Limits
    tag: str = "python"

    @cached_property
    def answer(self) -> int:
        return eval(self.expression, {"gcd": gcd, "isqrt": isqrt})  # one of _TASKS with numbers in it

    def make(self, group_size: int) -> list[Env]:
        return [PythonTool(self.question, self.answer, self.sandbox, self.limits) for _ in range(group_size)]

    def solve(self, messages: Sequence[Message]) -> Message:
        if messages[-1]["role"] == "tool":
            return {"role": "assistant", "content": str(messages[-1]["content"])}
        function = {"name": "python", "arguments": {"code": f"from math import gcd, isqrt\nprint({self.expression})"}}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "1", "function": function}]}


def problems(config: Config, split: str, seed: int) -> Iterator[PythonProblem]:
    check_split(split)
    if not 200 <= config.largest <= 100_000:
        raise ValueError(f"env.largest={config.largest}: expected 200 to 100000")
    limits = Limits(config.cpu_seconds, config.seconds, config.memory_mb, config.disk_mb)
    sandbox = detect(config.allow_unsandboxed)
    drawn = _drawn(config, generator(split, seed), sandbox, limits)
    return held_apart(drawn, lambda problem: problem.question, split)


def _drawn(config: Config, rng: random.Random, sandbox: Sandbox, limits: Limits) -> Iterator[PythonProblem]:
    while True:
        question, expression = rng.choice(_TASKS)
        a, b = sorted(rng.sample(range(3, 30), 2))
        n, e = rng.randrange(100, config.largest + 1), rng.randrange(50, 500)
        values = {"n": n, "e": e, "a": a, "b": b, "d": rng.randrange(1, 10)}
        yield PythonProblem(question.format(**values), expression.format(**values), sandbox, limits)
