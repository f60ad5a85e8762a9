"""Checking requests at the door, and their data as tensors. A ValueError here means that nothing was queued."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real

import torch

from core.datum import AdamParams, Datum, TensorLike
from core.lora import Geometry
from core.losses import LOSSES

MAX_RANK = 512
LARGEST = torch.finfo(torch.float32).max


@dataclass
class Sequenced:
    """One datum as tensors: tokens [N], targets [N, K], the loss's inputs as fp32 of the targets' own shape."""

    tokens: torch.Tensor
    targets: torch.Tensor
    inputs: dict[str, torch.Tensor]
    shape: torch.Size  # of target_tokens: [N] or [N, K]


def check_config(loss_fn: str, loss_fn_config: Mapping[str, float] | None) -> dict[str, float]:
    """The loss's configuration with defaults filled in."""
    if loss_fn not in LOSSES:
        close = difflib.get_close_matches(loss_fn, LOSSES, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"unknown loss_fn '{loss_fn}', expected one of {', '.join(LOSSES)}{hint}")
    defaults, given = LOSSES[loss_fn].defaults, dict(loss_fn_config or {})
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(f"loss_fn_config of {loss_fn} has no key '{key}', it knows {sorted(defaults) or 'none'}")
        if not abs(_as_float(value)) <= LARGEST:
            raise ValueError(f"loss_fn_config['{key}'] is {value!r}, expected a finite number")
    config = {**defaults, **given}
    _check_bounds(config)
    return config


def _check_bounds(config: Mapping[str, float]) -> None:
    """The thresholds are bounds of the ratio itself, not distances from 1; a negative beta would push away from q."""
    low, high = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", 1.0)
    if not 0 <= low <= high:
        raise ValueError(
            f"loss_fn_config has clip_low_threshold={low:g} and clip_high_threshold={high:g},"
            " expected bounds of the ratio: 0 <= low <= high"
        )
    if config.get("beta", 0.0) < 0:
        raise ValueError(f"loss_fn_config['beta'] is {config['beta']!r}, expected a number from 0 on")


def check_adam(adam: AdamParams) -> None:
    """Refuse what a step would make weights or moments of that are no numbers, or move them the wrong way."""
    for key, value in asdict(adam).items():
        if key in ("beta1", "beta2"):
            low, high, expected = 0.0, 1.0, "a number from 0 on, below 1"
        elif key == "eps":  # a moment of 0 is divided by it: a new adapter's A has no gradient in the first step
            low, high, expected = torch.finfo(torch.float32).tiny, LARGEST, "a number above 0 (in fp32)"
        else:
            low, high, expected = 0.0, LARGEST, "a number from 0 on"
        if not low <= _as_float(value) < high:
            raise ValueError(f"{key} is {value!r}, expected {expected}")


def _as_float(value: object) -> float:
    """NaN for what is no number, infinity for a whole number above all floats."""
    try:
        return float(value) if isinstance(value, Real) else float("nan")
    except OverflowError:
        return float("inf")


def check_rank(rank: int, geometry: Geometry) -> None:
    """A rank above the full one of every matrix trains nothing more; up to MAX_RANK it is taken on small models too."""
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    matrices = [(rows.site.d_in, matrix.d_out) for rows in geometry.sites.values() for matrix in rows.site.matrices]
    full = max(min(sides) for sides in matrices)
    if rank > max(full, MAX_RANK):
        raise ValueError(
            f"rank is {rank}, expected at most {max(full, MAX_RANK)}: no matrix of this model has more than rank {full}"
        )


def check_data(data: Sequence[Datum], loss_fn: str, vocab_size: int, max_length: int) -> list[Sequenced]:
    """Every datum checked and converted; messages name the datum, the key and the values."""
    if not data:
        raise ValueError("data is empty, expected at least one Datum")
    return [_check(datum, f"data[{i}]", loss_fn, vocab_size, max_length) for i, datum in enumerate(data)]


