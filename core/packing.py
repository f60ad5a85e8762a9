"""Cut sequences into micro-batches by a token budget, and lay a micro-batch out as packed rows sorted by adapter.

Gradients are sums, so where the cuts fall changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from core import native_lora
from core.attention import Extent
from core.decoder import Rows
from core.head import UNEMBED, Part
from core.lora import Adapter, ComputeCopies, Segment, Weights
from core.prefixes import Span, order, share

ROW_MULTIPLE = 16  # rows of a segment: a product of a new shape costs a CPU several calls of a known one
TARGETS_PER_ROW = 8  # the unembedding of so many targets is taken to cost a row through the layers


@dataclass(frozen=True)
class Item:
    """One sequence of a pass: its tokens, who serves it, and the positions whose logprobs are wanted."""

    request: int
    index: int  # within the request's data
    adapter: Adapter | Weights
    tokens: torch.Tensor  # [N] int64
    targets: torch.Tensor  # [N, K] int64
    wanted: torch.Tensor | None  # [n] positions, ascending; None: all

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def num_wanted(self) -> int:
        return self.length if self.wanted is None else len(self.wanted)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the wanted positions [n, K] as those of all [N, K]; 0 elsewhere."""
        if self.wanted is None:
            return values
        return torch.zeros(self.targets.shape, dtype=values.dtype).index_copy_(0, self.wanted, values)


Standing = Mapping[int, tuple[float, int]]  # by number of the request: smaller comes first


def shares_rows(device: torch.device, exact: bool) -> bool:
    """Whether sequences that begin alike have the rows of their beginning once: CUDA's kernel takes whole sequences."""
    return device.type == "cpu" and not exact


