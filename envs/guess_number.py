"""Guess a number in several turns: each guess is answered with 'higher' or 'lower'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

from envs.answers import is_number, numbers, text_of
from envs.env import Env, Message, Problem, StepResult
from envs.streams import check_split, reshuffled, split_rows

HIGHER, LOWER = "higher", "lower"


@dataclass
class Config:
    low: int = 1  # the smallest secret
    high: int = 20  # the largest
    max_turns: int | None = None  # guesses; null: twice what halving needs at worst


@final
class GuessNumber(Env):
    """Reward 1 for the secret within the guesses that halving needs at worst, less for more, 0 when none are left.

    With `par` such guesses and the secret found at guess n: min(1, par / n).
    """

    def __init__(self, secret: int, low: int, high: int, max_turns: int) -> None:
        self.secret, self.low, self.high, self.max_turns = secret, low, high, max_turns
        self.turns = self.well_formed = 0

    def reset(self) -> list[Message]:
        asked = (
            f"I think of a whole number from {self.low} to {self.high}. Guess it: reply with one number only."
            f" I say {HIGHER} or {LOWER} until you have it. You have {self.max_turns} guesses."
        )
        return [{"role": "user", "content": asked}]

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        self.turns += 1
        self.well_formed += is_number(text)
        guess = next(reversed(list(numbers(text))), None)  # "between 1 and 20 I say 10" means 10
        correct = guess == self.secret
        result = StepResult(reward=min(1.0, par(self.low, self.high) / self.turns) if correct else 0.0)
        result.done = correct or self.turns >= self.max_turns
        result.metrics = {"correct": float(correct), "format": self.well_formed / self.turns}
        if not result.done:
            if guess is None or guess.denominator != 1 or not self.low <= guess <= self.high:
                said = f"reply with one whole number from {self.low} to {self.high}"
            else:
                said = HIGHER if guess < self.secret else LOWER
            result.messages = [{"role": "user", "content": said}]
        return result


@final
@dataclass(frozen=True)
class Secret(Problem):
    new: partial[GuessNumber]
    low: int
    high: int
    tag: str = "guess_number"

    def make(self, group_size: int) -> list[Env]:
        return [self.new() for _ in range(group_size)]

    def solve(self, messages: Sequence[Message]) -> Message:
        """Halve what the answers so far have left."""
        low, high = self.low, self.high
        for message in messages:
            middle = (low + high) // 2
            if message["content"] == HIGHER:
                low = middle + 1
            elif message["content"] == LOWER:
                high = middle - 1
        return {"role": "assistant", "content": str((low + high) // 2)}


def par(low: int, high: int) -> int:
    """Guesses that halving needs at worst."""
    return (high - low + 1).bit_length()


def problems(config: Config, split: str, seed: int) -> Iterator[Secret]:
    check_split(split)
    if config.high - config.low < 4:
        raise ValueError(f"env.low={config.low} env.high={config.high}: expected five numbers or more to choose from")
    if config.high - config.low >= 10**6:
        raise ValueError(f"env.low={config.low} env.high={config.high}: expected a million numbers at most")
    max_turns = 2 * par(config.low, config.high) if config.max_turns is None else config.max_turns
    if max_turns < 1:
        raise ValueError(f"env.max_turns={max_turns}: expected at least 1 guess")
    every = range(config.low, config.high + 1)
    secrets = reshuffled(split_rows(every, str, len(every), split), split, seed)
    return (Secret(partial(GuessNumber, n, config.low, config.high, max_turns), config.low, config.high) for n in secrets)
