"""What waits in a client's queue or is being sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from core.datum import Datum, ForwardBackwardOutput, SampleResponse, SamplingParams
from core.door import Sequenced
from core.futures import Future
from core.kv_cache import Slot
from core.lora import Adapter, Weights
from core.packing import Item
from core.token_stream import StreamedToken

CustomLoss = Callable[[Sequence[Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]


@dataclass
class PassRequest:
    """A forward_backward, forward or custom request that passed the door."""

    adapter: Adapter | Weights
    data: list[Sequenced]
    loss_fn: str
    config: Mapping[str, float]
    train: bool
    weighted_only: bool
    future: Future[ForwardBackwardOutput]
    custom: CustomLoss | None = None
    source: Sequence[Datum] = ()
    gradients: list[torch.Tensor] | None = None  # per datum [N, K], once a custom loss has been evaluated

    def items(self, number: int) -> list[Item]:
        return [
            Item(number, i, self.adapter, datum.tokens, datum.targets, self._wanted(datum)) for i, datum in enumerate(self.data)
        ]

    def _wanted(self, datum: Sequenced) -> torch.Tensor | None:
        if not self.weighted_only or "weights" not in datum.inputs:
            return None
        wanted = datum.inputs["weights"] != 0
        if "sequence_ratio_mask" in datum.inputs:  # gspo's ratio also reads positions that are not trained
            wanted = wanted | (datum.inputs["sequence_ratio_mask"] != 0)
        return wanted.any(dim=1).nonzero().squeeze(1)


@dataclass
class Call:
    """Any other operation: runs alone, in its client's order."""

    work: Callable[[], Any]
    future: Future


@dataclass(eq=False)
class SampleRequest:
    """One call of `sample`, checked."""

    prompt: list[int]
    num_samples: int
    params: SamplingParams
    max_tokens: int
    weights: Weights
    ends: Callable[[list[int]], bool]  # whether the tokens so far end in something to stop at
    future: Future[SampleResponse]
    on_token: Callable[[StreamedToken], None] | None = None  # called by the engine's thread: it must not wait
    prompt_logprobs: tuple[list[float | None], list[list[tuple[int, float]] | None] | None] | None = None
    sequences: list[Continuation] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Of the longest that a sequence can become."""
        return len(self.prompt) + self.max_tokens


@dataclass(eq=False)
class Continuation:
    """One sample on its way: `tokens` are the prompt and what has been sampled."""

    request: SampleRequest
    number: int  # among those of its request
    tokens: list[int]
    uniform: Callable[[], float]
    logprobs: list[float] = field(default_factory=list)
    slot: Slot | None = None
    shift: float | None = None
    stop_reason: str | None = None

    @property
    def sampled(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]
