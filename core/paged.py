"""Keys and values in pages, for CUDA: one block of memory for all sequences, which a captured decode step can rely on.

A slot is a list of pages, so that sequences of any capacities share a decode step and nothing fragments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch

from core.attention import BLOCK, Heads, varlen_between
from core.elementwise import kernels
from core.inference import causal_softmax
from core.kv_cache import SMALLEST, Pool, Slot

PAGE = SMALLEST  # tokens of a page


class Pages:
    """k and v [layers, pages, PAGE, kv, size]. Page 0 is nobody's: rows that only fill a step up write there."""

    def __init__(self, num_layers: int, heads: Heads, dtype: torch.dtype, device: torch.device, max_tokens: int) -> None:
        """The memory is taken when the first sequence needs it."""
        self.shape = (num_layers, 1 + max_tokens // PAGE, PAGE, heads.kv, heads.size)
        self.dtype, self.device = dtype, device
        self.k = self.v = torch.empty(0, dtype=dtype, device=device)
        self.free = list(range(self.shape[1] - 1, 0, -1))

    def new_pool(self, capacity: int, most: int) -> Pool:
        if self.k.numel() == 0:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what training has let go of
            self.k, self.v = (torch.zeros(self.shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return PagedPool(self, capacity)


@final
class PagedPool(Pool):
    """Slots whose `pages` say where their tokens lie."""

    def __init__(self, memory: Pages, capacity: int) -> None:
        super().__init__(capacity)
        self.memory = memory
        self.pages: list[list[int]] = []  # of each slot

    def grow(self, count: int) -> None:
        for _ in range(count):
            self.slots.append(Slot(self, len(self.slots)))
            self.pages.append([self.memory.free.pop() for _ in range(self.capacity // PAGE)])

    def copy(self, source: Slot, target: Slot, num_tokens: int) -> None:
        count = -(-num_tokens // PAGE)
        ours, theirs = (torch.tensor(pages_of(s)[:count], device=self.memory.device) for s in (target, source))
        for side in (self.memory.k, self.memory.v):
            side.index_copy_(1, ours, side.index_select(1, theirs))

    def clear(self, slot: Slot) -> None:
        for side in (self.memory.k, self.memory.v):
            side[:, pages_of(slot)] = 0

    def release(self) -> None:
        for pages in self.pages:
            self.memory.free += pages
        self.slots, self.pages = [], []


def pages_of(slot: Slot) -> list[int]:
    assert isinstance(slot.pool, PagedPool)
    return slot.pool.pages[slot.index]


def page_table(slots: Sequence[Slot], width: int) -> torch.Tensor:
    """[n, width] int32: each slot's first pages, then page 0. A slot's capacity may go beyond the context, tokens do not."""
    table = torch.zeros(len(slots), width, dtype=torch.int32)
    for row, slot in enumerate(slots):
        pages = pages_of(slot)[:width]
        table[row, : len(pages)] = torch.tensor(pages)
    return table


@dataclass
class PagedDecode:
    """One new row for each of n sequences."""

    memory: Pages
    table: torch.Tensor  # [n, width] int32, see page_table
    positions: torch.Tensor  # [n] int64
    place: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [n]: of the new tokens among all pages' tokens

    def ready(self, dtype: torch.dtype) -> None:
        """Once a step, when the positions are those of the new tokens."""
        pages = self.table.gather(1, (self.positions // PAGE).unsqueeze(1)).squeeze(1)
        self.place = pages * PAGE + self.positions % PAGE

    def attend(self, layer: int, qkv: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor) -> None:
        q, kv = qkv[:, : heads.q], qkv[:, heads.q :]
        k, v = self.memory.k[layer], self.memory.v[layer]
        k.view(-1, heads.kv, heads.size).index_copy_(0, self.place, kv[:, : heads.kv])
        v.view(-1, heads.kv, heads.size).index_copy_(0, self.place, kv[:, heads.kv :])
        if q.is_cuda and (fast := kernels(q.device)) is not None:
            fast.attend_pages(q, k, v, self.table, self.positions, scaling, heads, out)
        else:
            attend_pages(q, k, v, self.table, self.positions, scaling, heads, out)


def attend_pages(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, scaling: float,
    heads: Heads, out: torch.Tensor,
) -> None:  # fmt: skip
    """What the kernel of that name computes, by torch's operations: the pages in use are copied."""
    used = table[:, : int(positions.max()) // PAGE + 1].long()
    keys, values = (side[used].flatten(1, 2).permute(0, 2, 1, 3) for side in (k, v))  # [n, kv, keys, size]
    scores = q.unflatten(1, (heads.kv, heads.group)) @ keys.transpose(2, 3)
    hidden = torch.arange(keys.shape[2], device=q.device) > positions.view(-1, 1, 1, 1)
    weights = torch.softmax(scores.mul(scaling).masked_fill(hidden, float("-inf")), dim=-1)
    out.copy_((weights @ values).flatten(1, 2))


class PagedPrefill:
    """Consecutive new rows of several sequences, one sequence after another, whose earlier positions their slots hold."""

    def __init__(self, memory: Pages, parts: Sequence[tuple[Slot, int, int]]) -> None:
        """`parts`: (slot, number of new rows, position of the first)."""
        device = memory.device
        self.memory = memory
        self.lengths = [length for _, length, _ in parts]
        self.ends = [position + length for _, length, position in parts]
        places = [_places(slot, end) for (slot, _, _), end in zip(parts, self.ends, strict=True)]
        new = [place[end - length :] for place, end, length in zip(places, self.ends, self.lengths, strict=True)]
        self.new = torch.cat(new).to(device)
        self.keys = None if self.lengths == self.ends else torch.cat(places).to(device)  # None: the new rows are all there is
        self.cu_rows, self.cu_keys = (_sums(counts, device) for counts in (self.lengths, self.ends))

    def attend(self, layer: int, qkv: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor) -> None:
        q, kv = qkv[:, : heads.q], qkv[:, heads.q :]
        k, v = (side[layer].view(-1, heads.kv, heads.size) for side in (self.memory.k, self.memory.v))
        k.index_copy_(0, self.new, kv[:, : heads.kv])
        v.index_copy_(0, self.new, kv[:, heads.kv :])
        if self.keys is None:
            keys, values = kv[:, : heads.kv], kv[:, heads.kv :]
        else:
            keys, values = k.index_select(0, self.keys), v.index_select(0, self.keys)
        kernel = varlen_between(q.device, q.dtype)
        if kernel is not None:
            out.copy_(kernel(q, keys, values, self.cu_rows, self.cu_keys, max(self.lengths), max(self.ends), scaling))
            return
        of_rows, of_keys = (q.split(self.lengths), out.split(self.lengths)), (keys.split(self.ends), values.split(self.ends))
        for queries, attended, one_keys, one_values in zip(*of_rows, *of_keys, strict=True):
            _attend_one(queries, one_keys, one_values, scaling, heads, attended)


def _attend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor
) -> None:
    """The last len(q) positions of one sequence, q [t, heads.q, size], over its k and v [keys, heads.kv, size]."""
    by_head = q.unflatten(1, (heads.kv, heads.group)).permute(1, 0, 2, 3)  # [kv, t, group, size]
    earlier = len(k) - len(q)
    for start in range(0, len(q), BLOCK):
        stop = min(start + BLOCK, len(q))
        seen = earlier + stop
        scores = by_head[:, start:stop].flatten(1, 2) @ k[:seen].permute(1, 2, 0)
        attended = causal_softmax(scores, scaling, heads.group) @ v[:seen].transpose(0, 1)
        out[start:stop] = attended.unflatten(1, (stop - start, heads.group)).transpose(0, 1).flatten(1, 2)


def _places(slot: Slot, num_tokens: int) -> torch.Tensor:
    """Where a slot's first tokens lie among all pages' tokens."""
    at = torch.arange(num_tokens)
    return torch.tensor(pages_of(slot))[at // PAGE] * PAGE + at % PAGE


def _sums(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
