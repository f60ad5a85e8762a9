"""Whether an environment keeps its word: solutions score 1, junk does not, a seed repeats itself, eval is not in train."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cookbook.env_drive import Outcome, Policy, attempts, opening, seats
from cookbook.environments import problem_stream
from cookbook.messages import template_messages
from envs.env import Message, Problem

JUNK = ("", "I do not know.", "Yes.", "asdf qwer zxcv")
JUNK_CEILING = 0.3  # mean reward; a guess may be right now and then
PROBLEM_SECONDS = 60.0


@dataclass(frozen=True)
class Verdict:
    """`passed` None: there was nothing to check."""

    what: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Trial:
    """What the solution and junk got at one problem. `failure`: why there is no such number."""

    start: list[Message]
    solved: Outcome | None  # None: no solution is known
    junk: Outcome | None
    failure: str = ""

    @property
    def identity(self) -> str:
        """What makes the problem this one; the start alone may say nothing, as in guessing a number."""
        return repr(self.solved.messages if self.solved else self.start)


def check_env(env: Mapping[str, Any], count: int, seed: int) -> list[Verdict]:
    """Verdicts over `count` problems of each split."""
    train, held_out = (list(islice(problem_stream(env, split, seed), count)) for split in ("train", "eval"))
    return check_problems(train, held_out, again=list(islice(problem_stream(env, "train", seed), count)))


def check_problems(train: Sequence[Problem], held_out: Sequence[Problem], again: Sequence[Problem]) -> list[Verdict]:
    """`again`: the problems of `train`, made a second time."""
    trials = [asyncio.run(try_problem(problem, JUNK[i % len(JUNK)])) for i, problem in enumerate([*train, *held_out])]
    trained = trials[: len(train)]
    return [
        _messages(trials),
        _solutions(trials),
        _junk(trials),
        _repeats(trained, [asyncio.run(opening(problem))[0] for problem in again]),
        _apart(trained, trials[len(train) :]),
    ]


async def try_problem(problem: Problem, junk: str) -> Trial:
    """The solution at one seat and junk at the others, for each seat in turn: in a game junk loses to the solution."""
    start: list[Message] = []
    try:
        start = (await opening(problem))[0]
        if problem.solve(start) is None:
            outcomes = await _played(problem, [_junk_policy(junk)] * len(seats(problem)))
            return Trial(start, None, min(outcomes, key=lambda outcome: outcome.reward))
        num_seats = len(seats(problem))
        if num_seats == 1:
            solved, nonsense = await _played(problem, [_solver(problem)]), await _played(problem, [_junk_policy(junk)])
            return Trial(start, solved[0], nonsense[0])
        solved, nonsense = [], []
        for seat in range(num_seats):
            policies = [_solver(problem) if i == seat else _junk_policy(junk) for i in range(num_seats)]
            outcomes = await _played(problem, policies)
            solved.append(outcomes.pop(seat))
            nonsense += outcomes
        by_reward = {"key": lambda outcome: outcome.reward}
        return Trial(start, min(solved, **by_reward), max(nonsense, **by_reward))
    except Exception as error:  # whatever the env does wrong is what this command is there to tell
        inner = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        said = f"no end after {PROBLEM_SECONDS:g} seconds" if isinstance(inner, TimeoutError) else str(inner)
        return Trial(start, None, None, f"{type(inner).__name__}: {' '.join(said.split())}")


async def _played(problem: Problem, policies: Sequence[Policy]) -> list[Outcome]:
    return await attempts(seats(problem), policies, PROBLEM_SECONDS)


def _solver(problem: Problem) -> Policy:
    def reply(messages: list[Message]) -> Message:
        found = problem.solve(messages)
        if found is None:
            raise ValueError(f"solve() gave up after {len(messages)} messages, the last: {_short(messages[-1:])}")
        return found

    return reply


def _junk_policy(text: str) -> Policy:
    return lambda messages: {"role": "assistant", "content": text}


def _messages(trials: Sequence[Trial]) -> Verdict:
    what = "problems begin with messages"
    for trial in trials:
        if trial.failure:
            return Verdict(what, False, trial.failure)
        try:
            template_messages(trial.start)
        except ValueError as error:
            return Verdict(what, False, str(error))
        if not trial.start or trial.start[-1]["role"] == "assistant":
            return Verdict(what, False, f"a reply is to follow {_short(trial.start)}")
    return Verdict(what, True, f"all {len(trials)}, such as {_short(trials[0].start)}")


def _solutions(trials: Sequence[Trial]) -> Verdict:
    what, known = "solutions score 1", [trial for trial in trials if trial.solved]
    if not known:
        failed = [trial.failure for trial in trials if trial.failure]
        return Verdict(what, False if failed else None, failed[0] if failed else "solve() knows none")
    wrong = [trial for trial in known if trial.solved and abs(trial.solved.reward - 1) > 1e-6]
    if not wrong:
        return Verdict(what, True, f"all {len(known)} of {len(trials)} problems")
    first = wrong[0].solved
    assert first is not None
    reply = next((m for m in reversed(first.messages) if m["role"] == "assistant"), {})
    said = f"{_short(wrong[0].start)}, solved by {_short([reply])}"
    return Verdict(what, False, f"{len(wrong)} of {len(known)} do not; the first scored {first.reward:g}: {said}")


def _junk(trials: Sequence[Trial]) -> Verdict:
    rewards = [trial.junk.reward for trial in trials if trial.junk]
    if not rewards:
        return Verdict("junk scores low", False, "no junk reply was scored")
    mean = sum(rewards) / len(rewards)
    return Verdict("junk scores low", mean < JUNK_CEILING, f"mean {mean:.2f}, highest {max(rewards):.2f}")


def _repeats(first: Sequence[Trial], again: Sequence[object]) -> Verdict:
    what = "a seed repeats itself"
    different = [i for i, (one, other) in enumerate(zip(first, again, strict=True)) if one.start != other]
    if different:
        return Verdict(what, False, f"{len(different)} problems came out differently, the first number {different[0]}")
    return Verdict(what, True, f"{len(first)} problems came out the same twice")


def _apart(train: Sequence[Trial], held_out: Sequence[Trial]) -> Verdict:
    what = "eval is not in train"
    trained = {trial.identity for trial in train}
    shared = [trial for trial in held_out if trial.identity in trained]
    if len(train) > 1 and len(trained) == 1:
        return Verdict(what, None, "all problems look alike")
    if shared:
        return Verdict(what, False, f"{len(shared)} of {len(held_out)} are in both: {_short(shared[0].start)}")
    return Verdict(what, True, f"{len(held_out)} eval problems, none among {len(train)} of train")


def _short(messages: Sequence[Message]) -> str:
    last = messages[-1] if messages else {}
    text = " ".join(str(last.get("content") or last.get("tool_calls") or "").split())
    return repr(text if len(text) <= 70 else text[:67] + "...")
