"""Causal attention inside each sequence of a packed micro-batch; sequences never see each other.

CUDA: torch's variable-length kernel on the packed rows. CPUs: core/packed_attention.py. Where there is no compiler for that,
or heads are of an odd size: sequences of like length are gathered into padded groups and attended with two batched matrix
products per query block. That beats SDPA's CPU kernel 2-4 times at the lengths of chat data, and a query block never meets
keys that lie after it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from core import native
from core.packed_attention import PackedAttention, Table

BLOCK = 256  # queries per block; sequences up to this length keep their attention weights for backward
PAD_PREFIX_TO = 16  # the same for the keys before them
PAD_TO = 32  # lengths of groups are multiples of this: few distinct shapes, whole vector registers


@dataclass(frozen=True)
class Heads:
    """q heads, kv heads and their size; a packed row holds q heads, then k heads, then v heads: [T, q + 2 kv, size]."""

    q: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        return self.q // self.kv

    @property
    def total(self) -> int:
        return self.q + 2 * self.kv


@dataclass(frozen=True)
class Extent:
    """Consecutive rows of one sequence, and the rows of its earlier positions where these lie elsewhere (shared ones)."""

    start: int
    length: int
    prefix: torch.Tensor | None = None  # [p] row indices


@dataclass
class Group:
    """n extents padded to one length and one number of prefix keys, as gather indices into qkv.view(T * heads.total, size).

    Keys are [padding, prefix, own rows, padding]; `left` counts the padding before each prefix.
    """

    n: int
    length: int
    prefix: int  # keys before the own rows, padding included
    left: list[int]
    q_index: torch.Tensor  # [n * kv * length * group]
    k_index: torch.Tensor  # [n * kv * (prefix + length)]
    v_index: torch.Tensor  # the same
    out_index: torch.Tensor  # [n * kv * length * group] into the rows of out.view(T * heads.q, size)
    padding: torch.Tensor | None  # [n, 1, length, 1], true on padding; None when there is none
    masks: dict[int, torch.Tensor] = field(default_factory=dict)  # by number of keys
    lefts: torch.Tensor | None = None

    def left_of(self, kv: int) -> torch.Tensor:
        """`left` for each of the n * kv batches."""
        if self.lefts is None:
            self.lefts = torch.tensor(self.left, dtype=torch.int32).repeat_interleave(kv)
        return self.lefts


@dataclass
class Shared:
    """R rows of d(qkv) with m + 1 parts each: their own, and one from each of the m extents that have them as prefix."""

    parts: torch.Tensor  # [(m + 1) * R] into the concatenated group gradients
    ones: torch.Tensor  # [1, m + 1]: a product with it adds the parts up in fp32
    rows: torch.Tensor  # [R] rows of d(qkv).view(T * heads.total, size)


@dataclass
class Layout:
    """How the rows of one micro-batch fall into sequences, made once and used by every layer."""

    heads: Heads
    table: Table | None  # for one call of C; the groups are for elsewhere
    groups: list[Group]
    out_index: torch.Tensor  # [T * q]: where each output row lies in the concatenated group outputs
    grad_index: torch.Tensor  # [T * total]: where each row of d(qkv) lies in the concatenated group gradients
    shared: list[Shared]
    cu_seqlens: torch.Tensor  # [num_extents + 1], int32
    max_length: int
    num_rows: int


def consecutive(lengths: Sequence[int]) -> list[Extent]:
    """Extents of whole sequences, one after another."""
    return [Extent(end - length, length) for length, end in zip(lengths, accumulate(lengths), strict=True)]


def make_layout(extents: Sequence[Extent], heads: Heads, device: torch.device, dtype: torch.dtype) -> Layout:
    """`extents` in row order; together they hold every row once. On CUDA none may have a prefix."""
    lengths = [extent.length for extent in extents]
    num_rows = sum(lengths)
    out_index = torch.empty(num_rows, heads.q, dtype=torch.int64)
    grad_index = torch.empty(num_rows, heads.total, dtype=torch.int64)
    groups: list[Group] = []
    shared: list[Shared] = []
    table = Table.of(extents) if device.type == "cpu" and native.packs(dtype, heads.size) else None
    if table is None and varlen_between(device, dtype) is None:
        out_offset = grad_offset = 0
        used: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows used as prefix, where the gradients of their k and v lie
        for members, length in _group_alike(extents):
            group = _make_group(members, length, heads, device)
            groups.append(group)
            out_offset, grad_offset = _invert(members, group, heads, out_index, grad_index, out_offset, grad_offset, used)
        shared = _shared(used, grad_index, heads, device, dtype)
    return Layout(
        heads, table, groups, out_index.view(-1).to(device), grad_index.view(-1).to(device), shared,
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths), num_rows,
    )  # fmt: skip


def _prefix_length(extent: Extent) -> int:
    return 0 if extent.prefix is None else len(extent.prefix)


def _group_alike(extents: Sequence[Extent]) -> list[tuple[list[Extent], int]]:
    """Extents whose padded lengths are close share a group; padding stays under an eighth of its rows."""
    padded = {id(e): -(-_prefix_length(e) // PAD_PREFIX_TO) * PAD_PREFIX_TO for e in extents}
    groups: list[tuple[list[Extent], int]] = []
    padding = 0
    for extent in sorted(extents, key=lambda e: (-padded[id(e)], -e.length, e.start)):
        if groups:
            members, length = groups[-1]
            fits = padding + length - extent.length <= max(64, length * (len(members) + 1) // 8)
            if fits and padded[id(extent)] == padded[id(members[0])]:
                members.append(extent)
                padding += length - extent.length
                continue
        length = -(-extent.length // PAD_TO) * PAD_TO
        groups.append(([extent], length))
        padding = length - extent.length
    return groups


def _make_group(members: list[Extent], length: int, heads: Heads, device: torch.device) -> Group:
    position = torch.arange(length)
    last = torch.tensor([e.length for e in members]).unsqueeze(1) - 1
    row = torch.tensor([e.start for e in members]).unsqueeze(1) + torch.minimum(position, last)  # padding repeats the last
    prefixes = [_prefix_length(e) for e in members]
    prefix = -(-max(prefixes) // PAD_PREFIX_TO) * PAD_PREFIX_TO
    before = row[:, :1].expand(-1, prefix).clone()
    for i, extent in enumerate(members):
        if extent.prefix is not None:
            before[i, prefix - len(extent.prefix) :] = extent.prefix
    kv = torch.arange(heads.kv)
    key_rows = torch.cat([before, row], dim=1)[:, None, :] * heads.total
    k = key_rows + heads.q + kv[None, :, None]
    head = kv[None, :, None, None] * heads.group + torch.arange(heads.group)
    q = row[:, None, :, None] * heads.total + head
    out = row[:, None, :, None] * heads.q + head
    padding = (position > last)[:, None, :, None].to(device) if int(last.min()) + 1 < length else None
    q_index, k_index, v_index, out_index = (t.reshape(-1).to(device) for t in (q, k, k + heads.kv, out))
    left = [prefix - p for p in prefixes]
    return Group(len(members), length, prefix, left, q_index, k_index, v_index, out_index, padding)


def _invert(
    members: list[Extent], group: Group, heads: Heads, out_index: torch.Tensor, grad_index: torch.Tensor,
    out_offset: int, grad_offset: int, used: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[int, int]:  # fmt: skip
    """Fill the inverse of a group's gather for its extents; returns the offsets after the group."""
    n, kv, keys = len(members), heads.kv, group.prefix + group.length
    num_q, num_k = n * kv * group.length * heads.group, n * kv * keys
    q_place = torch.arange(num_q).view(n, kv, group.length, heads.group)
    k_place = grad_offset + num_q + torch.arange(num_k).view(n, kv, keys)
    for i, extent in enumerate(members):
        q_rows = q_place[i, :, : extent.length].transpose(0, 1).reshape(extent.length, heads.q)
        k_rows = k_place[i].T
        own = k_rows[group.prefix : group.prefix + extent.length]
        rows = slice(extent.start, extent.start + extent.length)
        out_index[rows] = out_offset + q_rows
        grad_index[rows, : heads.q] = grad_offset + q_rows
        grad_index[rows, heads.q :] = torch.cat([own, num_k + own], dim=1)
        if extent.prefix is not None:
            before = k_rows[group.left[i] : group.prefix]
            used.append((extent.prefix, torch.cat([before, num_k + before], dim=1)))
    return out_offset + num_q, grad_offset + num_q + 2 * num_k


