"""RL on prompts of one's own: rows become problems, scored by functions of TRL's shape and by a judge.

    def score(completions, answer, **columns) -> list[float]: ...

`completions` are texts where the row's prompt is a text (which is put to the model as a user message), and lists with one
assistant message where it is a list of messages, as in TRL; `prompts` and the other columns come along by name, and a
function gets those it asks for. Each reply is scored by itself: all lists have one element. None: nothing to say here.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from cookbook.config import JudgeConfig
from cookbook.env_drive import settled
from cookbook.errors import UsageError
from cookbook.judge import Judge, conversation_text
from cookbook.keys import did_you_mean
from envs.env import Env, Message, StepResult
from envs.source_file import load_file

Scored: TypeAlias = float | None


class RewardError(ValueError):
    """A reward function failed on this reply; one line that says how."""


@dataclass(frozen=True)
class Prompt:
    """A row: what is asked, in messages, and the other columns."""

    label: str  # of the row: "prompts.jsonl:12"
    messages: tuple[Message, ...]
    columns: Mapping[str, object]
    is_text: bool  # the row's prompt was a text, not messages
    tag: str = ""  # its source in a mixture


@dataclass(frozen=True)
class Reward:
    """One part of the reward: its name in the metrics (reward/<name>), its weight, and how it scores a reply."""

    name: str
    weight: float
    score: Callable[[Prompt, Message], Awaitable[Scored]]
    wants: tuple[str, ...] = field(default=())  # columns it cannot do without


class PromptEnv(Env):
    """One reply to one prompt; its reward is the weighted sum of what the reward functions say, 0 where there are none."""

    def __init__(self, prompt: Prompt, rewards: Sequence[Reward]) -> None:
        self.prompt, self.rewards = prompt, rewards

    def reset(self) -> list[Message]:
        return [dict(message) for message in self.prompt.messages]

    async def step(self, reply: Message) -> StepResult:
        scores = await asyncio.gather(*(reward.score(self.prompt, reply) for reward in self.rewards))
        said = [(reward, score) for reward, score in zip(self.rewards, scores, strict=True) if score is not None]
        if self.rewards and not said:
            names = ", ".join(reward.name for reward in self.rewards)
            raise RewardError(f"{self.prompt.label}: no reward for this reply; None came from {names}")
        total = sum(reward.weight * score for reward, score in said)
        return StepResult(total, metrics={f"reward/{reward.name}": score for reward, score in said})


def load_rewards(reward: str | None, rewards: Mapping[str, float], judge: JudgeConfig) -> list[Reward]:
    """The parts of the reward, in order: `reward` of weight 1, then `rewards` with theirs. UsageError for none."""
    if reward is not None and reward in rewards:
        raise UsageError(f"reward={reward} stands in rewards too; give it once")
    weights = {**({reward: 1.0} if reward is not None else {}), **rewards}
    if not weights:
        raise UsageError("prompts of your own want a reward: reward=my.py:score, rewards.my.py:score=0.5, or reward=judge")
    if "judge" not in weights and judge.url is not None:
        raise UsageError("judge.url is set, but no reward asks the judge: add reward=judge or rewards.judge=0.5")
    if bad := next((spec for spec, weight in weights.items() if not math.isfinite(weight)), None):
        raise UsageError(f"rewards.{bad}={weights[bad]}: a weight is a finite number")
    functions = {spec: _load_function(spec) for spec in weights if spec != "judge"}
    names = [function.__name__ for function in functions.values()]
    parts = []
    for spec, weight in weights.items():
        if spec == "judge":
            parts.append(judge_reward(Judge(judge), weight))
        else:
            name = functions[spec].__name__
            parts.append(function_reward(functions[spec], spec if names.count(name) > 1 else name, weight, spec))
    return parts


def judge_reward(judge: Judge, weight: float = 1.0) -> Reward:
    async def score(prompt: Prompt, reply: Message) -> Scored:
        return await judge.score(conversation_text(prompt.messages), str(reply.get("content") or ""), prompt.columns)

    return Reward("judge", weight, score)


def function_reward(function: Callable[..., Any], name: str, weight: float = 1.0, spec: str | None = None) -> Reward:
    """A reward from a function f(completions, **columns) -> list[float], sync or async."""
    spec = spec or name
    takes, wants = _parameters(function, spec)

    async def score(prompt: Prompt, reply: Message) -> Scored:
        offered = {name: [value] for name, value in prompt.columns.items()} | _asked_and_said(prompt, reply)
        given = offered if takes is None else {name: value for name, value in offered.items() if name in takes}
        try:
            scores = await settled(function, **given)
        except (Exception, SystemExit) as error:
            raise RewardError(f"reward {spec} failed at {prompt.label}: {_where(error, function)}") from error
        return _checked_score(scores, spec, prompt.label)

    return Reward(name, weight, score, wants)


def _asked_and_said(prompt: Prompt, reply: Message) -> dict[str, list[object]]:
    said = {key: value for key, value in reply.items() if key != "tokens"}
    if not prompt.is_text:
        return {"prompts": [[dict(message) for message in prompt.messages]], "completions": [[said]]}
    return {"prompts": [prompt.messages[0]["content"]], "completions": [str(reply.get("content") or "")]}


def _parameters(function: Callable[..., Any], spec: str) -> tuple[set[str] | None, tuple[str, ...]]:
    """(names it takes, or None for any; columns it cannot do without)."""
    parameters = inspect.signature(function).parameters
    if "completions" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise UsageError(f"reward {spec}: a reward function takes `completions`, as in def score(completions, **columns)")
    plain = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    wants = tuple(n for n, p in plain.items() if p.default is p.empty and n not in ("completions", "prompts"))
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return None if takes_any else set(plain), wants


def _checked_score(scores: object, spec: str, label: str) -> Scored:
    tolist = getattr(scores, "tolist", None)  # of an array or a tensor
    scores = tolist() if callable(tolist) else scores
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise RewardError(f"reward {spec} returned {type(scores).__name__} at {label}; expected a list of one number")
    if len(scores) != 1:
        raise RewardError(f"reward {spec} returned {len(scores)} rewards for 1 completion at {label}")
    if scores[0] is None:
        return None
    try:
        score = float(scores[0])
    except (TypeError, ValueError):
        raise RewardError(f"reward {spec} returned {scores[0]!r} at {label}; expected a number") from None
    if not math.isfinite(score):
        raise RewardError(f"reward {spec} returned {score} at {label}; expected a finite number")
    return score


def _where(error: BaseException, function: Callable[..., Any]) -> str:
    """ "KeyError: 'x' (my.py:12)", the line being the deepest one in the function's own file."""
    code = getattr(function, "__code__", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if code and frame.filename == code.co_filename]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if said else ''}{said[:300]}{place}"


def _load_function(spec: str) -> Callable[..., Any]:
    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise UsageError(f"reward {spec}: expected file.py:function, module:function, or judge")
    try:
        module = _load_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except UsageError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise UsageError(f"reward {spec}: {where} cannot be imported: {type(error).__name__}: {said}") from error
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"reward {spec}: no function {name} in {where}{did_you_mean(name, functions)}")
    if not hasattr(function, "__name__"):
        raise UsageError(f"reward {spec}: {name} is {type(function).__name__}, not a function")
    return function


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = [f"{found}" for found in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UsageError(f"reward: no such file {path}{did_you_mean(str(path), near)}")
    return load_file(path, "reward")
