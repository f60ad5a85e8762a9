"""forward_backward_custom: a caller's loss on the logprobs, and its gradient for an ordinary backward pass."""

from __future__ import annotations

import torch

from core.datum import ForwardBackwardOutput
from core.objective import Objective
from core.packing import Item
from core.request import PassRequest


class CustomObjective(Objective):
    """A caller's loss over the whole micro-batch."""

    def __init__(self, request: PassRequest, ordered: list[Item], shape: torch.Size, device: torch.device) -> None:
        super().__init__([], shape, device)
        self.request, self.ordered, self.per_token = request, ordered, False
        self.loss, self.metrics = 0.0, {}

    def gradient(self, rows: slice, logprobs: torch.Tensor) -> torch.Tensor:
        by_datum: list[torch.Tensor] = [torch.empty(0)] * len(self.ordered)
        for item, lp in zip(self.ordered, logprobs.cpu().split([item.num_wanted for item in self.ordered]), strict=True):
            by_datum[item.index] = item.spread(lp)
        self.loss, self.metrics, gradients = evaluate_custom(self.request, by_datum)
        wanted = [gradients[i.index] if i.wanted is None else gradients[i.index][i.wanted] for i in self.ordered]
        return torch.cat(wanted).to(logprobs.device)


def evaluate_custom(request: PassRequest, logprobs: list[torch.Tensor]) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """(loss, metrics, d loss / d logprobs per datum as [N, K]).

    Raises ValueError for a loss that is not a finite scalar, or was not computed from the logprobs.
    """
    assert request.custom is not None
    leaves = [lp.detach().reshape(d.shape).requires_grad_() for lp, d in zip(logprobs, request.data, strict=True)]
    with torch.enable_grad():
        loss, metrics = request.custom(request.source, leaves)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(f"the custom loss returned {loss!r:.80}, expected (scalar tensor, metrics)")
    if not bool(torch.isfinite(loss.detach()).all()):
        raise ValueError(f"the custom loss is {float(loss.detach())}, expected a finite number")
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None]
    if all(g is None for g in found):
        raise ValueError("the custom loss does not depend on the logprobs (detached, perhaps): there is nothing to train on")
    gradients = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return float(loss.detach()), dict(metrics), [g.reshape(len(g), -1) for g in gradients]


def finish_custom(request: PassRequest, logprobs: list[torch.Tensor], loss: float, metrics: dict[str, float]) -> None:
    results = [{"logprobs": lp.reshape(d.shape)} for lp, d in zip(logprobs, request.data, strict=True)]
    request.future.set_result(ForwardBackwardOutput(results, {"loss:sum": loss, **metrics}))
