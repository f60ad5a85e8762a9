"""What an environment is: messages out, replies in, rewards out. Never a token, a tensor or a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

Message: TypeAlias = dict[str, Any]  # {"role", "content"}, replies also "tool_calls" and "reasoning_content"


@dataclass
class StepResult:
    """What came of a reply: its reward, and what the policy sees next unless the attempt is done."""

    reward: float = 0.0
    done: bool = True
    messages: list[Message] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)  # numbers of this attempt: {"correct": 1.0, "format": 1.0}


class Env(ABC):
    """One attempt at one problem; single use. `reset` and `step` may be coroutine functions.

    `tools` are typed functions that the policy may call; whoever drives the rollout parses, validates and runs calls, so
    that `step` sees only replies without any.
    """

    tools: Sequence[Callable[..., Any]] = ()

    @abstractmethod
    def reset(self) -> list[Message] | Awaitable[list[Message]]:
        """The first messages."""

    @abstractmethod
    def step(self, reply: Message) -> StepResult | Awaitable[StepResult]:
        """Answer a reply of the policy."""

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Called once at the end, whatever happened: end processes, remove files."""


class Problem(ABC):
    """Something to attempt. `tag` groups metrics (env/<tag>/...)."""

    tag: str = ""
    num_seats: int = 1  # of one game; each is an attempt

    @abstractmethod
    def make(self, group_size: int) -> list[Env]:
        """Fresh environments: `group_size` attempts, or the seats of as many games as that makes."""

    def group_rewards(self, trajectories: Sequence[Any]) -> list[float] | None:
        """Rewards added when a group has ended, one per env of `make`; None: nothing to add."""
        return None

    def solve(self, messages: Sequence[Message]) -> Message | None:
        """A perfect policy's next reply to the conversation so far; None where none is known. For `cook envs check`."""
        return None


@final
@dataclass(frozen=True)
class Attempts(Problem):
    """The usual problem: every attempt is a new Env from `new`; `answer` is a reply of reward 1."""

    new: Callable[[], Env]
    answer: str | None = None
    tag: str = ""

    def make(self, group_size: int) -> list[Env]:
        return [self.new() for _ in range(group_size)]

    def solve(self, messages: Sequence[Message]) -> Message | None:
        return None if self.answer is None else {"role": "assistant", "content": self.answer}
