"""Triton kernels for CUDA: what lies between the matrix products, each read and written once, and attention of a decode step.

Same formulas as core/elementwise.py, computed in fp32 and rounded once. T rows, d hidden size.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false
# (the type checker reads a kernel as the Python function that it is written as)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from core.attention import Heads

_MIN_DOT = 16  # that a tile of tl.dot has at least, each way


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


@triton.jit
def _rms_forward(x, w, h, inverse, d, eps, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < d
    values = tl.load(x + row * d + at, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        inv = tl.load(inverse + row)
    else:
        inv = 1.0 / tl.sqrt(tl.sum(values * values, 0) / d + eps)
        tl.store(inverse + row, inv)
    weight = tl.load(w + at, mask=inside, other=0.0)
    tl.store(h + row * d + at, (values * inv * weight).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _rms_backward(dh, x, w, inverse, add, dx, d, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < d
    values = tl.load(x + row * d + at, mask=inside, other=0.0).to(tl.float32)
    inv = tl.load(inverse + row)
    g = tl.load(dh + row * d + at, mask=inside, other=0.0).to(tl.float32) * tl.load(w + at, mask=inside, other=0.0)
    along = tl.sum(g * values, 0) * inv * inv * inv / d
    found = g * inv - values * along
    if ADD:
        found += tl.load(add + row * d + at, mask=inside, other=0.0)
    tl.store(dx + row * d + at, found, mask=inside)


@triton.jit
def _swiglu_forward(gate_up, a, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(a + row * width + at, (gate * tl.sigmoid(gate) * up).to(a.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate_up, da, d_gate_up, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(da + row * width + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    d_gate = d * up * share * (1.0 + gate * (1.0 - share))
    d_up = d * gate * share
    kind = d_gate_up.dtype.element_ty
    tl.store(d_gate_up + row * 2 * width + at, d_gate.to(kind), mask=inside)
    tl.store(d_gate_up + row * 2 * width + width + at, d_up.to(kind), mask=inside)


@triton.jit
def _rotate(
    y, q_weight, k_weight, cos, sin, d_out, out, num_q, num_rotated, total, q_eps, k_eps, SIZE: tl.constexpr,
    NORMED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward: y -> rotated heads. Backward: the rotated heads' gradient d_out -> that of y. SIZE: of a head."""
    HALF: tl.constexpr = SIZE // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    inside = (head < total)[:, None] & (at < HALF)[None, :]
    first = row * total * SIZE + head[:, None] * SIZE + at[None, :]
    c = tl.load(cos + row * HALF + at, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * HALF + at, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
    turned = (head < num_rotated)[:, None]
    is_q = (head < num_q)[:, None]
    if NORMED or not BACKWARD:
        a = tl.load(y + first, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(y + first + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        q_a = tl.load(q_weight + at, mask=at < HALF, other=0.0)[None, :]
        q_b = tl.load(q_weight + HALF + at, mask=at < HALF, other=0.0)[None, :]
        k_a = tl.load(k_weight + at, mask=at < HALF, other=0.0)[None, :]
        k_b = tl.load(k_weight + HALF + at, mask=at < HALF, other=0.0)[None, :]
        weight_a = tl.where(is_q, q_a, k_a)
        weight_b = tl.where(is_q, q_b, k_b)
        mean = tl.sum(a * a + b * b, 1)[:, None] / SIZE
        inv = 1.0 / tl.sqrt(mean + tl.where(is_q, q_eps, k_eps))
    if BACKWARD:
        g_a = tl.load(d_out + first, mask=inside, other=0.0).to(tl.float32)
        g_b = tl.load(d_out + first + HALF, mask=inside, other=0.0).to(tl.float32)
        r_a = g_a * c + g_b * s
        r_b = g_b * c - g_a * s
        if NORMED:
            r_a *= weight_a
            r_b *= weight_b
            along = tl.sum(r_a * a + r_b * b, 1)[:, None] * inv * inv * inv / SIZE
            r_a = r_a * inv - a * along
            r_b = r_b * inv - b * along
        out_a = tl.where(turned, r_a, g_a)
        out_b = tl.where(turned, r_b, g_b)
    else:
        n_a = a
        n_b = b
        if NORMED:
            n_a = a * inv * weight_a
            n_b = b * inv * weight_b
        out_a = tl.where(turned, n_a * c - n_b * s, a)
        out_b = tl.where(turned, n_b * c + n_a * s, b)
    kind = out.dtype.element_ty
    tl.store(out + first, out_a.to(kind), mask=inside)
    tl.store(out + first + HALF, out_b.to(kind), mask=inside)


@triton.jit
def _attend_pages(
    q, k, v, table, positions, out, part_out, part_max, part_sum, scaling, q_stride, width, kv_heads, GROUP: tl.constexpr,
    SIZE: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence's query heads of one key-value head over a share of its pages."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member, at, key = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, PAGE)
    q_inside = (member < GROUP)[:, None] & (at < SIZE)[None, :]
    of_head = kv_head * GROUP * SIZE + member[:, None] * SIZE + at[None, :]
    q_at = row * kv_heads * GROUP * SIZE + of_head
    queries = tl.load(q + row * q_stride + of_head, mask=q_inside, other=0.0)
    num_keys = tl.load(positions + row).to(tl.int32) + 1
    num_pages = (num_keys + PAGE - 1) // PAGE
    each = (num_pages + SPLITS - 1) // SPLITS
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, BLOCK], tl.float32)
    for page in range(split * each, tl.minimum((split + 1) * each, num_pages)):
        where = tl.load(table + row * width + page).to(tl.int64)
        kv_at = ((where * PAGE + key[:, None]) * kv_heads + kv_head) * SIZE + at[None, :]
        kv_inside = ((page * PAGE + key) < num_keys)[:, None] & (at < SIZE)[None, :]
        keys = tl.load(k + kv_at, mask=kv_inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling
        scores = tl.where(((page * PAGE + key) < num_keys)[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - now[:, None])
        shrink = tl.exp(largest - now)
        values = tl.load(v + kv_at, mask=kv_inside, other=0.0)
        found = found * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        largest = now
    if SPLITS == 1:
        tl.store(out + q_at, (found / total[:, None]).to(out.dtype.element_ty), mask=q_inside)
    else:
        place = ((row * kv_heads + kv_head) * SPLITS + split) * GROUP + member
        tl.store(part_max + place, largest, mask=member < GROUP)
        tl.store(part_sum + place, total, mask=member < GROUP)
        tl.store(part_out + place[:, None] * SIZE + at[None, :], found, mask=q_inside)


@triton.jit
def _join_splits(
    part_out, part_max, part_sum, out, GROUP: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """One query head: its splits' sums, weighted by their largest scores."""
    pair, member = tl.program_id(0), tl.program_id(1)
    split, at = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
    place = (pair * SPLITS + split) * GROUP + member
    maxima = tl.load(part_max + place)
    scale = tl.exp(maxima - tl.max(maxima, 0))  # 0 for a split without keys, whose maximum is -inf
    total = tl.sum(scale * tl.load(part_sum + place), 0)
    parts = tl.load(part_out + place[:, None] * SIZE + at[None, :], mask=(at < SIZE)[None, :], other=0.0)
    joined = tl.sum(parts * scale[:, None], 0) / total
    tl.store(out + (pair * GROUP + member) * SIZE + at, joined.to(out.dtype.element_ty), mask=at < SIZE)


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))


def normed(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, inverse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x * inverse * weight in dtype, inverse [T, 1] fp32) for x [T, d]."""
    rows, d = x.shape
    given = inverse is not None
    found = inverse if inverse is not None else torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    h, block = torch.empty(rows, d, dtype=dtype, device=x.device), _power(d)
    if rows:
        _rms_forward[(rows,)](x.contiguous(), weight, h, found, d, eps, given, block, num_warps=_warps(block))
    return h, found


def normed_backward(
    dh: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, add: torch.Tensor | None
) -> torch.Tensor:
    rows, d = x.shape
    dx, block = torch.empty(rows, d, dtype=torch.float32, device=x.device), _power(d)
    if rows:
        given = dx if add is None else add.contiguous()
        args = (dh.contiguous(), x.contiguous(), weight, inverse, given, dx, d, add is not None, block)
        _rms_backward[(rows,)](*args, num_warps=_warps(block))
    return dx


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    a, block = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device), min(1024, _power(width))
    _swiglu_forward[(rows, triton.cdiv(width, block))](gate_up, a, width, block)
    return a


def swiglu_backward(gate_up: torch.Tensor, da: torch.Tensor) -> torch.Tensor:
    rows, width = da.shape
    found, block = torch.empty_like(gate_up), min(1024, _power(width))
    _swiglu_backward[(rows, triton.cdiv(width, block))](gate_up, da.contiguous(), found, width, block)
    return found


def rotated(
    y: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, heads: Heads,
    weights: tuple[torch.Tensor, torch.Tensor] | None, eps: tuple[float, float], d_out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Forward for y [T, heads.total, size], or, given d_out of that shape, its gradient (y is read if heads are normed)."""
    like = y if d_out is None else d_out.contiguous()
    assert like is not None
    out, per_program, half = torch.empty_like(like), min(16, _power(heads.total)), _power(heads.size // 2)
    q_weight, k_weight = weights if weights is not None else (cos, cos)
    _rotate[(len(like), triton.cdiv(heads.total, per_program))](
        like if y is None else y.contiguous(), q_weight, k_weight, cos.contiguous(), sin.contiguous(), like, out,
        heads.q, heads.q + heads.kv, heads.total, eps[0], eps[1], heads.size, weights is not None, d_out is not None,
        per_program, half,
    )  # fmt: skip
    return out


def attend_pages(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, scaling: float,
    heads: Heads, out: torch.Tensor,
) -> None:  # fmt: skip
    """q [n, heads.q, size] (rows may lie apart) -> out, over pages k and v [pages, keys, heads.kv, size]; table [n, width].

    Row i sees keys 0 ... positions[i]. Few rows share the work of a sequence among several programs.
    """
    n = len(q)
    splits = 1
    while n * heads.kv * splits < 256 and splits < 16:
        splits *= 2
    rows, block = max(_MIN_DOT, _power(heads.group)), max(_MIN_DOT, _power(heads.size))
    if splits == 1:
        parts = (out, out, out)
    else:
        count = n * heads.kv * splits * heads.group
        parts = tuple(torch.empty(count * m, dtype=torch.float32, device=q.device) for m in (heads.size, 1, 1))
    _attend_pages[(n, heads.kv, splits)](
        q, k, v, table, positions, out, *parts, scaling, q.stride(0), table.stride(0), heads.kv, heads.group, heads.size,
        splits, k.shape[1], rows, block, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _join_splits[(n * heads.kv, heads.group)](*parts, out, heads.group, heads.size, splits, block)
