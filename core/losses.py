"""The losses: pure functions from per-token logprobs to per-token terms; a loss is the plain sum of its terms.

lp = log-softmax at the target (temperature 1), q = `logprobs` at sampling time, A = `advantages`, r = exp(lp - q), sg = stop
gradient. Sources: PPO arXiv 1707.06347, CISPO arXiv 2506.13585, DRO arXiv 2405.19107, GSPO arXiv 2507.18071; names and
thresholds as in Tinker's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]
Config = Mapping[str, float]


@dataclass(frozen=True)
class Loss:
    """`terms(lp, inputs, config)`: one sequence's logprobs [N] (or [N, K]) and inputs of that shape -> terms to be summed."""

    terms: Callable[[torch.Tensor, Tensors, Config], torch.Tensor]
    required: frozenset[str]
    defaults: Mapping[str, float]
    per_token: bool = True  # a term depends on its own token alone


def cross_entropy(lp: torch.Tensor, inputs: Tensors, config: Config) -> torch.Tensor:
    return -lp


def importance_sampling(lp: torch.Tensor, inputs: Tensors, config: Config) -> torch.Tensor:
    ratio = torch.exp(lp - inputs["logprobs"])
    return -ratio * inputs["advantages"]


def ppo(lp: torch.Tensor, inputs: Tensors, config: Config) -> torch.Tensor:
    return _clipped(torch.exp(lp - inputs["logprobs"]), inputs["advantages"], config)


def cispo(lp: torch.Tensor, inputs: Tensors, config: Config) -> torch.Tensor:
    ratio = torch.exp(lp - inputs["logprobs"]).clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -ratio.detach() * lp * inputs["advantages"]


def dro(lp: torch.Tensor, inputs: Tensors, config: Config) -> torch.Tensor:
    return -(lp * inputs["advantages"] - 0.5 * config["beta"] * (lp - inputs["logprobs"]).square())


def gspo(lp: torch.Tensor, inputs: Tensors, config: Config) -> torch.Tensor:
    mask = inputs["sequence_ratio_mask"] != 0
    log_ratio = torch.where(mask, lp.detach() - inputs["logprobs"], 0.0)
    sequence = log_ratio.sum() / mask.sum().clamp(min=1)
    return _clipped(torch.exp(sequence + lp - lp.detach()), inputs["advantages"], config)


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, config: Config) -> torch.Tensor:
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * advantages, clipped * advantages)


_RL = frozenset({"logprobs", "advantages"})


def _clip(low: float, high: float) -> dict[str, float]:
    return {"clip_low_threshold": low, "clip_high_threshold": high}


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, frozenset(), {}),
    "importance_sampling": Loss(importance_sampling, _RL, {}),
    "ppo": Loss(ppo, _RL, _clip(0.8, 1.2)),
    "cispo": Loss(cispo, _RL, _clip(0.0, 4.0)),
    "dro": Loss(dro, _RL, {"beta": 0.05}),
    "gspo": Loss(gspo, _RL | {"sequence_ratio_mask"}, _clip(1 - 3e-4, 1 + 4e-4), per_token=False),
}


def loss_and_gradient(name: str, lp: torch.Tensor, inputs: Tensors, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted terms, d sum(terms) / d lp), both of lp's shape; `weights` multiply the terms of every loss."""
    with torch.enable_grad():
        leaf = lp.detach().requires_grad_()
        terms = LOSSES[name].terms(leaf, inputs, config)
        weights = inputs.get("weights")
        if weights is not None:
            terms = torch.where(weights != 0, terms * weights, 0.0)
        (gradient,) = torch.autograd.grad(terms.sum(), leaf)
    if weights is not None:  # 0 * inf on an untrained token would be NaN, above and here
        gradient = torch.where(weights != 0, gradient, 0.0)
    return terms.detach(), gradient
