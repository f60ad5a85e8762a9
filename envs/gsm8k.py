"""Grade-school word problems, reasoned through to a number; GSM8K or a file of yours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import final

from envs.answers import final_number, text_of
from envs.env import Attempts, Env, Message, StepResult
from envs.streams import Row, check_split, hub_rows, read_jsonl, reshuffled, split_rows

HUB, HUB_CONFIG = "openai/gsm8k", "main"
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # <<48/2=24>>, for a calculator of the authors'


@dataclass
class Config:
    path: str | None = None  # a file of {"question": ..., "answer": "... #### 42"} a line; null: openai/gsm8k on the hub
    instruction: str = "Think step by step and end with a line '#### ' and the number."  # put after each question
    eval_rows: int = 500  # of a file held out, at most a fifth; the hub's set has a test split


@final
class WordProblem(Env):
    """Reward 1 when the number that the reply ends on is the answer, whatever its form (#### 42, boxed, $42.00)."""

    def __init__(self, prompt: str, answer: Fraction) -> None:
        self.prompt, self.answer = prompt, answer

    def reset(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}]

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        correct = float(final_number(text) == self.answer)
        return StepResult(reward=correct, metrics={"correct": correct, "format": float("####" in text)})


def problems(config: Config, split: str, seed: int) -> Iterator[Attempts]:
    check_split(split)
    if config.path is None:
        rows = hub_rows(HUB, HUB_CONFIG, "test" if split == "eval" else "train")
    else:
        rows = read_jsonl(config.path, ["question", "answer"])
        rows = split_rows(rows, lambda row: str(row["question"]), config.eval_rows, split)
    return reshuffled([_problem(row, config.instruction) for row in rows], split, seed)


def _problem(row: Row, instruction: str) -> Attempts:
    question, solution = str(row["question"]).strip(), _ANNOTATION.sub("", str(row["answer"])).strip()
    answer = final_number(solution)
    if answer is None:
        raise ValueError(f"the answer {solution[-60:]!r} to {question[:60]!r} ends on no number: expected '... #### 42'")
    prompt = f"{question}\n{instruction}" if instruction else question
    return Attempts(partial(WordProblem, prompt, answer), solution, "gsm8k")
