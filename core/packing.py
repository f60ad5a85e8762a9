"""Cut sequences into micro-batches by a token budget, and lay a micro-batch out as packed rows sorted by adapter.

Gradients are sums, so where the cuts fall changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.decoder import Rows
from core.head import Part
from core.lora import Adapter, ComputeCopies, Segment

ROW_MULTIPLE = 16  # rows of a segment: a product of a new shape costs a CPU several calls of a known one


@dataclass(frozen=True)
class Item:
    """One sequence of a pass: its tokens, who serves it, and the positions whose logprobs are wanted."""

    request: int
    index: int  # within the request's data
    adapter: Adapter
    tokens: torch.Tensor  # [N] int64
    targets: torch.Tensor  # [N, K] int64
    wanted: torch.Tensor | None  # [n] positions, ascending; None: all

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def num_wanted(self) -> int:
        return self.length if self.wanted is None else len(self.wanted)


def cut(items: Sequence[Item], token_budget: int) -> list[list[Item]]:
    """Micro-batches of about `token_budget` tokens each, each of one K.

    Sequences are taken longest first, so that like lengths share a micro-batch, and the cuts are even: as few batches as the
    budget allows on average, over it by less than one sequence.
    """
    batches: list[list[Item]] = []
    for k in sorted({item.targets.shape[1] for item in items}):
        members = sorted(
            (item for item in items if item.targets.shape[1] == k),
            key=lambda item: (-item.length, item.request, item.index),
        )
        total = sum(item.length for item in members)
        even = total / max(1, -(-total // token_budget))
        batch: list[Item] = []
        seen = made = 0
        for item in members:
            if batch and seen + item.length / 2 > even * (made + 1):
                batches.append(batch)
                batch, made = [], made + 1
            batch.append(item)
            seen += item.length
        batches.append(batch)
    return batches


def lay_out(batch: Sequence[Item], copies: ComputeCopies, device: torch.device, with_grad: bool) -> tuple[Rows, list[Item]]:
    """Packed rows of one micro-batch and its items in row order."""
    bins = _bins(batch, merge_cost=4_000 if device.type == "cpu" else 1_000_000)
    ordered: list[Item] = []
    lengths: list[int] = []
    segments: list[Segment] = []
    parts: list[Part] = []
    start = selected_start = 0
    for adapters in bins:
        members = [item for adapter in adapters for item in batch if item.adapter is adapter]
        members.sort(key=lambda item: adapters.index(item.adapter))
        lengths += [item.length for item in members]
        lengths[-1] += -sum(item.length for item in members) % ROW_MULTIPLE
        end = sum(lengths)
        segment = _segment(start, end, adapters, members, copies, with_grad)
        selected_end = selected_start + sum(item.num_wanted for item in members)
        parts.append(Part(slice(selected_start, selected_end), segment, _selected_scale(segment, members)))
        segments.append(segment)
        ordered += members
        start, selected_start = end, selected_end
    rows = Rows(
        tokens=torch.cat([_lengthened(item, length) for item, length in zip(ordered, lengths, strict=True)]).to(device),
        positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
        lengths=lengths,
        segments=segments,
        selected=_selected(ordered, lengths).to(device),
        targets=torch.cat([_wanted(item, item.targets) for item in ordered]).to(device),
        parts=parts,
    )
    return rows, ordered


def _lengthened(item: Item, length: int) -> torch.Tensor:
    """Tokens after the end are seen by nothing before them and have no loss: their gradient is zero."""
    return torch.cat([item.tokens, item.tokens[-1:].expand(length - item.length)])


def _bins(batch: Sequence[Item], merge_cost: int) -> list[list[Adapter]]:
    """Which adapters share a segment. Concatenated ranks cost rows * sum of ranks; a further segment costs launches,
    worth about `merge_cost` rows * ranks."""
    tokens: dict[int, int] = {}
    adapters: dict[int, Adapter] = {}
    for item in batch:
        tokens[id(item.adapter)] = tokens.get(id(item.adapter), 0) + item.length
        adapters[id(item.adapter)] = item.adapter
    bins: list[tuple[list[Adapter], int, int]] = []  # adapters, rows, rank
    for key in sorted(adapters, key=lambda key: adapters[key].config.rank):
        adapter, rows, rank = adapters[key], tokens[key], adapters[key].config.rank
        if bins:
            members, bin_rows, bin_rank = bins[-1]
            apart = bin_rows * bin_rank + rows * rank + merge_cost
            if members[0].geometry == adapter.geometry and (bin_rows + rows) * (bin_rank + rank) <= apart:
                bins[-1] = ([*members, adapter], bin_rows + rows, bin_rank + rank)
                continue
        bins.append(([adapter], rows, rank))
    return [members for members, _, _ in bins]


def _segment(
    start: int, end: int, adapters: list[Adapter], members: Sequence[Item], copies: ComputeCopies, with_grad: bool
) -> Segment:
    factors = copies.get(adapters)
    columns: list[tuple[Adapter, slice]] = []
    column = 0
    for adapter in adapters:
        columns.append((adapter, slice(column, column + adapter.config.rank)))
        column += adapter.config.rank
    scale: torch.Tensor | float = adapters[0].scale
    if len(adapters) > 1:
        scale = torch.zeros(end - start, column, dtype=factors.dtype)
        row = 0
        by_adapter = {id(adapter): span for adapter, span in columns}
        for item in members:
            scale[row : row + item.length, by_adapter[id(item.adapter)]] = item.adapter.scale
            row += item.length
        scale = scale.to(factors.device)
    grad_dtype = torch.float32 if factors.is_cuda else factors.dtype
    grad = torch.zeros(factors.shape, dtype=grad_dtype, device=factors.device) if with_grad else None
    return Segment(start, end, adapters[0].geometry, factors, scale, grad, columns)


def _selected(ordered: Sequence[Item], lengths: Sequence[int]) -> torch.Tensor:
    """Row indices of the wanted positions, [n] ascending; `lengths` are rows per item."""
    indices, start = [], 0
    for item, length in zip(ordered, lengths, strict=True):
        indices.append(start + (torch.arange(item.length) if item.wanted is None else item.wanted))
        start += length
    return torch.cat(indices)


def _wanted(item: Item, values: torch.Tensor) -> torch.Tensor:
    return values if item.wanted is None else values[item.wanted]


def _selected_scale(segment: Segment, members: Sequence[Item]) -> torch.Tensor | float:
    if not isinstance(segment.scale, torch.Tensor):
        return segment.scale
    return segment.scale[_selected(members, [item.length for item in members]).to(segment.scale.device)]
