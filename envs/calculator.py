"""Sums too large to do in one's head, with a calculator as a tool."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

from envs.answers import final_number, is_number, text_of
from envs.env import Env, Message, Problem, StepResult
from envs.expressions import evaluate
from envs.streams import check_split, generator, held_apart
from envs.tools import ToolError

INSTRUCTION = "Use the tool `calculate`, then answer with the number only."

# {a}, {b}, {c} have as many digits as the config says; {d} is below the product of {a} and {b}
_BARE = (("What is {a} * {b}?", "{a} * {b}"), ("What is {a} * {b} + {c}?", "{a} * {b} + {c}"))
_STORIES = (
    ("A warehouse has {a} shelves with {b} boxes each. How many boxes are there?", "{a} * {b}"),
    ("A ticket costs {a} dollars and {b} tickets were sold. How many dollars is that?", "{a} * {b}"),
    ("A farm packs {a} crates of {b} apples and has {c} apples left. How many apples had it?", "{a} * {b} + {c}"),
    ("Each of {a} trucks carries {b} bricks; a house takes {d} of them. How many bricks remain?", "{a} * {b} - {d}"),
    ("A press printed {a} pages a minute for {b} minutes, then {c} more. How many pages is that?", "{a} * {b} + {c}"),
)


@dataclass
class Config:
    digits: int = 3  # of the factors
    stories: float = 0.5  # share of problems told in a sentence or two, the others are bare: 'What is 347 * 829?'
    examples: int = 0  # worked ones before the question, for models that do not call tools by themselves


@final
class Calculation(Env):
    """Reward 1 when the reply without a call ends on the answer; `calculated` tells whether the tool was used."""

    def __init__(self, question: str, answer: Fraction, worked: Sequence[CalculationProblem] = ()) -> None:
        self.question, self.answer, self.worked = question, answer, worked
        self.calculated = False
        self.tools = [self.calculate]

    def reset(self) -> list[Message]:
        shown = [message for problem in self.worked for message in problem.worked_out()]
        return [*shown, {"role": "user", "content": f"{self.question} {INSTRUCTION}"}]

    def calculate(self, expression: str) -> str:
        """Work out an arithmetic expression.

        Args:
            expression: Numbers, + - * / // % ** and brackets, such as (12 + 3) * 4
        """
        try:
            value = evaluate(expression)
            text = str(value) if value.denominator == 1 else f"{float(value):.12g}"
        except (ValueError, OverflowError) as error:
            raise ToolError("failed", f"calculate: {error}") from None
        self.calculated = True
        return text

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        correct = float(final_number(text) == self.answer)
        metrics = {"correct": correct, "format": float(is_number(text)), "calculated": float(self.calculated)}
        return StepResult(reward=correct, metrics=metrics)


@final
@dataclass(frozen=True)
class CalculationProblem(Problem):
    question: str
    expression: str
    worked: tuple[CalculationProblem, ...] = ()
    tag: str = "calculator"

    def make(self, group_size: int) -> list[Env]:
        return [Calculation(self.question, evaluate(self.expression), self.worked) for _ in range(group_size)]

    def worked_out(self) -> list[Message]:
        """The whole conversation of a perfect policy."""
        asked = {"role": "user", "content": f"{self.question} {INSTRUCTION}"}
        result = {"role": "tool", "name": "calculate", "content": str(evaluate(self.expression))}
        return [asked, self.solve([asked]), result, self.solve([result])]

    def solve(self, messages: Sequence[Message]) -> Message:
        if messages[-1]["role"] == "tool":
            return {"role": "assistant", "content": str(messages[-1]["content"])}
        function = {"name": "calculate", "arguments": {"expression": self.expression}}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "1", "function": function}]}


def problems(config: Config, split: str, seed: int) -> Iterator[CalculationProblem]:
    check_split(split)
    if not 2 <= config.digits <= 12:
        raise ValueError(f"env.digits={config.digits}: expected 2 to 12")
    if not 0 <= config.stories <= 1:
        raise ValueError(f"env.stories={config.stories}: expected a share, 0 to 1")
    if not 0 <= config.examples <= 8:
        raise ValueError(f"env.examples={config.examples}: expected 0 to 8")
    same_for_all = _drawn(config, random.Random("worked examples"))  # a beginning that prompts share is computed once
    worked = tuple(itertools.islice(same_for_all, config.examples))
    return held_apart(_drawn(config, generator(split, seed), worked), lambda problem: problem.question, split)


def _drawn(
    config: Config, rng: random.Random, worked: tuple[CalculationProblem, ...] = ()
) -> Iterator[CalculationProblem]:
    low, high = 10 ** (config.digits - 1), 10**config.digits
    while True:
        question, expression = rng.choice(_STORIES if rng.random() < config.stories else _BARE)
        a, b = rng.randrange(low, high), rng.randrange(low, high)
        values = {"a": a, "b": b, "c": rng.randrange(low, high), "d": rng.randrange(low, a * b)}
        yield CalculationProblem(question.format(**values), expression.format(**values), worked)
