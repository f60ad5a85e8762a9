"""New rows of sequences whose earlier keys and values are cached: the forward pass of sampling.

The numbers are those of the training pass (core/fused.py): fp32 residual stream, the same frozen tensors, the same adapter
factors, products in the compute dtype. Nothing is kept for a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from core import native
from core.attention import BLOCK, Heads
from core.decoder import Decoder
from core.elementwise import normalise, rotate_heads, swiglu
from core.fused import linear_product
from core.kv_cache import Slabs, Slot

SHORT = 256  # keys up to which a prompt's rows look at them one by one: products of so few take longer
KEYS_TO = 32  # keys of a decode step are padded to multiples of this: few distinct shapes


@dataclass
class CachedRows:
    """New rows of sequences of one pool, by core/native_sampling.c: one of each sequence, or all of a prompt's."""

    pool: Slabs
    rows: torch.Tensor  # [n] among the rows of the pass
    slots: torch.Tensor  # [n]
    all_positions: torch.Tensor  # of every row of the pass
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [n]

    def ready(self, dtype: torch.dtype) -> None:
        """Set positions to those of the new tokens."""
        self.positions = self.all_positions.index_select(0, self.rows)

    def attend(self, layer: int, qkv: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor) -> None:
        k, v = self.pool.k[layer], self.pool.v[layer]
        native.cached_attention(qkv, out, self.rows, self.slots, self.positions, k, v, scaling, heads)


@dataclass
class Decode:
    """One new row for each of n sequences of one pool: slots [low, high), of which `rows` and `slots` are in use."""

    pool: Slabs
    low: int
    high: int
    rows: torch.Tensor  # [n] among the rows of the pass
    slots: torch.Tensor  # [n]
    all_positions: torch.Tensor  # of every row of the pass
    dense: bool  # every slot of the range is in use, and the rows are all rows of the pass in slot order
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [n]
    num_keys: int = 0
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [slots in range, 1, 1, keys]

    @classmethod
    def of(cls, slots: Sequence[Slot], positions: torch.Tensor) -> list[Decode | CachedRows]:
        """Of the slots of each pool, in row order."""
        rows_of: dict[Slabs, list[int]] = {}
        for row, slot in enumerate(slots):
            rows_of.setdefault(cast(Slabs, slot.pool), []).append(row)
        found: list[Decode | CachedRows] = []
        for pool, rows in rows_of.items():
            taken = [slots[row].index for row in rows]
            if pool.natively:
                found.append(CachedRows(pool, torch.tensor(rows), torch.tensor(taken), positions))
                continue
            low, high = min(taken), max(taken) + 1
            dense = len(rows) == len(slots) and taken == list(range(low, high))
            of_rows, of_slots = (torch.tensor(numbers, device=positions.device) for numbers in (rows, taken))
            found.append(cls(pool, low, high, of_rows, of_slots, positions, dense))
        return found

    def ready(self, dtype: torch.dtype) -> None:
        """Set positions and mask to those of the new tokens."""
        self.positions = self.all_positions if self.dense else self.all_positions.index_select(0, self.rows)
        self.num_keys = -(-(int(self.positions.max()) + 1) // KEYS_TO) * KEYS_TO
        last = torch.zeros(self.high - self.low, dtype=torch.int64, device=self.slots.device)
        last[self.slots - self.low] = self.positions
        hidden = torch.arange(self.num_keys, device=last.device) > last.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=last.device).masked_fill_(hidden, float("-inf"))
        self.mask = mask[:, None, None]

    def attend(self, layer: int, qkv: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor) -> None:
        k, v, width = self.pool.k[layer], self.pool.v[layer], self.pool.width
        q, kv = qkv[:, : heads.q], qkv[:, heads.q :]
        mine = kv if self.dense else kv.index_select(0, self.rows)
        k[self.slots, :, self.positions // width, :, self.positions % width] = mine[:, : heads.kv]
        v[self.slots, :, self.positions] = mine[:, heads.kv :]
        n = self.high - self.low
        if self.dense:
            spread = q.contiguous()
        else:
            spread = q.new_zeros(n, *q.shape[1:])
            spread[self.slots - self.low] = q.index_select(0, self.rows)
        batch = n * heads.kv
        keys = self.pool.keys_of(layer, slice(self.low, self.high), self.num_keys).flatten(0, 1)
        values = v[self.low : self.high].view(batch, -1, heads.size)[:, : self.num_keys]
        scores = torch.bmm(spread.view(batch, heads.group, heads.size), keys)
        view = scores.view(n, heads.kv, heads.group, self.num_keys)
        torch.add(self.mask, view, alpha=scaling, out=view)
        attended = torch.bmm(torch.softmax(scores, dim=-1), values).view(n, heads.q, heads.size)
        if self.dense:
            out.copy_(attended)
        else:
            out.index_copy_(0, self.rows, attended.index_select(0, self.slots - self.low))


@dataclass
class Prefill:
    """Consecutive new rows [start, start + length) of one sequence, whose earlier positions its slot holds."""

    slot: Slot
    start: int
    length: int
    position: int

    @classmethod
    def of(cls, parts: Sequence[tuple[Slot, int, int]]) -> list[Attention]:
        """Of (slot, number of new rows, position of the first), one after another. Short ones go together."""
        starts = accumulate((length for _, length, _ in parts), initial=0)
        found: list[Attention] = []
        short: dict[Slabs, list[Prefill]] = {}
        for start, (slot, length, position) in zip(starts, parts, strict=False):
            pool, part = cast(Slabs, slot.pool), cls(slot, start, length, position)
            if position + length <= SHORT and pool.natively:
                short.setdefault(pool, []).append(part)
            else:
                found.append(part)
        for pool, of_pool in short.items():
            rows, slots, positions = (
                torch.tensor([number for part in of_pool for number in numbers(part)])
                for numbers in (
                    lambda part: range(part.start, part.start + part.length),
                    lambda part: [part.slot.index] * part.length,
                    lambda part: range(part.position, part.position + part.length),
                )
            )
            found.append(CachedRows(pool, rows, slots, positions, positions))
        return found

    def attend(self, layer: int, qkv: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor) -> None:
        q, kv = qkv[:, : heads.q], qkv[:, heads.q :]
        rows, end = slice(self.start, self.start + self.length), self.position + self.length
        pool = cast(Slabs, self.slot.pool)
        pool.keep(layer, self.slot, self.position, kv[rows])
        k, v = pool.keys_of(layer, self.slot.index, end), pool.v[layer, self.slot.index]
        grouped = q[rows].unflatten(1, (heads.kv, heads.group)).permute(1, 0, 2, 3)
        for start in range(0, self.length, BLOCK):
            stop = min(start + BLOCK, self.length)
            num_keys = self.position + stop
            block = grouped[:, start:stop].reshape(heads.kv, -1, heads.size)
            scores = torch.bmm(block, k[:, :, :num_keys])
            weights = causal_softmax(scores, scaling, heads.group)
            attended = torch.bmm(weights, v[:, :num_keys]).view(heads.kv, stop - start, heads.group, heads.size)
            out[self.start + start : self.start + stop] = attended.transpose(0, 1).reshape(stop - start, heads.q, heads.size)


def causal_softmax(scores: torch.Tensor, scaling: float, group: int) -> torch.Tensor:
    """softmax(scaling * scores) [kv, queries * group, keys] of the last queries among the keys; scores are used up."""
    batch, rows, num_keys = scores.shape
    if scores.device.type == "cpu" and native.available():
        return native.causal_softmax(scores, scaling, torch.zeros(batch, dtype=torch.int32), group)
    num_queries = rows // group
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device).triu(num_keys - num_queries + 1)
    mask = torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, float("-inf")).repeat_interleave(group, 0)
    return torch.softmax(torch.add(mask, scores, alpha=scaling, out=scores), dim=-1)


