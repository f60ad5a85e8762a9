"""Logprobs of target tokens in fp32 without (T, V) logits of a whole micro-batch: chunks, each worked while it is in cache.

Logits in bf16 would carry 0.03-0.06 nats of rounding at the usual sizes (|logit| about 20), unfit for RL ratios. Where a
matrix product cannot return fp32 (CPU), it returns logits relative to the first target's, which is known in fp32 from a dot
product and enters as the product's bias before the one rounding: what matters to log p is then near zero and accurate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from core.lora import Segment, SiteRows, mm_into

UNEMBED = "unembed"
ROW_MULTIPLE = 32  # rows of a chunk: few distinct shapes

# (rows of the chunk among the selected rows, logprobs [n, K]) -> d loss / d logprobs [n, K]
GradientOf = Callable[[slice, torch.Tensor], torch.Tensor]


@dataclass
class Head:
    weight: torch.Tensor  # [V, d]
    bias: torch.Tensor | None  # [V]


@dataclass
class Part:
    """Consecutive selected rows that one segment serves."""

    rows: slice  # among the selected rows
    segment: Segment
    scale: torch.Tensor | float  # [rows, R], or one factor for all


def chunk_rows(device: torch.device) -> int:
    return 256 if device.type == "cpu" else 1024


def run_head(
    head: Head, h: torch.Tensor, targets: torch.Tensor, parts: Sequence[Part], gradient_of: GradientOf | None,
    exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """h [n, d] (normalised, compute dtype), targets [n, K] -> (logprobs [n, K] fp32, d h [n, d] or None).

    With `gradient_of`, each chunk's backward runs at once and adds the unembedding adapters' gradients to their segments.
    `exact`: chunks are filled up to one size.
    """
    logprobs = torch.empty(targets.shape, dtype=torch.float32, device=h.device)
    dh = torch.empty_like(h) if gradient_of is not None else None
    step = chunk_rows(h.device)
    for start, stop in [(p.rows.start, p.rows.stop) for p in parts] if exact else [(0, len(h))]:
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            n = rows.stop - rows.start
            fill = (0, 0, 0, -n % (step if exact else ROW_MULTIPLE))
            chunk = _Chunk(head, F.pad(h[rows], fill), F.pad(targets[rows], fill), _pieces(parts, rows, n + fill[3]))
            logprobs[rows] = chunk.logprobs[:n]
            if gradient_of is not None and dh is not None:
                dh[rows] = chunk.backward(F.pad(gradient_of(rows, chunk.logprobs[:n]), fill))[:n]
    return logprobs, dh


@dataclass
class _Piece:
    """Rows of a chunk whose segment adapts the unembedding; u is the scaled h A^T [rows, R], b [V, R]."""

    rows: slice
    segment: Segment
    site: SiteRows
    scale: torch.Tensor | float
    b: torch.Tensor
    u: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def scaled(self, u: torch.Tensor) -> torch.Tensor:
        return u if isinstance(self.scale, float) and self.scale == 1.0 else u.mul_(self.scale)


def _pieces(parts: Sequence[Part], rows: slice, filled: int) -> list[_Piece]:
    """Of a chunk of `rows`, filled up to so many; a piece that is all of them is filled up too."""
    found = []
    for part in parts:
        start, stop = max(part.rows.start, rows.start), min(part.rows.stop, rows.stop)
        site = part.segment.geometry.sites.get(UNEMBED)
        if site is None or start >= stop:
            continue
        scale, mine = part.scale, slice(start - rows.start, stop - rows.start)
        if isinstance(scale, torch.Tensor):
            scale = scale[start - part.rows.start : stop - part.rows.start]
        if start == rows.start and stop == rows.stop:
            mine = slice(0, filled)
            scale = F.pad(scale, (0, 0, 0, filled - len(scale))) if isinstance(scale, torch.Tensor) else scale
        found.append(_Piece(mine, part.segment, site, scale, part.segment.factors[site.b[0]]))
    return found


class _Chunk:
    """One chunk: `exp` holds exp(logit - shift) as [V, n] with zeros at the first targets, `total` its sum with them, fp32."""

    def __init__(self, head: Head, h: torch.Tensor, targets: torch.Tensor, pieces: list[_Piece]) -> None:
        self.head, self.h, self.targets, self.pieces = head, h, targets, pieces
        for piece in pieces:
            piece.u = piece.scaled(h[piece.rows] @ piece.segment.a(piece.site, piece.segment.factors))
        target_logits = self._target_logits()
        self._exponentiate(target_logits[:, 0], target_logits[:, 0].to(h.dtype))
        if not bool(torch.isfinite(self.total).all()):  # some logit is over 80 above the target's: shift by the largest
            self._exponentiate(target_logits[:, 0], self._logits(torch.zeros_like(h[:, 0])).amax(0))
        self.logprobs = target_logits - (self.total.log() + self.shift.float()).unsqueeze(1)

    def _target_logits(self) -> torch.Tensor:
        """[n, K] fp32: dot products for the targets alone."""
        logits = torch.linalg.vecdot(self.h.float().unsqueeze(1), F.embedding(self.targets, self.head.weight).float())
        if self.head.bias is not None:
            logits += self.head.bias[self.targets].float()
        for piece in self.pieces:
            b = F.embedding(self.targets[piece.rows], piece.b).float()
            logits[piece.rows] += torch.linalg.vecdot(piece.u.float().unsqueeze(1), b)
        return logits

    def _logits(self, shift: torch.Tensor) -> torch.Tensor:
        """Logits minus shift [n] as [V, n]; the shift is the product's bias, so it is subtracted before rounding."""
        logits = F.linear(self.head.weight, self.h, -shift)
        if self.head.bias is not None:
            logits += self.head.bias.unsqueeze(1)
        for piece in self.pieces:
            logits[:, piece.rows].addmm_(piece.b, piece.u.T)
        return logits

    def _exponentiate(self, target_logit: torch.Tensor, shift: torch.Tensor) -> None:
        self.shift, columns = shift, torch.arange(len(shift), device=shift.device)
        self.exp = self._logits(shift).exp_()
        self.exp[self.targets[:, 0], columns] = 0
        self.target_exp = (target_logit - shift.float()).exp()
        self.total = _column_sums(self.exp) + self.target_exp

    def backward(self, g: torch.Tensor) -> torch.Tensor:
        """d h for d logprobs g [n, K]; d logits = sum_k g_k onehot(target_k) - (sum_k g_k) softmax."""
        g_total = g.sum(1)
        columns = torch.arange(len(g), device=g.device)
        d_logits = self.exp.mul_((-g_total / self.total).to(self.exp.dtype))
        at_targets = g.clone()
        at_targets[:, 0] -= g_total * self.target_exp / self.total
        for k in range(g.shape[1]):
            d_logits.index_put_((self.targets[:, k], columns), at_targets[:, k].to(d_logits.dtype), accumulate=True)
        dh = d_logits.T @ self.head.weight
        for piece in self.pieces:
            segment, mine, h = piece.segment, d_logits[:, piece.rows], self.h[piece.rows]
            du = piece.scaled(mine.T @ piece.b)
            if segment.grad is not None:
                _add_product(segment.grad[piece.site.b[0]], mine, piece.u)
                _add_product(segment.a(piece.site, segment.grad), h.T, du)
            dh[piece.rows].addmm_(du, segment.a(piece.site, segment.factors).T)
        return dh


def _column_sums(exp: torch.Tensor) -> torch.Tensor:
    """Sums of [V, n] over V, fp32 [n]."""
    if exp.dtype == torch.float32:
        return exp.sum(0)  # in parts; a product adds 50,000 terms one after another and loses 3e-5
    ones = exp.new_ones(1, len(exp))  # bf16: a product, 30 times faster than sum(0)
    return (torch.mm(ones, exp, out_dtype=torch.float32) if exp.is_cuda else ones @ exp).squeeze(0).float()


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        product = torch.empty_like(out)
        mm_into(product, left, right)
        out.add_(product)