def _shared(
    used: list[tuple[torch.Tensor, torch.Tensor]], grad_index: torch.Tensor, heads: Heads, device: torch.device,
    dtype: torch.dtype,
) -> list[Shared]:  # fmt: skip
    """What to add up for the rows that serve as prefix, rows of equally many parts together."""
    if not used:
        return []
    rows, places = torch.cat([r for r, _ in used]), torch.cat([p for _, p in used])
    by_row = torch.argsort(rows, stable=True)
    distinct, counts = torch.unique_consecutive(rows[by_row], return_counts=True)
    places = places[by_row].split(counts.tolist())
    found = []
    for m in sorted(set(counts.tolist())):
        here = (counts == m).nonzero().squeeze(1).tolist()
        own = grad_index[distinct[here], heads.q :]  # [r, 2 kv]
        parts = torch.cat([own.unsqueeze(0), torch.stack([places[i] for i in here], dim=1)])  # [m + 1, r, 2 kv]
        flat = distinct[here].unsqueeze(1) * heads.total + torch.arange(heads.q, heads.total)
        ones = torch.ones(1, m + 1, dtype=dtype, device=device)
        found.append(Shared(parts.reshape(-1).to(device), ones, flat.reshape(-1).to(device)))
    return found


def attend(qkv: torch.Tensor, layout: Layout, scaling: float) -> torch.Tensor:
    """Attention of packed rows: qkv [T, heads.total, size] (q and k already rotated) -> [T, heads.q * size]."""
    if layout.table is not None:
        return PackedAttention.apply(qkv, layout.table, layout.heads, scaling)  # pyright: ignore[reportReturnType]
    kernel = varlen_between(qkv.device, qkv.dtype)
    if kernel is not None:
        heads, ends, longest = layout.heads, layout.cu_seqlens, layout.max_length
        q, k, v = qkv.split([heads.q, heads.kv, heads.kv], dim=1)
        return kernel(q, k, v, ends, ends, longest, longest, scaling).reshape(layout.num_rows, -1)
    return _Grouped.apply(qkv, layout, scaling)