AddAdapters = Callable[[torch.Tensor, torch.Tensor, str], object]  # (x, y, site): y += what the rows' adapters make of x


class Attention(Protocol):
    """Attention of some rows of a pass, whose keys and values it also puts away."""

    def attend(self, layer: int, qkv: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor) -> None:
        """qkv [T, heads.total, size] (q heads, k heads, v heads); writes rows of out [T, heads.q, size]."""
        ...


def run(
    decoder: Decoder,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    add: AddAdapters,
    work: Sequence[Attention],
) -> torch.Tensor:
    """The residual stream after the last layer for new rows: tokens [T], positions [T] -> [T, d] fp32."""
    x = F.embedding(tokens, decoder.embedding).float()
    cos, sin = decoder.rotary_tables(x, positions)
    heads, dtype = decoder.heads, decoder.dtype
    attended = torch.empty(len(x), heads.q, heads.size, dtype=dtype, device=x.device)
    for index, layer in enumerate(decoder.layers):
        h, _ = normalise(x, layer.attention_norm, dtype)
        y = linear_product(h, layer.qkv, decoder.exact)
        add(h, y, layer.qkv.site)
        qkv = rotate_heads(y.view(-1, heads.total, heads.size), cos, sin, heads, layer.head_norms)
        for part in work:
            part.attend(index, qkv, decoder.scaling, heads, attended)
        a = attended.view(len(x), -1)
        y = linear_product(a, layer.output, decoder.exact)
        add(a, y, layer.output.site)
        x.add_(y)
        h, _ = normalise(x, layer.mlp_norm, dtype)
        gate_up = linear_product(h, layer.gate_up, decoder.exact)
        add(h, gate_up, layer.gate_up.site)
        a = swiglu(gate_up)
        y = linear_product(a, layer.down, decoder.exact)
        add(a, y, layer.down.site)
        x.add_(y)
    return x
