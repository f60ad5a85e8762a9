"""What the head's rows of one micro-batch are trained towards: from logprobs to gradients, and the sums that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from core.losses import LOSSES, loss_and_gradient


@dataclass(frozen=True)
class Term:
    """One sequence's selected rows and its loss; inputs are [n, K] on the device, or a ready gradient."""

    rows: slice
    loss_fn: str
    config: Mapping[str, float]
    inputs: Mapping[str, torch.Tensor]
    gradient: torch.Tensor | None = None  # d loss / d logprobs [n, K], when a custom loss gave it


class Objective:
    """Gradients of a micro-batch's sequences; `per_token` when a chunk of rows can be worked alone."""

    def __init__(self, terms: Sequence[Term], shape: torch.Size, device: torch.device) -> None:
        self.runs = _runs(terms)
        self.per_token = all(term.gradient is not None or LOSSES[term.loss_fn].per_token for term in terms)
        self.losses = torch.zeros(shape, dtype=torch.float32, device=device)

    def gradient(self, rows: slice, logprobs: torch.Tensor) -> torch.Tensor:
        """d loss / d logprobs for consecutive rows, [n, K] fp32; the terms are kept in `losses`."""
        gradient = torch.zeros_like(logprobs)
        for run in self.runs:
            start, stop = max(run.rows.start, rows.start), min(run.rows.stop, rows.stop)
            if start >= stop:
                continue
            here, inner = (
                slice(start - rows.start, stop - rows.start),
                slice(start - run.rows.start, stop - run.rows.start),
            )
            if run.gradient is not None:
                gradient[here] = run.gradient[inner]
                continue
            inputs = {key: value[inner] for key, value in run.inputs.items()}
            self.losses[start:stop], gradient[here] = loss_and_gradient(run.loss_fn, logprobs[here], inputs, run.config)
        return gradient


def _runs(terms: Sequence[Term]) -> list[Term]:
    """Neighbours with the same per-token loss become one term: a batch of one client is one run."""
    runs: list[Term] = []
    pending: list[Term] = []

    def flush() -> None:
        if len(pending) == 1:
            runs.append(pending[0])
        elif pending:
            first = pending[0]
            inputs = {key: torch.cat([term.inputs[key] for term in pending]) for key in first.inputs}
            runs.append(Term(slice(first.rows.start, pending[-1].rows.stop), first.loss_fn, first.config, inputs))
        pending.clear()

    for term in terms:
        mergeable = term.gradient is None and LOSSES[term.loss_fn].per_token
        if pending and not (mergeable and _alike(pending[-1], term)):
            flush()
        if mergeable:
            pending.append(term)
        else:
            runs.append(term)
    flush()
    return runs


def _alike(a: Term, b: Term) -> bool:
    return a.loss_fn == b.loss_fn and a.config == b.config and a.inputs.keys() == b.inputs.keys()
