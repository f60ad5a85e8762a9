"""From final hidden rows to sampled tokens and their logprobs, many rows with their own parameters at once.

A token is found by inverting the cumulative distribution at one uniform number per row, in two levels (blocks of the
vocabulary, then one block), so that (T, V) is read twice and no noise of that size is drawn. Logits are kept relative to a
running estimate of each row's log-normaliser, for the reason given in core/head.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from core import native
from core.datum import SamplingParams
from core.decoder import Decoder
from core.elementwise import normalise


@dataclass
class Picked:
    """tokens [n]; logprobs [n] fp32 of the distribution sampled from; shift [n] to give with each row's next logits."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    shift: torch.Tensor


@dataclass
class Choice:
    """The sampling parameters of n rows."""

    inverse_temperature: torch.Tensor | None  # [n]; None: all 1
    greedy: torch.Tensor | None  # [n] bool; None: none is
    narrowed: list[tuple[int, SamplingParams]]  # rows with top_k or top_p

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Choice:
        temperatures = [p.temperature or 1.0 for p in params]
        plain = all(t == 1.0 for t in temperatures)
        greedy = [p.temperature == 0 or p.top_k == 1 for p in params]
        return cls(
            None if plain else 1.0 / torch.tensor(temperatures, dtype=torch.float32, device=device),
            torch.tensor(greedy, device=device) if any(greedy) else None,
            [(i, p) for i, p in enumerate(params) if not greedy[i] and (p.top_k > 0 or p.top_p < 1.0)],
        )


class UnembedAdapters(Protocol):
    def unembed(self, h: torch.Tensor) -> tuple[slice, torch.Tensor, torch.Tensor] | None:
        """(rows, scaled h A^T [n, R], B [V, R]) of the rows it serves; None: they have no adapter there."""
        ...


class Head:
    """The unembedding of n rows, with their adapters."""

    def __init__(self, decoder: Decoder, x: torch.Tensor, adapters: Sequence[UnembedAdapters]) -> None:
        """x [n, d] fp32, the residual stream after the last layer."""
        self.head, norm = decoder.head, decoder.final_norm
        self.h, _ = normalise(x, norm, decoder.dtype)
        self.adapted = [adapted for one in adapters if (adapted := one.unembed(self.h)) is not None]

    def logits(self, shift: torch.Tensor) -> torch.Tensor:
        """Logits minus shift [n] as [V, n] in the compute dtype, rounded once after the subtraction."""
        shift = shift.to(self.h.dtype)
        logits = native.logits_of_few(self.head.weight, self.h, shift)
        if logits is None:
            logits = F.linear(self.head.weight, self.h, -shift)
        if self.head.bias is not None:
            logits += self.head.bias.unsqueeze(1)
        for rows, u, b in self.adapted:
            logits[:, rows].addmm_(b, u.T)
        return logits

    def at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of one token per row, [n] fp32."""
        found = torch.linalg.vecdot(self.h.float(), F.embedding(tokens, self.head.weight).float())
        if self.head.bias is not None:
            found += self.head.bias[tokens].float()
        for rows, u, b in self.adapted:
            found[rows] += torch.linalg.vecdot(u.float(), F.embedding(tokens[rows], b).float())
        return found


def pick(head: Head, shift: torch.Tensor, choice: Choice, uniform: torch.Tensor) -> Picked:
    """One token per row. shift [n] is near each row's largest logit; uniform [n] fp64 in [0, 1)."""
    columns = torch.arange(len(shift), device=shift.device)
    shift = shift.to(head.h.dtype).float()
    logits = head.logits(shift)
    tokens = logits.argmax(0) if choice.greedy is not None else None
    narrowed = {row: narrow(logits[:, row].float(), params, float(uniform[row])) for row, params in choice.narrowed}
    inverse = choice.inverse_temperature
    weights = logits.mul_(inverse).exp_() if inverse is not None else logits.exp_()
    sums = _block_sums(weights)  # [blocks, n] fp32
    total = sums.sum(0)
    spoilt = ~(torch.isfinite(total) & (total > 1e-20))  # the shift is over 50 away from the largest logit: take that
    if bool(spoilt.any()):
        largest = head.logits(torch.zeros_like(shift)).amax(0).float()
        if bool((spoilt & torch.isfinite(largest)).any()):
            return pick(head, torch.where(spoilt, largest, shift), choice, uniform)
    drawn = _invert(weights, sums, total, uniform)
    if tokens is not None and choice.greedy is not None:
        drawn = torch.where(choice.greedy, tokens, drawn)
    for row, token in narrowed.items():
        drawn[row] = token
    exact = head.at(drawn) - shift
    if inverse is not None:
        exact = exact * inverse
    total = total - weights[drawn, columns].float() + exact.exp()
    logprobs = exact - total.log()
    near = total.log() if inverse is None else total.log() / inverse
    return Picked(drawn, logprobs, shift + near)


