"""What a rollout leaves behind, and the data that its sampled tokens become. No token is ever encoded again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from core import Datum, ModelInput
from envs.env import Message

Ended: TypeAlias = Literal["done", "turns", "tokens", "context", "tool_calls", "seconds", "error"]


@dataclass(frozen=True)
class Transition:
    """One turn: what the policy saw, what it wrote, what that earned. `logprobs[i]` belongs to tokens[i]."""

    observation: ModelInput
    tokens: list[int]
    logprobs: list[float]
    ended: Literal["stop", "length", "malformed"]
    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Trajectory:
    """One attempt of the policy, from reset to its end. `metrics` has the newest value of each of its steps' metrics."""

    attempt: int = 0  # its place among the envs of its problem
    transitions: list[Transition] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)  # the whole conversation; replies carry no tokens here
    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    ended: Ended = "done"
    advantage: float | None = None  # the recipe's; None: not trained on
    error: str | None = None  # "KeyError: 'x' (my_env.py:12)"
    limit: str | None = None  # that ended it, with its numbers: "limits.context=1024, the prompt has 3,012 tokens"
    rendered: list[Message] = field(default_factory=list)  # `messages` as its prompts have them; replies carry their tokens
    tools: list[dict[str, Any]] | None = None  # schemas that its prompts tell of; None: none, or the messages do

    @property
    def error_type(self) -> str | None:
        return self.error.partition(":")[0].partition(" ")[0] if self.error else None

    @property
    def failure(self) -> str | None:
        """Why nothing came of it: its error, or the limit that ended it while it had no reward."""
        return self.error or (None if self.reward else self.limit)

    @property
    def truncated(self) -> bool:
        """A reply was cut before its end."""
        return any(transition.ended == "length" for transition in self.transitions)


def data_of(trajectory: Trajectory, advantage: float) -> list[Datum]:
    """One datum for turns that extend each other token for token, and a new one where a prompt rewrites the past.

    Inputs of the RL losses, shifted so that position i speaks of token i + 1: `weights` are 1, `advantages` are
    `advantage` and `logprobs` those of sampling where that token was sampled; elsewhere all three are 0.
    """
    import torch

    data = []
    for run in merged(trajectory.transitions):
        sampled = torch.tensor(run.sampled[1:], dtype=torch.float32)
        inputs = {
            "target_tokens": torch.tensor(run.tokens[1:], dtype=torch.int64),
            "weights": sampled,
            "logprobs": torch.tensor(run.logprobs[1:], dtype=torch.float32),
            "advantages": advantage * sampled,
        }
        data.append(Datum(ModelInput.from_ints(run.tokens[:-1]), inputs))
    return data


@dataclass
class MergedTurns:
    """Consecutive turns as one sequence; all lists have its length."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)  # 1.0 for tokens of the policy
    logprobs: list[float] = field(default_factory=list)  # 0.0 for the others

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        self.tokens += tokens
        self.sampled += [0.0 if logprobs is None else 1.0] * len(tokens)
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs


def merged(transitions: Sequence[Transition]) -> Iterator[MergedTurns]:
    run = MergedTurns()
    for transition in transitions:
        prompt = transition.observation.to_ints()
        if run.tokens and prompt[: len(run.tokens)] != run.tokens:
            yield run
            run = MergedTurns()
        run.add(prompt[len(run.tokens) :])
        run.add(transition.tokens, transition.logprobs)
    if run.tokens:
        yield run


def extension_rate(trajectories: Sequence[Trajectory]) -> float:
    """The share of turns after the first whose prompt extends the turn before; 1 where there are none."""
    later = sum(max(0, len(trajectory.transitions) - 1) for trajectory in trajectories)
    breaks = sum(max(0, len(list(merged(trajectory.transitions))) - 1) for trajectory in trajectories)
    return 1 - breaks / later if later else 1.0
