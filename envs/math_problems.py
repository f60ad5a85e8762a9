r"""Competition mathematics, answers in \boxed{}; MATH or a file of yours (extra: math)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

from envs.answers import boxed, text_of
from envs.checker import checker
from envs.env import Attempts, Env, Message, StepResult
from envs.streams import Row, check_split, hub_rows, read_jsonl, reshuffled, split_rows

HUB = "DigitalLearningGmbH/MATH-lighteval"
TAIL = 500  # characters at the end of a reply without a box in which its answer is looked for


@dataclass
class Config:
    path: str | None = None  # a file of {"problem", "answer" or "solution" with a \boxed{}} a line; null: MATH on the hub
    instruction: str = r"Think step by step and put the final answer in \boxed{}."  # put after each problem
    eval_rows: int = 500  # of a file held out, at most a fifth; the hub's set has a test split


@final
class MathProblem(Env):
    """Reward 1 when the reply's last box, or the last expression of one without, equals the answer mathematically.

    Metric `score_error`: the comparison came to no end or failed; reward 0.
    """

    def __init__(self, prompt: str, answer: str) -> None:
        self.prompt, self.answer = prompt, answer

    def reset(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}]

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        box = boxed(text)
        verdict = equal(self.answer, box) if box is not None else _ask(self.answer, text[-TAIL:])
        correct = verdict or 0.0
        metrics = {"correct": correct, "format": float(box is not None), "score_error": float(verdict is None)}
        return StepResult(reward=correct, metrics=metrics)


def equal(gold: str, answer: str) -> float | None:
    r"""1.0 when two answers, the insides of boxes, are the same; None when that cannot be told in seconds."""
    if not answer or len(answer) > TAIL:
        return 0.0
    return 1.0 if _plain(gold) == _plain(answer) else _ask(gold, f"\\boxed{{{answer}}}")


def _ask(gold: str, text: str) -> float | None:
    return checker("math").ask(f"\\boxed{{{gold}}}", text)


def _plain(answer: str) -> str:
    """The spelling that most equal answers share."""
    answer = re.sub(r"\\(?:left|right|!|,|;|:)|\\?\s+|\$|\.$", "", answer.strip())
    return re.sub(r"\\[dt]frac", r"\\frac", answer)


def problems(config: Config, split: str, seed: int) -> Iterator[Attempts]:
    check_split(split)
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("env=math needs the package math-verify: `uv sync --extra math`, or `pip install math-verify`")
    if config.path is None:
        rows = hub_rows(HUB, None, "test" if split == "eval" else "train")
    else:
        rows = read_jsonl(config.path, ["problem|question", "answer|solution"])
        rows = split_rows(rows, _question, config.eval_rows, split)
    return reshuffled([_problem(row, config.instruction) for row in rows], split, seed)


def _question(row: Row) -> str:
    return str(row.get("problem") or row.get("question")).strip()


def _problem(row: Row, instruction: str) -> Attempts:
    question, given = _question(row), row.get("answer")
    gold = str(given).strip() if given not in (None, "") else boxed(str(row.get("solution")))
    gold = boxed(gold or "") or gold
    if not gold:
        raise ValueError(f"no answer to {question[:60]!r}: expected one in `answer` or in a \\boxed{{}} of `solution`")
    prompt = f"{question}\n{instruction}" if instruction else question
    return Attempts(partial(MathProblem, prompt, gold), f"\\boxed{{{gold}}}", "math")
