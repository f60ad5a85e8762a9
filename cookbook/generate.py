"""`cook generate`: replies of a trained policy to many prompts, the best of n by a reward, written for `cook sft data=file`.

Problems are taken in pieces. After each piece its rows are on disk and OUT.progress says how far it went, so that the same
command goes on where it was stopped and gives the same file.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook import records
from cookbook.compose import compose, recompose
from cookbook.errors import UsageError
from cookbook.keys import did_you_mean
from cookbook.overrides import key_of, spelt_out
from cookbook.past_policy import PastPolicy, open_policy
from cookbook.rl import limits_of
from cookbook.rollout_log import new_failures, plain
from cookbook.rollouts import Group, Rollouts
from core import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from cookbook.trajectories import Trajectory
    from envs.env import Problem

PIECE = 32  # problems
KEEP = ("best", "all")
COUNTS = ("problems", "rows", "replies", "failed", "reward_sum", "kept_sum")  # of Made, noted in OUT.progress
OF_RL = ("env", "data", "reward", "rewards", "judge", "limits", "temperature", "max_tokens", "seed")  # keys of cook rl


@dataclass
class Config:
    """The words of `cook generate` that are its own."""

    n: int = 8  # replies to each prompt
    keep: str = "best"  # best | all; without a reward only all
    min_reward: float | None = None  # leave out replies below it
    problems: int = 100  # of an env; a file is read to its end
    split: str = "train"  # of an env: train | eval
    to: str = "generated.jsonl"


def generate(target: str, words: Sequence[str], checkpoint: str, console: Console) -> None:
    own, rest = _divided(words)
    out = Path(own.to)
    policy = open_policy(target, checkpoint)
    config = _task(policy, rest)
    has_reward = bool(config.env or config.reward or config.rewards)
    if own.keep == "best" and own.n > 1 and not has_reward:
        raise UsageError("keep=best needs a reward (reward=my.py:score, reward=judge, or an env=...); without: keep=all")
    if own.min_reward is not None and not has_reward:
        raise UsageError("min_reward needs a reward: reward=my.py:score, reward=judge, or an env=...")
    if own.n > 1 and config.temperature == 0:
        raise UsageError(f"n={own.n} replies would all be the same at temperature=0: set n=1, or temperature=1")
    made = Made(out, {"target": policy.name, "words": sorted(words), "adapter": str(policy.adapter)}, has_reward)
    problems = _problems(own, config, console)
    console.print(f"{policy.name}, {policy.model.name}", style="dim", markup=False, highlight=False, soft_wrap=True)
    if made.problems:
        console.print(f"going on after {made.problems} problems", style="dim", highlight=False)
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, stop=policy.renderer.stop)
    runner = Rollouts(policy.renderer, params, limits_of(config, policy.model.name, policy.context))
    known_failures: set[str] = set()
    rest_of = itertools.islice(problems, made.problems, None)
    while piece := list(itertools.islice(rest_of, PIECE)):
        groups = runner.run(piece, policy.sampler, own.n, (config.seed, "cook generate"), first=made.problems)
        made.add(len(piece), groups, [row for group in groups for row in _rows(group, own, has_reward)])
        for line in new_failures(groups, known_failures):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(made.line(), markup=False, highlight=False)
    made.finish(console)


class Made:
    """The file being written, and how far it is."""

    def __init__(self, out: Path, settings: dict[str, Any], has_reward: bool) -> None:
        self.out, self._settings, self._has_reward = out, settings, has_reward
        self._progress = out.with_name(f"{out.name}.progress")
        self.problems = self.rows = self.replies = self.failed = 0
        self.reward_sum = self.kept_sum = 0.0
        self.errors: dict[str, tuple[int, str]] = {}  # type -> how often, and the first one in full
        if self._progress.is_file():
            self._go_on()
        elif out.exists():
            raise UsageError(f"to={out} exists already: name another file, or remove it")
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.touch()
            self._note()

    def _go_on(self) -> None:
        known = json.loads(self._progress.read_text(encoding="utf-8"))
        if known["settings"] != self._settings:
            raise UsageError(
                f"to={self.out} was begun with other words ({' '.join(known['settings']['words'])}) or weights:"
                f" give the same, or another to=; {self._progress} removed and the file too, it begins anew"
            )
        size = self.out.stat().st_size if self.out.exists() else 0
        if size < known["bytes"]:
            raise UsageError(f"{self.out} is shorter than {self._progress.name} says: remove both and begin anew")
        os.truncate(self.out, known["bytes"])  # what was written after the last note
        for key in COUNTS:
            setattr(self, key, known[key])
        self.errors = known.get("errors", {})

    def add(self, num_problems: int, groups: Sequence[Group], rows: Sequence[records.Row]) -> None:
        records.append(self.out, "".join(records.encode(row) + "\n" for row in rows), sync=True)
        self.problems += num_problems
        self.rows += len(rows)
        for group in groups:
            self.replies += len(group.trajectories)
            self.failed += len(group.dropped)
            for trajectory in group.dropped:
                kind, text = str(trajectory.error_type), str(trajectory.error)
                count, first = self.errors.get(kind, (0, text))
                self.errors[kind] = count + 1, first
            self.reward_sum += sum(trajectory.reward for trajectory in group.trajectories)
        self.kept_sum += sum(float(row.get("reward", 0.0)) for row in rows)  # type: ignore[arg-type]
        self._note()

    def _note(self) -> None:
        state = {key: getattr(self, key) for key in COUNTS}
        state |= {"bytes": self.out.stat().st_size, "settings": self._settings, "errors": self.errors}
        records.replace(self._progress, json.dumps(state))

    def line(self) -> str:
        failed = f", {self.failed} failed ({self._commonest()[0]})" if self.failed else ""
        rewards = ""
        if self._has_reward and self.replies:
            rewards = f"; mean reward {self.reward_sum / self.replies:.3f}"
            rewards += f", of those kept {self.kept_sum / self.rows:.3f}" if self.rows else ""
        return f"{self.problems} problems, {self.replies} replies{failed}, {self.rows} rows kept{rewards}"

    def _commonest(self) -> tuple[str, str]:
        """ "RewardError 10 times" and the first of them in full."""
        kind, (count, first) = max(self.errors.items(), key=lambda item: item[1][0], default=("unknown", (self.failed, "")))
        return f"{kind} {count} times", first

    def finish(self, console: Console) -> None:
        self._progress.unlink()
        if not self.rows:
            self.out.unlink()
            times, first = self._commonest()
            why = f" ({times}, the first: {first})" if self.failed else ""
            raise UsageError(
                f"no row was kept of {self.problems} problems: {self.failed} of the attempts failed{why},"
                " the others were empty, cut at max_tokens, or scored below min_reward"
            )
        console.print(f"{self.out}: cook sft data=file data.path={self.out}", markup=False, highlight=False, soft_wrap=True)


def _divided(words: Sequence[str]) -> tuple[Config, list[str]]:
    """Our own words as a Config, and those for `cook rl`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    names = [field.name for field in fields(Config)]
    own, rest = [], []
    for word in words:
        key = key_of(word).partition(".")[0]
        if "=" not in word or key not in (*names, *OF_RL):
            meant = did_you_mean(key, (*names, *OF_RL))
            raise UsageError(f"{word}: cook generate takes {', '.join((*names, *OF_RL))} as key=value{meant}")
        (own if key in names else rest).append(word)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.from_dotlist(own)))
    except OmegaConfBaseException as error:
        raise UsageError(str(error).splitlines()[0]) from error
    assert isinstance(config, Config)
    for key, known in (("keep", KEEP), ("split", ("train", "eval"))):
        if (value := getattr(config, key)) not in known:
            raise UsageError(f"{key}={value}: expected {' or '.join(known)}{did_you_mean(value, known)}")
    for key in ("n", "problems"):
        if getattr(config, key) < 1:
            raise UsageError(f"{key}={getattr(config, key)}: expected at least 1")
    return config, rest


