"""engine.exact: every row of a pass is computed in products of one shape, so that its numbers depend on its own sequence alone.

A product's rounding depends on its number of rows. Here products take TILE rows, filled up with zeros, and attention takes
QUERIES positions of one sequence against all keys up to the end of their block: training, prompts and decoding alike. Samples
are then fixed by their seed whatever else is in flight, and the sampler's logprobs are the trainer's to the bit, in bf16 too.
It costs several times the work of an ordinary pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F

from core.attention import Extent, Heads
from core.kv_cache import Slabs, Slot

TILE = 256  # rows of a product
QUERIES = 32  # positions of a block of attention


def tiled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, d_in] times weight [d_out, d_in] transposed, plus bias, TILE rows at a time."""
    padded = F.pad(x, (0, 0, 0, -len(x) % TILE))
    return torch.cat([F.linear(rows, weight, bias) for rows in padded.split(TILE)])[: len(x)]


def attend_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, scaling: float, heads: Heads
) -> torch.Tensor:
    """One sequence's attention: q [t, heads.q, size] at positions from `position` on, k and v [keys, heads.kv, size] from 0 on.

    -> [t, heads.q, size]. Differentiable.
    """
    first, stop = position // QUERIES, position + len(q)
    last = -(-stop // QUERIES)
    q = F.pad(q, (0, 0, 0, 0, position - first * QUERIES, last * QUERIES - stop))
    k, v = (F.pad(t[:stop], (0, 0, 0, 0, 0, last * QUERIES - stop)).transpose(0, 1).contiguous() for t in (k, v))
    outs = []
    for block in range(first, last):
        keys = (block + 1) * QUERIES
        at = slice((block - first) * QUERIES, (block - first + 1) * QUERIES)
        queries = q[at].unflatten(1, (heads.kv, heads.group)).permute(1, 0, 2, 3).flatten(1, 2).contiguous()
        scores = torch.bmm(queries, k[:, :keys].contiguous().transpose(1, 2)) * scaling
        hidden = torch.ones(QUERIES, keys, dtype=torch.bool, device=q.device).triu(keys - QUERIES + 1)
        weights = torch.softmax(scores.masked_fill(hidden.repeat_interleave(heads.group, 0), float("-inf")), dim=-1)
        out = torch.bmm(weights, v[:, :keys].contiguous())
        outs.append(out.unflatten(1, (QUERIES, heads.group)).transpose(0, 1).flatten(1, 2))
    start = position - first * QUERIES
    return torch.cat(outs)[start : start + stop - position]


def attend_extents(qkv: torch.Tensor, extents: Sequence[Extent], heads: Heads, scaling: float) -> torch.Tensor:
    """Whole sequences in packed rows: qkv [T, heads.total, size] -> [T, heads.q * size]."""
    outs = []
    for part in qkv.split([extent.length for extent in extents]):
        q, k, v = part.split([heads.q, heads.kv, heads.kv], dim=1)
        outs.append(attend_blocks(q, k, v, 0, scaling, heads))
    return torch.cat(outs).flatten(1)


@dataclass
class ExactAttention:
    """New rows of several sequences, one sequence after another: (slot, number of new rows, position of the first)."""

    parts: Sequence[tuple[Slot, int, int]]

    def attend(self, layer: int, qkv: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor) -> None:
        q, kv = qkv[:, : heads.q], qkv[:, heads.q :]
        out.zero_()  # rows that only fill up
        starts = accumulate((length for _, length, _ in self.parts), initial=0)
        for start, (slot, length, position) in zip(starts, self.parts, strict=False):
            rows, end, pool = slice(start, start + length), position + length, cast(Slabs, slot.pool)
            pool.keep(layer, slot, position, kv[rows])
            keys = pool.keys_of(layer, slot.index, end).permute(2, 0, 1)
            values = pool.v[layer, slot.index, :, :end].transpose(0, 1)
            out[rows] = attend_blocks(q[rows], keys, values, position, scaling, heads)
