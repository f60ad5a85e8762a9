"""Sums in one reply: 'What is 3 + 8? Reply with just the number.'"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

from envs.answers import final_number, is_number, text_of
from envs.env import Attempts, Env, Message, StepResult
from envs.expressions import evaluate
from envs.streams import check_split, generator, held_apart


@dataclass
class Config:
    operations: str = "+"  # any of + - *, one drawn for each gap between terms
    digits: int = 1  # of the largest term; 1: what a model of 135M knows and only has to learn to say
    terms: int = 2  # numbers in a sum


@final
class Arithmetic(Env):
    """Reward 1 when the last number of the reply is the answer; words around it do not matter."""

    def __init__(self, expression: str, answer: int) -> None:
        self.expression, self.answer = expression, answer

    def reset(self) -> list[Message]:
        return [{"role": "user", "content": f"What is {self.expression}? Reply with just the number."}]

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        correct = float(final_number(text) == self.answer)
        return StepResult(reward=correct, metrics={"correct": correct, "format": float(is_number(text))})


def problems(config: Config, split: str, seed: int) -> Iterator[Attempts]:
    check_split(split)
    if not config.operations or set(config.operations) - set("+-*"):
        raise ValueError(f"env.operations={config.operations!r}: expected some of + - *, e.g. '+-'")
    if not 1 <= config.digits <= 9 or not 2 <= config.terms <= 9:
        raise ValueError(f"env.digits={config.digits} env.terms={config.terms}: expected 1 to 9 digits and 2 to 9 terms")
    drawn = _drawn(config, generator(split, seed))
    return map(_problem, held_apart(drawn, _unordered, split, label=" ".join))


def _drawn(config: Config, rng: random.Random) -> Iterator[list[str]]:
    """Terms and operations in turns: ["37", "+", "48"]."""
    while True:
        words = [str(rng.randrange(10**config.digits))]
        for _ in range(config.terms - 1):
            words += [rng.choice(config.operations), str(rng.randrange(10**config.digits))]
        yield words


def _unordered(words: list[str]) -> str:
    """3 + 8 and 8 + 3 are one problem: neither is held out alone."""
    terms, operations = words[::2], words[1::2]
    return " ".join(sorted(terms) + operations) if set(operations) in ({"+"}, {"*"}) else " ".join(words)


def _problem(words: list[str]) -> Attempts:
    expression = " ".join(words)
    answer = int(evaluate(expression))
    return Attempts(partial(Arithmetic, expression, answer), str(answer), "arithmetic")
