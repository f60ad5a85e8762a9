"""Numbers of groups of rollouts: env/*, group/* and sampling/* of a step, and those of an evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from cookbook.rollouts import Group
from cookbook.trajectories import Trajectory, extension_rate

GOOD = 0.5  # a group that agrees is a good one above this mean of `correct`, or of the reward where nothing is correct
SAME = 1e-9  # rewards that differ by less are sums of the same parts in another order


def step_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Of all groups that were sampled, whatever is trained on afterwards."""
    trajectories = _trajectories(groups)
    turns = [turn for trajectory in trajectories for turn in trajectory.transitions]
    logprobs = [logprob for turn in turns for logprob in turn.logprobs]
    kinds = Counter(kind for group in groups if (kind := kind_of(group)) != "empty")
    metrics = {f"env/{tag}/{name}": value for tag, part in _by_tag(groups) for name, value in env_metrics(part).items()}
    metrics |= {f"group/frac_{kind}": kinds[kind] / max(1, kinds.total()) for kind in ("mixed", "all_good", "all_bad")}
    metrics |= end_metrics(groups)
    if turns:
        metrics["sampling/tokens_per_turn"] = len(logprobs) / len(turns)
        metrics["sampling/entropy"] = -_mean(logprobs)  # an estimate from the sampled tokens, in nats
        metrics["sampling/truncated_frac"] = _mean(turn.ended == "length" for turn in turns)
        metrics["sampling/extension_rate"] = extension_rate(trajectories)
    return metrics


def eval_metrics(groups: Sequence[Group], name: str) -> dict[str, float]:
    """<name>/reward, /correct, /pass@k ..., where there are several tags <name>/<tag>/reward ..., and <name>/errors/<type>."""
    metrics, parts = {}, _by_tag(groups)
    for tag, part in parts if len(parts) > 2 else parts[:1]:
        where = name if tag == "all" else f"{name}/{tag}"
        metrics |= {f"{where}/{key}": value for key, value in (env_metrics(part) | pass_metrics(part)).items()}
    return metrics | {f"{name}/errors/{kind}": float(count) for kind, count in _errors(groups).items()}


def env_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the trajectories that have a metric; one that a limit ended is not correct."""
    trajectories = _trajectories(groups)
    if not trajectories:
        return {}
    metrics = {"reward": _mean(t.reward for t in trajectories)}
    names = dict.fromkeys(name for t in trajectories for name in t.metrics)
    if "correct" in names:
        metrics["correct"] = _mean(t.metrics.get("correct", 0.0) for t in trajectories)
    for name in names:
        if name not in metrics:
            metrics[name] = _mean(t.metrics[name] for t in trajectories if name in t.metrics)
    return metrics | {"turns": _mean(len(t.transitions) for t in trajectories)}


def end_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How many rollouts an error (env/errors/<type>) or a limit (env/limits/<which>) ended."""
    limits = Counter(t.ended for t in _tried(groups) if t.ended not in ("done", "error"))
    counts = {f"env/errors/{kind}": float(count) for kind, count in _errors(groups).items()}
    return counts | {f"env/limits/{limit}": float(count) for limit, count in limits.items()}


def pass_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """pass@2, @4, ... up to the attempts that every problem had; nothing where no attempt says whether it is correct."""
    correct_PG = [[t.metrics.get("correct", 0.0) > 0 for t in group.trajectories] for group in groups if group.trajectories]
    if not any("correct" in t.metrics for t in _trajectories(groups)):
        return {}
    most = min(len(correct_G) for correct_G in correct_PG)
    sizes = {2**power for power in range(1, most.bit_length())} | ({most} if most > 1 else set())
    return {f"pass@{k}": _mean(pass_at(k, len(c), sum(c)) for c in correct_PG) for k in sorted(sizes)}


def pass_at(k: int, num_attempts: int, num_correct: int) -> float:
    """The chance that k of the attempts, drawn without replacement, hold a correct one (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(num_attempts - num_correct, k) / math.comb(num_attempts, k)


def kind_of(group: Group) -> Literal["mixed", "all_good", "all_bad", "empty"]:
    """Whether the attempts of a group differ in their reward; those that agree teach nothing."""
    rewards = [trajectory.reward for trajectory in group.trajectories]
    if not rewards:
        return "empty"
    if max(rewards) - min(rewards) > SAME:
        return "mixed"
    return "all_good" if _mean(t.metrics.get("correct", t.reward) for t in group.trajectories) > GOOD else "all_bad"


def _by_tag(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    tags = sorted({group.tag for group in groups if group.tag})
    return [("all", list(groups)), *((tag, [group for group in groups if group.tag == tag]) for tag in tags)]


def _errors(groups: Sequence[Group]) -> Counter[str]:
    return Counter(kind for t in _tried(groups) if (kind := t.error_type))


def _tried(groups: Sequence[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in (*group.trajectories, *group.dropped)]


def _trajectories(groups: Sequence[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
