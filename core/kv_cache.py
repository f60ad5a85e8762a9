"""Keys and values of sequences that are being sampled: slots of one capacity per pool, and what idle ones still hold.

A slot keeps the tokens whose keys and values it has. A later prompt that begins with them (the same weights, the next turn
of a conversation, another attempt at one prompt) copies or takes over the slot instead of computing them again.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import final

import torch

from core import native
from core.attention import Heads

SMALLEST = 64  # tokens of the smallest slots; capacities are powers of two of them
BLOCK = 16  # keys that lie together for core/native_sampling.c
PADDING = 16  # without it: rows of k a power of two apart would share cache lines' places, products a third slower
FIRST_TOKENS = 1024  # room of a new pool, at least one slot; it doubles when it is full


@dataclass(eq=False)
class Slot:
    """Room for one sequence. `tokens` have their keys and values in it; `weights` says under which adapter."""

    pool: Pool
    index: int
    weights: Hashable = None
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    used: int = 0  # when it was last taken or left


class Pool(ABC):
    """Slots of one capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.num_busy = capacity, 0
        self.slots: list[Slot] = []

    @abstractmethod
    def grow(self, count: int) -> None:
        """More slots."""

    @abstractmethod
    def copy(self, source: Slot, target: Slot, num_tokens: int) -> None:
        """The first tokens of `source` (of any pool) into `target`."""

    @abstractmethod
    def clear(self, slot: Slot) -> None:
        """Zeros in place of what the slot holds."""

    @abstractmethod
    def release(self) -> None:
        """The pool goes; nobody uses its slots."""

    def place_for(self, slot: Slot) -> Slot:
        """Where a sequence that keeps running had better lie."""
        return slot