def _check(datum: Datum, where: str, loss_fn: str, vocab_size: int, max_length: int) -> Sequenced:
    n = datum.model_input.length
    if n == 0:
        raise ValueError(f"{where} has no input tokens")
    if n > max_length:
        raise ValueError(f"{where} has {n} input tokens, the model's context is {max_length}")
    tokens = _tensor(datum.model_input.to_ints(), torch.int64, f"{where}.model_input")
    _check_keys(datum, where, loss_fn)
    _check_vocabulary(tokens, f"{where}.model_input", vocab_size)
    targets = _tensor(datum.loss_fn_inputs["target_tokens"], torch.int64, f"{where}.loss_fn_inputs['target_tokens']")
    _check_length(targets, f"{where}.loss_fn_inputs['target_tokens']", n)
    if targets.dim() == 2 and loss_fn != "cross_entropy":
        raise ValueError(
            f"{where}.loss_fn_inputs['target_tokens'] has shape {list(targets.shape)}; {loss_fn} takes one target per position"
        )
    _check_vocabulary(targets, f"{where}.loss_fn_inputs['target_tokens']", vocab_size)
    inputs = {}
    for key, raw in datum.loss_fn_inputs.items():
        if key == "target_tokens":
            continue
        name = f"{where}.loss_fn_inputs['{key}']"
        value = _tensor(raw, torch.float32, name)
        _check_length(value, name, n)
        if value.shape != targets.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, target_tokens has {list(targets.shape)}")
        if not bool(torch.isfinite(value).all()):
            position = int((~torch.isfinite(value.reshape(n, -1)).all(1)).nonzero()[0])
            raise ValueError(f"{name} is not finite at position {position}")
        inputs[key] = value.reshape(n, -1)
    return Sequenced(tokens, targets.reshape(n, -1), inputs, targets.shape)


def _check_keys(datum: Datum, where: str, loss_fn: str) -> None:
    required = LOSSES[loss_fn].required | {"target_tokens"}
    given = set(datum.loss_fn_inputs)
    if missing := required - given:
        raise ValueError(f"{where}.loss_fn_inputs lacks {sorted(missing)}, which {loss_fn} needs")
    if extra := given - required - {"weights"}:
        raise ValueError(f"{where}.loss_fn_inputs has {sorted(extra)}, which {loss_fn} does not know")


def _tensor(raw: TensorLike, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A copy: the caller may reuse its own buffer while the request waits."""
    try:
        value = torch.as_tensor(raw, dtype=dtype if dtype.is_floating_point else None)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is not an array of numbers: {error}") from error
    if dtype == torch.int64 and value.is_floating_point() and value.numel():  # [] is float
        raise ValueError(f"{name} holds {value.dtype}, expected whole numbers")
    return value.detach().to("cpu", dtype, copy=True)


def _check_length(value: torch.Tensor, name: str, n: int) -> None:
    if value.dim() > 2 or (value.dim() == 2 and value.shape[1] == 0):
        raise ValueError(f"{name} has shape {list(value.shape)}, expected [{n}] or [{n}, K]")
    if value.dim() == 0 or len(value) != n:
        found = len(value) if value.dim() else 1
        raise ValueError(f"{name} has {found} values for {n} input tokens")


def _check_vocabulary(tokens: torch.Tensor, name: str, vocab_size: int) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} has token {low if low < 0 else high}, outside the vocabulary of {vocab_size}")


def check_custom(data: Sequence[Datum], vocab_size: int, max_length: int, weighted: bool = False) -> list[Sequenced]:
    """Of forward_backward_custom the engine reads target_tokens, and weights if `weighted`; other keys are the caller's."""
    read = {"target_tokens", "weights"} if weighted else {"target_tokens"}
    bare = [Datum(datum.model_input, {k: v for k, v in datum.loss_fn_inputs.items() if k in read}) for datum in data]
    return check_data(bare, "cross_entropy", vocab_size, max_length)