def in_order(items: Sequence[Item], share_rows: bool) -> list[tuple[Item, int]]:
    """Items with what each costs, in rows: those of one adapter together, those that begin alike one after another, longer
    ones first.

    An item costs its rows, where rows are shared those that it does not share with the one before, or as much as the targets
    it asks for: a sequence that is there a thousand times has no rows of its own.
    """
    by_adapter: dict[int, list[Item]] = {}
    for item in items:
        by_adapter.setdefault(id(item.adapter), []).append(item)
    found: list[tuple[Item, int]] = []
    for mine in by_adapter.values():
        for i, own in zip(*order([item.tokens for item in mine]), strict=True):
            rows = own if share_rows else mine[i].length
            found.append((mine[i], max(rows, mine[i].num_wanted // TARGETS_PER_ROW)))
    return found


def cut(ordered: Sequence[tuple[Item, int]], token_budget: int, standing: Standing | None = None) -> list[list[Item]]:
    """Micro-batches that cost about `token_budget` each, each of one K; `ordered` by `in_order`.

    Adapters come in the order of their requests' `standing`, then of their ranks. The cuts are even: as few batches as the
    budget allows on average, over it by less than one sequence.
    """
    batches: list[list[Item]] = []
    for k in sorted({item.targets.shape[1] for item, _ in ordered}):
        members = _by_standing([(item, cost) for item, cost in ordered if item.targets.shape[1] == k], standing or {})
        total = sum(cost for _, cost in members)
        even = total / max(1, -(-total // token_budget))
        batch: list[Item] = []
        seen = made = 0
        for item, cost in members:
            if batch and seen + cost / 2 > even * (made + 1):
                batches.append(batch)
                batch, made = [], made + 1
            batch.append(item)
            seen += cost
        batches.append(batch)
    return batches


def _by_standing(ordered: Sequence[tuple[Item, int]], standing: Standing) -> list[tuple[Item, int]]:
    """Adapter by adapter, like ranks together."""
    by_adapter: dict[int, list[tuple[Item, int]]] = {}
    for item, cost in ordered:
        by_adapter.setdefault(id(item.adapter), []).append((item, cost))

    def place(mine: list[tuple[Item, int]]) -> tuple[tuple[float, int], int, int]:
        first = mine[0][0]
        return min(standing.get(item.request, (0.0, 0)) for item, _ in mine), first.adapter.config.rank, first.request

    return [pair for mine in sorted(by_adapter.values(), key=place) for pair in mine]


def lay_out(
    batch: Sequence[Item], copies: ComputeCopies, device: torch.device, with_grad: bool, exact: bool = False
) -> tuple[Rows, list[Item]]:
    """Packed rows of one micro-batch and its items in the order of their targets. `exact`: nothing is shared."""
    counts: dict[int, tuple[Adapter | Weights, int]] = {}
    for item in batch:
        counts[id(item.adapter)] = (item.adapter, counts.get(id(item.adapter), (item.adapter, 0))[1] + item.length)
    ordered: list[Item] = []
    spans: list[Placed] = []
    selected: list[torch.Tensor] = []
    segments: list[Segment] = []
    parts: list[Part] = []
    start = selected_start = 0
    on_cpu = device.type == "cpu"
    alone = exact or native_lora.available(copies.dtype, device)  # each adapter is a segment
    for adapters in [[adapter] for adapter, _ in counts.values()] if alone else bins(list(counts.values()), on_cpu):
        first, selected_first = len(spans), len(selected)
        for adapter in adapters:
            members = [item for item in batch if item.adapter is adapter]
            placed, paths = _place(members, len(spans) and spans[-1].stop, share_rows=shares_rows(device, exact))
            spans += placed
            ordered += members
            selected += [path if item.wanted is None else path[item.wanted] for item, path in zip(members, paths, strict=True)]
        spans[-1] = spans[-1].lengthened(-(spans[-1].stop - start) % ROW_MULTIPLE)
        of_rows = [(span.adapter, span.start - start, span.stop - start) for span in spans[first:]]
        segment = make_segment(start, spans[-1].stop, adapters, of_rows, copies, with_grad)
        chosen = torch.cat(selected[selected_first:])
        scale = segment.scale
        if isinstance(scale, torch.Tensor):
            scale = scale[(chosen - start).to(device)]
        parts.append(Part(slice(selected_start, selected_start + len(chosen)), segment, scale))
        segments.append(segment)
        start, selected_start = segment.end, selected_start + len(chosen)
    rows = Rows(
        tokens=torch.cat([span.tokens for span in spans]).to(device),
        positions=torch.cat([span.position + torch.arange(len(span.tokens)) for span in spans]).to(device),
        extents=[Extent(span.start, len(span.tokens), span.prefix) for span in spans],
        segments=segments,
        selected=torch.cat(selected).to(device),
        targets=torch.cat([_wanted(item, item.targets) for item in ordered]).to(device),
        parts=parts,
    )
    return rows, ordered


@dataclass(frozen=True)
class Placed:
    """Tokens that got rows [start, stop); `prefix` are the rows of the positions before, `position` their number."""

    adapter: Adapter | Weights
    tokens: torch.Tensor
    position: int
    start: int
    prefix: torch.Tensor | None

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    def lengthened(self, count: int) -> Placed:
        """Tokens after the end are seen by nothing before them and have no loss: their gradient is zero."""
        return replace(self, tokens=torch.cat([self.tokens, self.tokens[-1:].expand(count)]))


def _place(items: Sequence[Item], start: int, share_rows: bool) -> tuple[list[Placed], list[torch.Tensor]]:
    """Rows from `start` on for one adapter's items, and the row of every position of each."""
    sequences = [item.tokens for item in items]
    if share_rows:
        spans, last = share(sequences)
    else:
        spans = last = [Span(tokens, 0, None) for tokens in sequences]
    placed: list[Placed] = []
    path: dict[int, torch.Tensor] = {}  # id of a span -> the row of every position up to its end
    for span in spans:
        prefix = None if span.parent is None else path[id(span.parent)]
        placed.append(Placed(items[0].adapter, span.tokens, span.start, start, prefix))
        own = torch.arange(start, start + len(span.tokens))
        path[id(span)] = own if prefix is None else torch.cat([prefix, own])
        start += len(span.tokens)
    return placed, [path[id(span)] for span in last]


AnyAdapter = TypeVar("AnyAdapter", bound=Adapter | Weights)


def bins(counts: Sequence[tuple[AnyAdapter, int]], on_cpu: bool) -> list[list[AnyAdapter]]:
    """Which adapters, given with their rows, share a segment.

    Concatenated ranks cost rows * sum of ranks; a further segment costs launches, worth about `merge_cost` rows * ranks.
    """
    merge_cost = 16_000 if on_cpu else 1_000_000
    bins: list[tuple[list[AnyAdapter], int, int]] = []  # adapters, rows, rank
    for adapter, rows in sorted(counts, key=lambda count: count[0].config.rank):
        rank = adapter.config.rank
        if bins:
            members, bin_rows, bin_rank = bins[-1]
            apart = bin_rows * bin_rank + rows * rank + merge_cost
            if members[0].geometry == adapter.geometry and (bin_rows + rows) * (bin_rank + rank) <= apart:
                bins[-1] = ([*members, adapter], bin_rows + rows, bin_rank + rank)
                continue
        bins.append(([adapter], rows, rank))
    return [members for members, _, _ in bins]


def make_segment(
    start: int, end: int, adapters: Sequence[AnyAdapter], of_rows: Sequence[tuple[AnyAdapter, int, int]],
    copies: ComputeCopies, with_grad: bool,
) -> Segment:  # fmt: skip
    """Rows [start, end) and their adapters; `of_rows` says which of the segment's rows [from, to) are whose."""
    factors = copies.get(adapters)
    columns: list[tuple[Adapter | Weights, slice]] = []
    column = 0
    for adapter in adapters:
        columns.append((adapter, slice(column, column + adapter.config.rank)))
        column += adapter.config.rank
    scale: torch.Tensor | float = adapters[0].scale
    if len(adapters) > 1:
        scale = torch.zeros(end - start, column, dtype=factors.dtype)
        by_adapter = {id(adapter): span for adapter, span in columns}
        for adapter, low, high in of_rows:
            scale[low:high, by_adapter[id(adapter)]] = adapter.scale
        scale = scale.to(factors.device)
    grad_dtype = torch.float32 if factors.is_cuda else factors.dtype
    grad = torch.empty(factors.shape, dtype=grad_dtype, device=factors.device) if with_grad else None
    geometry = adapters[0].geometry
    if grad is not None and (unembed := geometry.sites.get(UNEMBED)) is not None:
        for rows in (unembed.a, *unembed.b):
            grad[rows] = 0
    return Segment(start, end, geometry, factors, scale, grad, columns)


def _wanted(item: Item, values: torch.Tensor) -> torch.Tensor:
    return values if item.wanted is None else values[item.wanted]
