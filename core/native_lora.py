"""The adapters' products of a training pass on a CPU: all adapters of a site as one call of C (core/native_lora.c) in each
direction, each at its own rank, for its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from core import native

if TYPE_CHECKING:
    from core.lora import Segment, SiteRows

MOST_MATRICES = 3  # of a site: what the C code's table has room for


def available(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and native.packs(dtype, 16)


def takes(x: torch.Tensor, name: str, segments: Sequence[Segment]) -> bool:
    """Whether the adapters of these rows go this way at this site: products of C take widths of a multiple of 16."""
    if not available(x.dtype, x.device):
        return False
    mine = [(segment, rows) for segment in segments if (rows := segment.geometry.sites.get(name)) is not None]
    return bool(mine) and all(
        isinstance(segment.scale, float)
        and segment.start % 16 == segment.end % 16 == 0
        and len(rows.b) <= MOST_MATRICES
        and all(width % 16 == 0 for width in (rows.site.d_in, *(matrix.d_out for matrix in rows.site.matrices)))
        for segment, rows in mine
    )


def add(x: torch.Tensor, y: torch.Tensor, name: str, segments: Sequence[Segment]) -> list[torch.Tensor | None]:
    """y [T, d_out] += s (x A^T) B^T; returns the scaled x A^T of each segment as [t, m * rank filled up]."""
    kept = [_room(segment, segment.geometry.sites.get(name)) for segment in segments]
    native.call("lora_add", x.dtype, *_given(name, segments, kept, kept, with_grad=False), x, y)
    return kept


def input_gradient(
    dy: torch.Tensor, dx: torch.Tensor, kept: Sequence[torch.Tensor | None], name: str, segments: Sequence[Segment]
) -> list[torch.Tensor | None]:
    """dx [T, d_in] += the adapters' part; dB goes to each segment's `grad`. Returns the scaled dy B, as `add` does x A^T."""
    found = [None if u is None else torch.empty_like(u) for u in kept]
    native.call("lora_input_gradient", dy.dtype, *_given(name, segments, kept, found), dy, dx)
    return found


def a_gradient(x: torch.Tensor, dus: Sequence[torch.Tensor | None], name: str, segments: Sequence[Segment]) -> None:
    """dA of each segment, for x [T, d_in]."""
    native.call("lora_a_gradient", x.dtype, *_given(name, segments, dus, dus), x)


def _room(segment: Segment, rows: SiteRows | None) -> torch.Tensor | None:
    if rows is None:
        return None
    multiple = 32 if native.wide_rows() else 16
    rank = -(-segment.rank // multiple) * multiple
    return segment.factors.new_empty(segment.end - segment.start, len(rows.b) * rank)


def _given(
    name: str, segments: Sequence[Segment], us: Sequence[torch.Tensor | None], dus: Sequence[torch.Tensor | None],
    with_grad: bool = True,
) -> tuple[torch.Tensor | int, ...]:  # fmt: skip
    """The C code's table of the segments that have an adapter here, and the site's sizes."""
    table: list[list[int]] = []
    scales: list[float] = []
    site = None
    for segment, u, du in zip(segments, us, dus, strict=True):
        rows = segment.geometry.sites.get(name)
        if rows is None or u is None or du is None:
            continue
        grad = segment.grad if with_grad else None
        filler = [0] * (MOST_MATRICES - len(rows.b))
        a, bs = _pointers(segment.factors, rows)
        grad_a, grad_bs = (0, [0] * len(bs)) if grad is None else _pointers(grad, rows)
        table.append([segment.start, segment.end, segment.rank, a, *bs, *filler, u.data_ptr(), du.data_ptr(),
                      grad_a, *grad_bs, *filler])  # fmt: skip
        assert isinstance(segment.scale, float)
        scales.append(segment.scale)
        site = rows
    assert site is not None
    outs = torch.tensor([0, *(out.stop for out in site.out)])
    return torch.tensor(table), torch.tensor(scales, dtype=torch.float32), len(table), len(site.b), outs, site.site.d_in


def _pointers(values: torch.Tensor, rows: SiteRows) -> tuple[int, list[int]]:
    """Where a site's A and B's lie in [num_rows, rank]."""
    assert values.is_contiguous()
    first, stride = values.data_ptr(), values.shape[1] * values.element_size()
    return first + rows.a.start * stride, [first + b.start * stride for b in rows.b]
