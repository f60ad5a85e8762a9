"""Data, parameters and results as the tinker SDK has them, and back: each is converted once, here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tinker import types

from core import AdamParams, Datum, ForwardBackwardOutput, ModelInput, SampledSequence, SampleResponse, SamplingParams

LINEAR_IN_ADVANTAGES = ("importance_sampling", "ppo", "cispo", "gspo")  # a token's term, if its weight is not negative


def to_input(given: ModelInput) -> types.ModelInput:
    return types.ModelInput.from_ints(given.to_ints())


def to_datum(datum: Datum, loss_fn: str) -> types.Datum:
    inputs = _portable({key: _tensor(key, value) for key, value in datum.loss_fn_inputs.items()}, loss_fn)
    tensors: dict[str, Any] = {key: types.TensorData.from_torch(value) for key, value in inputs.items()}
    return types.Datum(model_input=to_input(datum.model_input), loss_fn_inputs=tensors)


def _tensor(key: str, value: Any) -> torch.Tensor:
    """The wire knows int64 and float32."""
    return torch.as_tensor(value, dtype=torch.int64 if key == "target_tokens" else torch.float32).cpu()


def _portable(inputs: dict[str, torch.Tensor], loss_fn: str) -> dict[str, torch.Tensor]:
    """RL losses take no weights in Tinker's documentation; times the advantages they say the same."""
    weights = inputs.get("weights")
    if loss_fn not in LINEAR_IN_ADVANTAGES or weights is None or bool((weights < 0).any()):
        return inputs
    rest = {key: value for key, value in inputs.items() if key != "weights"}
    return {**rest, "advantages": inputs["advantages"] * weights}


def from_output(output: types.ForwardBackwardOutput, data: Sequence[Datum], only_weighted: bool) -> ForwardBackwardOutput:
    logprobs = [one["logprobs"].to_torch() for one in output.loss_fn_outputs]
    if only_weighted:
        logprobs = weighted(data, logprobs)
    return ForwardBackwardOutput([{"logprobs": one} for one in logprobs], dict(output.metrics))


def weighted(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """0.0 where the weight (for gspo: and the mask) is 0, as the engine gives them for logprobs="weighted"."""
    return [torch.where(_seen(datum, lp.shape), lp, 0.0) for datum, lp in zip(data, logprobs, strict=True)]


def _seen(datum: Datum, shape: torch.Size) -> torch.Tensor:
    inputs = datum.loss_fn_inputs
    seen = torch.full(shape, "weights" not in inputs)
    for key in ("weights", "sequence_ratio_mask"):
        if key in inputs:
            seen = seen | (torch.as_tensor(inputs[key]) != 0)
    return seen


def to_adam(params: AdamParams) -> types.AdamParams:
    return types.AdamParams(**asdict(params))


def from_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Of an optimizer step; a server need not tell the gradient's norm."""
    return {"grad_norm:mean": math.nan, **(metrics or {})}


def to_params(params: SamplingParams) -> types.SamplingParams:
    stop: Any = params.stop if params.stop is None or isinstance(params.stop, str) else list(params.stop)
    return types.SamplingParams(
        max_tokens=params.max_tokens, seed=params.seed, stop=stop,
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p,
    )  # fmt: skip


def from_samples(response: types.SampleResponse) -> SampleResponse:
    sequences = [SampledSequence(list(s.tokens), list(s.logprobs or ()), s.stop_reason) for s in response.sequences]
    return SampleResponse(sequences, response.prompt_logprobs, response.topk_prompt_logprobs)