class _Grouped(torch.autograd.Function):
    """Padded groups, blocked by queries. Weights of one-block groups are kept for backward, others recomputed."""

    @staticmethod
    def forward(ctx, qkv: torch.Tensor, layout: Layout, scaling: float) -> torch.Tensor:
        outputs, kept = [], []
        for group in layout.groups:
            q, k, v = _gather(qkv, group, layout.heads)
            out = torch.empty_like(q)
            for rows, keys in _blocks(group, layout.heads.group):
                weights = _weights(q[:, rows], k[:, :keys], group, layout.heads, scaling)
                torch.bmm(weights, v[:, :keys], out=out[:, rows])
            kept.append(weights if group.length <= BLOCK and ctx.needs_input_grad[0] else None)
            outputs.append(out.view(-1, layout.heads.size))
        ctx.layout, ctx.scaling, ctx.kept = layout, scaling, kept
        ctx.save_for_backward(qkv)
        stacked = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return stacked.index_select(0, layout.out_index).view(layout.num_rows, -1)

    @staticmethod
    def backward(ctx, d_out: torch.Tensor):
        (qkv,) = ctx.saved_tensors
        layout, heads, grads = ctx.layout, ctx.layout.heads, []
        d_heads = d_out.reshape(layout.num_rows, heads.q, heads.size)
        for group, kept in zip(layout.groups, ctx.kept, strict=True):
            q, k, v = _gather(qkv, group, heads)
            d = _gather_out_grad(d_heads, group, heads)
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for rows, keys in _blocks(group, heads.group):
                beta = 0.0 if group.length <= BLOCK else 1.0  # a single block need not read what it adds to
                block_k, block_v = k[:, :keys], v[:, :keys]
                weights = kept if kept is not None else _weights(q[:, rows], block_k, group, heads, ctx.scaling)
                dv[:, :keys].baddbmm_(weights.transpose(1, 2), d[:, rows], beta=beta)
                d_weights = torch.bmm(d[:, rows], block_v.transpose(1, 2))
                d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                torch.bmm(d_scores, block_k, out=dq[:, rows])
                dk[:, :keys].baddbmm_(d_scores.transpose(1, 2), q[:, rows], alpha=ctx.scaling, beta=beta)
            grads += [dq.mul_(ctx.scaling).view(-1, heads.size), dk.view(-1, heads.size), dv.view(-1, heads.size)]
        stacked = torch.cat(grads)
        d_qkv = stacked.index_select(0, layout.grad_index)
        for shared in layout.shared:
            parts = stacked.index_select(0, shared.parts).view(shared.ones.shape[1], -1)
            d_qkv.index_copy_(0, shared.rows, (shared.ones @ parts).view(-1, heads.size))
        return d_qkv.view_as(qkv), None, None


