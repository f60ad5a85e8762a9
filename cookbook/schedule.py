"""The learning rate: a default peak for a model, and its course over the steps."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Literal

from cookbook.config import OptimConfig
from cookbook.errors import UsageError

if TYPE_CHECKING:
    from core import AdamParams, ModelInfo

SCHEDULES = ("constant", "linear", "cosine")
RECIPE_FACTORS = {"sft": 1.0, "rl": 0.15, "dpo": 0.05}


def learning_rate_at(step: int, total_steps: int, peak: float, optim: OptimConfig) -> float:
    """Learning rate of step 0 ... total_steps - 1: warm-up to `peak`, then down to peak * min_ratio at `total_steps`.

    The warm-up starts at peak / warmup_steps, not at 0: a first step that moves nothing would be wasted.
    """
    _check_schedule(optim)
    warmup_steps = min(optim.warmup_steps, total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if optim.schedule == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    height = 1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (optim.min_ratio + (1 - optim.min_ratio) * height)


def default_learning_rate(hidden_size: int, model_type: str, recipe: Literal["sft", "rl", "dpo"]) -> float:
    """Peak rate for a LoRA on a model of this width: 5e-5 * 10 * (2000 / hidden_size)^p, less for RL and DPO.

    A LoRA wants about ten times the rate of full fine-tuning, whatever its rank; the exponent is a fit over model
    families (Schulman & Thinking Machines, "LoRA Without Regret", 2025). `model_type` is the one of the HF config.
    """
    exponent = 0.0775 if model_type.lower().startswith("qwen") else 0.781
    return 5e-5 * 10 * (2000 / hidden_size) ** exponent * RECIPE_FACTORS[recipe]


def peak_learning_rate(
    given: float | None, optim: OptimConfig, info: ModelInfo, recipe: Literal["sft", "rl", "dpo"]
) -> float:
    """The rate asked for, else the model's default; what no step could be taken with is refused before the first."""
    check_optim(given, optim)
    return default_learning_rate(info.hidden_size, info.model_type, recipe) if given is None else given


def check_optim(given: float | None, optim: OptimConfig) -> None:
    """UsageError for a learning rate, or for parameters of AdamW, with which no step could be taken."""
    _check_schedule(optim)
    at_least_0 = {
        "learning_rate": given, "optim.warmup_steps": optim.warmup_steps, "optim.min_ratio": optim.min_ratio,
        "optim.weight_decay": optim.weight_decay, "optim.grad_clip_norm": optim.grad_clip_norm,
    }  # fmt: skip
    for key, value in at_least_0.items():
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{key}={value:g}: expected a number from 0 on")
    for key, value in (("optim.beta1", optim.beta1), ("optim.beta2", optim.beta2)):
        if not 0 <= value < 1:
            raise UsageError(f"{key}={value:g}: expected a number from 0 on, below 1")
    if not 0 < optim.eps < math.inf:
        raise UsageError(f"optim.eps={optim.eps:g}: expected a number above 0")


def _check_schedule(optim: OptimConfig) -> None:
    if optim.schedule not in SCHEDULES:
        near = difflib.get_close_matches(optim.schedule, SCHEDULES, n=1)
        guess = f", did you mean {near[0]}?" if near else ""
        raise UsageError(f"optim.schedule={optim.schedule} is unknown{guess} (it is one of {', '.join(SCHEDULES)})")


def adam_at(step: int, total_steps: int, peak: float, optim: OptimConfig) -> AdamParams:
    """The parameters of optimizer step `step` (from 0)."""
    from core import AdamParams

    learning_rate = learning_rate_at(step, total_steps, peak, optim)
    return AdamParams(learning_rate, optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.grad_clip_norm)


def total_steps(steps: int | None, epochs: float, epoch_steps: int | None) -> int:
    """`steps` if given, else as many as `epochs` passes over the data take."""
    if steps is None and epoch_steps is None:
        raise UsageError("a stream has no known length: give steps=")
    total = steps if steps is not None else round(epochs * (epoch_steps or 0))
    if total < 1:
        asked = f"epochs={epochs:g}" if steps is None else f"steps={steps}"
        raise UsageError(f"{asked} makes {total} optimizer steps: at least 1 is needed")
    return total