def _task(policy: PastPolicy, words: list[str]) -> Any:
    """A Config of `cook rl` with what the words choose, over that of an RL run."""
    chosen = {key_of(word).partition(".")[0] for word in spelt_out(words)}
    if policy.run is not None and policy.run.recipe.startswith("rl/"):
        return recompose(policy.run.recipe, policy.run.config, words).config
    if not chosen & {"env", "data"}:
        raise UsageError(f"{policy.name}: no prompts; say data=prompts.jsonl, or env=arithmetic (`cook envs` lists them)")
    return compose("rl", words).config


def _problems(own: Config, config: Any, console: Console) -> Iterator[Problem]:
    from cookbook.environments import problem_stream
    from cookbook.prompts import every_prompt

    if config.env:
        return itertools.islice(problem_stream(config.env, own.split, config.seed), own.problems)
    return iter(every_prompt(config, partial(console.print, markup=False, highlight=False, soft_wrap=True)))


def _rows(group: Group, own: Config, has_reward: bool) -> Iterator[records.Row]:
    """Those kept of a problem's replies. What cannot be trained on, a reply that is cut or empty, is never kept."""
    usable = [trajectory for trajectory in group.trajectories if not trajectory.truncated and _says_something(trajectory)]
    kept = usable if own.keep == "all" else sorted(usable, key=lambda one: -one.reward)[:1]  # the first of equal ones
    return (_row(group, one, has_reward) for one in kept if own.min_reward is None or one.reward >= own.min_reward)


def _says_something(trajectory: Trajectory) -> bool:
    replies = [message for message in trajectory.messages if message["role"] == "assistant"]
    return bool(replies) and all(message.get("content") or message.get("tool_calls") for message in replies)


def _row(group: Group, trajectory: Trajectory, has_reward: bool) -> records.Row:
    """What the policy saw and said: trained on, it renders the same prompts."""
    messages = [plain({key: value for key, value in message.items() if key != "tokens"}) for message in trajectory.rendered]
    return {
        "messages": messages, **({"tools": trajectory.tools} if trajectory.tools else {}),
        **({"reward": trajectory.reward} if has_reward else {}),
        "problem": group.problem, "attempt": trajectory.attempt,
        **({"metrics": trajectory.metrics} if trajectory.metrics else {}), **({"tag": group.tag} if group.tag else {}),
    }  # fmt: skip