def _gather(qkv: torch.Tensor, group: Group, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [n * kv, length * group, size] (rows of one position adjacent), k and v [n * kv, prefix + length, size]."""
    flat = qkv.view(-1, heads.size)
    q, k, v = (flat.index_select(0, index) for index in (group.q_index, group.k_index, group.v_index))
    batch = group.n * heads.kv
    return q.view(batch, -1, heads.size), k.view(batch, -1, heads.size), v.view(batch, -1, heads.size)


def _gather_out_grad(d_heads: torch.Tensor, group: Group, heads: Heads) -> torch.Tensor:
    """The output's gradient in the group's layout, zero on padding."""
    d = d_heads.view(-1, heads.size).index_select(0, group.out_index)
    if group.padding is not None:
        d.view(group.n, heads.kv, group.length, -1).masked_fill_(group.padding, 0)
    return d.view(group.n * heads.kv, -1, heads.size)


def _blocks(group: Group, heads_per_kv: int) -> list[tuple[slice, int]]:
    """(query rows, number of keys they may see) of each block."""
    return [
        (slice(start * heads_per_kv, stop * heads_per_kv), group.prefix + stop)
        for start in range(0, group.length, BLOCK)
        for stop in [min(start + BLOCK, group.length)]
    ]


def _weights(q: torch.Tensor, k: torch.Tensor, group: Group, heads: Heads, scaling: float) -> torch.Tensor:
    """softmax(scaling q k^T) of the last len(q) / heads.group positions among the keys, causal, padding left out."""
    num_keys = k.shape[1]
    if q.device.type == "cpu" and native.available():
        scores = torch.bmm(q, k.transpose(1, 2))
        return native.causal_softmax(scores, scaling, group.left_of(heads.kv), heads.group)
    mask = group.masks.get(num_keys)
    if mask is None:
        mask = group.masks[num_keys] = _mask(group, q.shape[1] // heads.group, num_keys, heads.group, q)
    scores = torch.bmm(q, k.transpose(1, 2))  # not baddbmm: it would first copy the mask to every head
    view = scores.view(len(mask), -1, *scores.shape[1:]) if len(mask) > 1 else scores
    torch.add(mask, view, alpha=scaling, out=view)
    return torch.softmax(scores, dim=-1)


_causal: dict[tuple, torch.Tensor] = {}


def _mask(group: Group, num_queries: int, num_keys: int, heads_per_kv: int, like: torch.Tensor) -> torch.Tensor:
    """0 or -inf: [1, Q, keys] when all extents have the same padding before their prefix, else [n, 1, Q, keys]."""
    alike = len(set(group.left)) == 1
    left = group.left[:1] if alike else group.left
    key = (num_queries, num_keys, heads_per_kv, left[0], like.dtype, like.device)
    if alike and key in _causal:
        return _causal[key]
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    allowed = allowed & (torch.arange(num_keys) >= torch.tensor(left).view(-1, 1, 1))
    mask = torch.zeros(allowed.shape, dtype=like.dtype).masked_fill_(~allowed, float("-inf"))
    mask = mask.repeat_interleave(heads_per_kv, 1).to(like.device)
    if not alike:
        return mask.unsqueeze(1)
    if len(_causal) > 64:
        _causal.clear()
    _causal[key] = mask
    return mask


# (q, k, v, ends of the sequences' queries, of their keys, most queries, most keys, scaling); the last query sees the last key
VarlenKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, float], torch.Tensor]


def varlen_between(device: torch.device, dtype: torch.dtype) -> VarlenKernel | None:
    """torch.nn.attention.varlen.varlen_attn where this torch has it, on CUDA and in bfloat16; else None."""
    return _find_varlen() if device.type == "cuda" and dtype == torch.bfloat16 else None


@functools.cache
def _find_varlen() -> VarlenKernel | None:
    """Arguments moved between torch releases: pass what the signature names, refuse what lacks a scale or causality."""
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    names = inspect.signature(varlen_attn).parameters
    if "scale" not in names or not ({"is_causal", "window_size"} & set(names)):
        return None
    causal = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    gqa = {"enable_gqa": True} if "enable_gqa" in names else {}

    def call(q, k, v, q_ends, k_ends, most_queries, most_keys, scaling):
        return varlen_attn(
            q.contiguous(), k.contiguous(), v.contiguous(), q_ends, k_ends, most_queries, most_keys,
            scale=scaling, **causal, **gqa,
        )  # fmt: skip

    def call_repeated(q, k, v, *rest):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return call(q, k, v, *rest)

    return call if gqa or _agree(call, call_repeated) else call_repeated


def _agree(one: VarlenKernel, other: VarlenKernel) -> bool:
    """Whether two kernels give the same output and gradients where query heads share key-value heads."""
    q, k, v = (torch.randn(6, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    ends = torch.tensor([0, 2, 6], dtype=torch.int32, device="cuda")

    def results(kernel: VarlenKernel) -> list[torch.Tensor]:
        a, b, c = (t.clone().requires_grad_() for t in (q, k, v))
        out = kernel(a, b, c, ends, ends, 4, 4, 0.125)
        return [out, *torch.autograd.grad(out.float().square().sum(), (a, b, c))]

    try:
        return all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(results(one), results(other), strict=True))
    except (RuntimeError, ValueError):
        return False
