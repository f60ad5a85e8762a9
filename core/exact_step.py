"""A decode step under engine.exact (core/exact.py): up to TILE sequences, in products of one shape whoever they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from core.datum import SamplingParams
from core.decoder import Decoder
from core.exact import TILE, ExactAttention, tiled
from core.head import UNEMBED, Part, run_head
from core.inference import run
from core.kv_cache import Slot
from core.lora import Segment, add_lora
from core.sampling import Choice, Head, pick


@dataclass(frozen=True)
class Row:
    """One sequence: its next input and how to draw what follows."""

    slot: Slot
    token: int
    position: int
    params: SamplingParams
    uniform: float
    shift: float | None


def exact_step(
    decoder: Decoder, rows: Sequence[Row], segments: Sequence[Segment]
) -> tuple[list[int], list[float], list[float]]:
    """(tokens, logprobs, shifts for the next step). At T = 1 the logprobs come out of the trainer's own head."""
    n, device = len(rows), decoder.device
    assert n <= TILE

    def filled(values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor([*values, *[0] * (TILE - n)], dtype=dtype, device=device)

    attention = ExactAttention([(row.slot, 1, row.position) for row in rows])
    add = partial(add_lora, segments=segments, exact=True)
    x = run(decoder, filled([r.token for r in rows]), filled([r.position for r in rows]), add, [attention])
    head = Head(decoder, x, [_Unembedding(segment) for segment in segments])
    shift = filled([row.shift or 0.0 for row in rows], torch.float32)
    fresh = torch.ones(TILE, dtype=torch.bool, device=device)
    fresh[:n] = torch.tensor([row.shift is None for row in rows], device=device)
    shift = torch.where(fresh, head.logits(torch.zeros_like(shift)).amax(0).float(), shift)
    choice = Choice.of([*[row.params for row in rows], *[SamplingParams()] * (TILE - n)], device)
    picked = pick(head, shift, choice, filled([row.uniform for row in rows], torch.float64))
    logprobs = picked.logprobs.clone()
    if any(row.params.temperature in (0.0, 1.0) for row in rows):
        parts = [Part(slice(s.start, s.end), s, s.scale) for s in segments]
        plain, _ = run_head(decoder.head, head.h[:n], picked.tokens[:n, None], parts, None, exact=True)
        at_one = torch.tensor([row.params.temperature in (0.0, 1.0) for row in rows], device=device)
        logprobs[:n] = torch.where(at_one, plain[:, 0], logprobs[:n])
    return picked.tokens[:n].tolist(), logprobs[:n].tolist(), picked.shift[:n].tolist()


@dataclass(frozen=True)
class _Unembedding:
    """One adapter's part of the logits of all TILE rows, zero for those of others."""

    segment: Segment

    def unembed(self, h: torch.Tensor) -> tuple[slice, torch.Tensor, torch.Tensor] | None:
        segment, rows = self.segment, self.segment.geometry.sites.get(UNEMBED)
        if rows is None:
            return None
        u = segment.scale_(tiled(h, segment.a(rows, segment.factors).T))[segment.start : segment.end]
        u = F.pad(u, (0, 0, segment.start, len(h) - segment.end))
        return slice(0, len(h)), u, segment.factors[rows.b[0]]