@final
class Slabs(Pool):
    """k [layers, slots, kv, blocks, size, width] and v [layers, slots, kv, capacity, size].

    For batched products a slot's keys are one block, with padding; for core/native_sampling.c blocks of 16.
    """

    def __init__(
        self, capacity: int, most: int, num_layers: int, heads: Heads, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`most`: slots that it can ever have. On a CPU memory is taken page by page as slots are first used."""
        super().__init__(capacity)
        room = most if device.type == "cpu" else 0
        self.natively = device.type == "cpu" and native.available()
        self.width = BLOCK if self.natively else capacity + PADDING
        blocks = capacity // BLOCK if self.natively else 1
        self.k = _zeros((num_layers, room, heads.kv, blocks, heads.size, self.width), dtype, device)
        self.v = _zeros((num_layers, room, heads.kv, capacity, heads.size), dtype, device)

    def grow(self, count: int) -> None:
        self.slots += [Slot(self, len(self.slots) + i) for i in range(count)]
        for name in ("k", "v"):
            old = getattr(self, name)
            if (missing := len(self.slots) - old.shape[1]) > 0:
                setattr(self, name, torch.cat([old, old.new_zeros(len(old), missing, *old.shape[2:])], dim=1))

    def copy(self, source: Slot, target: Slot, num_tokens: int) -> None:
        n, pool = num_tokens, source.pool
        assert isinstance(pool, Slabs)
        blocks, last = -(-n // self.width), min(n, self.width)
        self.k[:, target.index, :, :blocks, :, :last] = pool.k[:, source.index, :, :blocks, :, :last]
        self.v[:, target.index, :, :n] = pool.v[:, source.index, :, :n]

    def keep(self, layer: int, slot: Slot, start: int, kv: torch.Tensor) -> None:
        """Keys and values [n, 2 * kv heads, size] of a slot's positions from `start` on."""
        keys, values = kv.chunk(2, dim=1)
        at = torch.arange(start, start + len(kv), device=kv.device)
        self.k[layer, slot.index, :, at // self.width, :, at % self.width] = keys
        self.v[layer, slot.index, :, start : start + len(kv)] = values.transpose(0, 1)

    def keys_of(self, layer: int, slots: int | slice, count: int) -> torch.Tensor:
        """The first keys [..., kv, size, count] of slots: a view where each has one block."""
        blocks = self.k[layer, slots, :, : -(-count // self.width)].transpose(-3, -2)  # [..., kv, size, blocks, width]
        return blocks.flatten(-2)[..., :count]

    def clear(self, slot: Slot) -> None:
        self.k[:, slot.index] = 0
        self.v[:, slot.index] = 0

    def release(self) -> None:
        pass

    def place_for(self, slot: Slot) -> Slot:
        """A lower slot: a step computes all slots up to the last busy one, idle ones too."""
        if slot.index < self.num_busy + self.num_busy // 8:
            return slot
        return next(other for other in self.slots if not other.busy)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, as what lies beyond a sequence's end has weight 0, and 0 * NaN would be NaN; of fresh pages on a CPU."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize))
    return torch.frombuffer(pages, dtype=torch.uint8)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class KvCache:
    """Pools by capacity, at most `max_tokens` of room in all."""

    def __init__(self, new_pool: Callable[[int, int], Pool], max_tokens: int) -> None:
        """`new_pool` makes one of a capacity with at most so many slots."""
        self.new_pool, self.max_tokens = new_pool, max_tokens
        self.pools: dict[int, Pool] = {}
        self._clock = 0

    @property
    def room(self) -> int:
        """Tokens that can still be made room for without giving anything up."""
        return self.max_tokens - sum(pool.capacity * len(pool.slots) for pool in self.pools.values())

    @property
    def in_use(self) -> int:
        """Tokens of room that sequences under way have. Any thread may ask."""
        return sum(pool.capacity * pool.num_busy for pool in list(self.pools.values()))

    @property
    def kept(self) -> int:
        """Tokens in slots that are not in use, for prompts that begin with them. Any thread may ask."""
        pools = list(self.pools.values())
        return sum(len(slot.tokens) for pool in pools for slot in list(pool.slots) if not slot.busy)

    def slots(self) -> Iterator[Slot]:
        for pool in self.pools.values():
            yield from pool.slots

    def take(
        self, tokens: list[int], num_tokens: int, weights: Hashable, expected: int = 1
    ) -> tuple[Slot, int] | None:
        """(a slot for a sequence of up to `num_tokens`, how many of `tokens` it already holds); None: no room now.

        `expected`: how many sequences of this capacity are asking, this one among them.
        """
        best, common = self._best(tokens, weights)
        capacity = self.capacity_for(num_tokens)
        if best is not None and not best.busy and best.pool.capacity == capacity and common * 2 >= len(best.tokens):
            slot = best
        else:
            slot = self._free(capacity, expected, keep=best)
            if slot is None and best is not None:  # what it would have kept stands in its way
                best, common = None, 0
                slot = self._free(capacity, expected, keep=None)
            if slot is None:
                return None
            if best is not None:
                slot.pool.copy(best, slot, common)
                if not best.busy and common == len(best.tokens):  # all it holds is here now
                    best.tokens, best.weights = [], None
        slot.tokens, slot.weights, slot.busy = tokens[:common], weights, True
        slot.pool.num_busy += 1
        self._touch(slot)
        return slot, common

    def moved_down(self, slot: Slot) -> Slot:
        """The slot, or where its sequence has moved."""
        lower = slot.pool.place_for(slot)
        if lower is slot:
            return slot
        slot.pool.copy(slot, lower, len(slot.tokens))
        lower.tokens, lower.weights, lower.busy = slot.tokens, slot.weights, True
        slot.tokens, slot.weights, slot.busy = [], None, False
        self._touch(lower)
        return lower

    def leave(self, slot: Slot, spoilt: bool = False) -> None:
        """The sequence has ended; its tokens stay findable. `spoilt`: what it holds is not finite, nor perhaps what it left
        behind where it lay before."""
        slot.busy = False
        slot.pool.num_busy -= 1
        self._touch(slot)
        weights = slot.weights
        for other in self.slots() if spoilt else ():
            if not other.busy and (not other.tokens or other.weights == weights):
                other.tokens, other.weights = [], None
                other.pool.clear(other)

    def capacity_for(self, num_tokens: int) -> int:
        return SMALLEST << max(0, (num_tokens - 1) // SMALLEST).bit_length()

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock

    def _best(self, tokens: list[int], weights: Hashable) -> tuple[Slot | None, int]:
        """The slot that shares the longest beginning with `tokens`; an idle one, if there is a choice."""
        best, length = None, 0
        for slot in self.slots():
            if slot.weights != weights or len(slot.tokens) < length or not slot.tokens:
                continue
            common = common_length(slot.tokens, tokens)
            if common > length or (common == length > 0 and best is not None and best.busy and not slot.busy):
                best, length = slot, common
        return best, length

    def _free(self, capacity: int, expected: int, keep: Slot | None) -> Slot | None:
        """An unused slot, new room, or the slot that has been idle for longest; that one first if most slots are idle."""
        pool = self.pools.get(capacity)
        idle = [slot for slot in pool.slots if not slot.busy] if pool is not None else []
        if empty := next((slot for slot in idle if not slot.tokens), None):
            return empty
        oldest = min((slot for slot in idle if slot is not keep), key=lambda slot: slot.used, default=None)
        if oldest is not None and len(idle) * 2 > len(oldest.pool.slots):
            return oldest
        want = capacity * max(expected, max(1, FIRST_TOKENS // capacity) if pool is None else len(pool.slots))
        if self.room < want:
            self._drop_idle_pools(but={capacity, keep.pool.capacity if keep is not None else 0}, want=want)
        if (count := min(want, self.room) // capacity) > 0:
            if pool is None:
                pool = self.pools[capacity] = self.new_pool(capacity, self.max_tokens // capacity)
            pool.grow(count)
            return pool.slots[-count]
        return oldest if oldest is not None or not idle else idle[0]

    def _drop_idle_pools(self, but: set[int], want: int) -> None:
        for capacity, pool in list(self.pools.items()):
            if self.room >= want:
                return
            if capacity not in but and not any(slot.busy for slot in pool.slots):
                pool.release()
                del self.pools[capacity]


def common_length(a: list[int], b: list[int]) -> int:
    """Tokens that both begin with."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