def _block_size(vocabulary: int) -> int:
    """The largest power of two up to 256 that divides it; 1 for an odd one."""
    return min(256, vocabulary & -vocabulary)


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    size = _block_size(len(weights))
    return weights.view(-1, size, weights.shape[1]).sum(1, dtype=torch.float32)


def _invert(weights: torch.Tensor, sums: torch.Tensor, total: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative weight passes uniform * total, per column."""
    size, columns = _block_size(len(weights)), torch.arange(len(total), device=total.device)
    reached = sums.double().cumsum(0)
    goal = uniform * reached[-1]
    block = (reached <= goal).sum(0).clamp_(max=len(sums) - 1)
    rest = goal - torch.where(block > 0, reached[(block - 1).clamp(min=0), columns], 0.0)
    inside = weights.view(-1, size, weights.shape[1])[block, :, columns].double()  # [n, size]
    within = (inside.cumsum(1) <= rest.unsqueeze(1)).sum(1).clamp_(max=size - 1)
    likely = inside.argmax(1)  # where rounding led past the block's last weight
    return block * size + torch.where(inside[columns, within] > 0, within, likely)


def narrow(logits: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """A token of logits [V] among the top_k likeliest and the fewest that hold top_p."""
    count = min(params.top_k, len(logits)) if params.top_k > 0 else len(logits)
    values, tokens = torch.topk(logits, count)
    weights = torch.softmax(values.double() / (params.temperature or 1.0), 0)
    before = weights.cumsum(0) - weights
    weights = torch.where(before < params.top_p, weights, 0.0)
    reached = weights.cumsum(0)
    place = int((reached <= uniform * reached[-1]).sum().clamp(max=count - 1))
    return int(tokens[place]) if weights[place] > 0 else int(tokens[0])


def fp32_logits(
    decoder: Decoder, x: torch.Tensor, adapters: Sequence[tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]]
) -> torch.Tensor:
    """[n, V] fp32 of rows x [n, d], where a product can return fp32; adapters: ((A [d, R], B [V, R]), mask [n, R])."""
    head = decoder.head
    h, _ = normalise(x, decoder.final_norm, decoder.dtype)
    logits = _product(h, head.weight.T)
    if head.bias is not None:
        logits += head.bias
    for (a, b), mask in adapters:
        logits += _product((h @ a).mul_(mask), b.T)
    return logits


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in fp32."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def draw(logits: torch.Tensor, greedy: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [n], their logprobs [n] fp32) for logits [n, V] fp32; greedy [n] bool, uniform [n] fp64 in [0, 1).

    Nothing here waits for the device or depends on the values but through tensors: it can be captured.
    """
    n, size = len(logits), _block_size(logits.shape[1])
    rows = torch.arange(n, device=logits.device)
    largest, likeliest = logits.max(1)
    blocks = (logits - largest.unsqueeze(1)).exp_().view(n, -1, size)
    reached = blocks.sum(2).double().cumsum(1)
    goal = uniform * reached[:, -1]
    block = (reached <= goal.unsqueeze(1)).sum(1).clamp_(max=blocks.shape[1] - 1)
    rest = goal - torch.where(block > 0, reached[rows, (block - 1).clamp(min=0)], 0.0)
    inside = blocks[rows, block].double()  # [n, size]
    within = (inside.cumsum(1) <= rest.unsqueeze(1)).sum(1).clamp_(max=size - 1)
    within = torch.where(inside[rows, within] > 0, within, inside.argmax(1))  # where rounding led past the last weight
    tokens = torch.where(greedy, likeliest, block * size + within)
    return tokens, logits[rows, tokens] - largest - reached[:, -1].log().float()


def top_logprobs(
    decoder: Decoder, x: torch.Tensor, adapters: UnembedAdapters, count: int, temperature: float = 1.0
) -> list[list[tuple[int, float]]]:
    """The likeliest tokens after each of n rows x [n, d], all served by `adapters`."""
    found: list[list[tuple[int, float]]] = []
    for start in range(0, len(x), 128):
        part = x[start : start + 128]
        head = Head(decoder, part, [adapters])
        shift = head.logits(torch.zeros(len(part), dtype=torch.float32, device=x.device)).amax(0).float()
        logprobs = torch.log_softmax(head.logits(shift).T.float() / temperature, dim=1)
        values, tokens = torch.topk(logprobs, min(count, logprobs.shape[1]))
        found += [list(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]
    return found
