"""How far a rollout may go."""

from __future__ import annotations

from dataclasses import dataclass

from cookbook.errors import UsageError
from cookbook.keys import did_you_mean

ON_ERROR = ("drop", "zero")


@dataclass
class Limits:
    """Where a rollout ends that its env does not end; it keeps the rewards that it has by then."""

    turns: int = 16  # replies
    tokens: int | None = None  # sampled, all replies together; null: as many as the context holds
    context: int | None = None  # tokens, a prompt and its reply together; null: the model's
    tool_calls: int = 32
    seconds: float = 300.0  # of the env and its tools; sampling takes the time it takes
    on_error: str = "drop"  # drop | zero (reward): what becomes of a rollout whose env fails, or never answers


def check_limits(limits: Limits) -> None:
    """UsageError for those that no rollout could keep."""
    if limits.on_error not in ON_ERROR:
        meant = did_you_mean(limits.on_error, ON_ERROR)
        raise UsageError(f"limits.on_error={limits.on_error}: expected {' or '.join(ON_ERROR)}{meant}")
    for key, least in (("turns", 1), ("tokens", 1), ("context", 1), ("tool_calls", 0), ("seconds", 0.001)):
        if (value := getattr(limits, key)) is not None and not value >= least:
            raise UsageError(f"limits.{key}={value}: expected at least {least}")
