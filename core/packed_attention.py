"""Causal attention of a packed micro-batch on a CPU as one call of C (core/native_attention.c) in each direction.

Rows are read and written where they lie: no padding to common lengths, no copies between layouts, nothing after a query is
multiplied, and only two numbers per query and head are kept for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from core import native

if TYPE_CHECKING:
    from core.attention import Extent, Heads


@dataclass(frozen=True)
class Table:
    """Which rows attend to which, all int64. E extents; P keys before own rows, of all extents together."""

    keys: torch.Tensor  # rows of every extent's keys by position, one extent after another
    ends: torch.Tensor  # [E + 1]: extent e has keys[ends[e] : ends[e + 1]]
    own: torch.Tensor  # [E]: so many last keys are the extent's own rows, its queries
    order: torch.Tensor  # [E], those that take longest first
    parts: torch.Tensor  # [E]: the first of the extent's keys before its own rows, among all P
    shared: torch.Tensor  # [S] rows that are keys before others' own rows
    shared_ends: torch.Tensor  # [S + 1]
    places: torch.Tensor  # [P]: those of shared[i] are places[shared_ends[i] : shared_ends[i + 1]]

    @classmethod
    def of(cls, extents: Sequence[Extent]) -> Table:
        prefixes = [torch.empty(0, dtype=torch.int64) if e.prefix is None else e.prefix for e in extents]
        own = torch.tensor([e.length for e in extents])
        before = torch.tensor([len(prefix) for prefix in prefixes])
        keys = [part for e, prefix in zip(extents, prefixes, strict=True)
                for part in (prefix, torch.arange(e.start, e.start + e.length))]  # fmt: skip
        rows, places = torch.cat(prefixes).sort(stable=True)
        shared, counts = torch.unique_consecutive(rows, return_counts=True)
        order = (own * (2 * before + own)).argsort(descending=True, stable=True)
        return cls(torch.cat(keys), _ends(before + own), own, order, _ends(before)[:-1], shared, _ends(counts), places)


def _ends(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).contiguous()


class PackedAttention(torch.autograd.Function):
    """qkv [T, heads.total, size] (q and k already rotated) -> [T, heads.q * size]."""

    @staticmethod
    def forward(ctx, qkv: torch.Tensor, table: Table, heads: Heads, scaling: float) -> torch.Tensor:
        out = qkv.new_empty(len(qkv), heads.q, heads.size)
        kept = torch.empty(len(qkv), heads.q, 2, dtype=torch.float32)
        native.call("packed_attention", qkv.dtype, *_given(qkv, table, heads, scaling), out, kept)
        ctx.save_for_backward(qkv, kept)
        ctx.table, ctx.heads, ctx.scaling = table, heads, scaling
        return out.view(len(qkv), -1)

    @staticmethod
    def backward(ctx, d_out: torch.Tensor):
        qkv, kept = ctx.saved_tensors
        table, heads, d_qkv = ctx.table, ctx.heads, torch.empty_like(qkv)
        d_parts = torch.empty(len(table.places), 2 * heads.kv, heads.size, dtype=torch.float32)
        native.call(
            "packed_attention_backward", qkv.dtype, *_given(qkv, table, heads, ctx.scaling),
            kept, d_out.contiguous(), d_qkv, table.parts, d_parts,
            table.shared, table.shared_ends, table.places, len(table.shared),
        )  # fmt: skip
        return d_qkv, None, None, None


def _given(qkv: torch.Tensor, table: Table, heads: Heads, scaling: float) -> tuple[torch.Tensor | float | int, ...]:
    extents = len(table.own)
    return qkv, table.keys, table.ends, table.own, table.order, extents, heads.q, heads.kv, heads.size, scaling
