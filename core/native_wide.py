"""Decode steps of up to 256 rows on a CPU with AMX as one call of core/native_wide.c, as core/native_step.py without.

An adapter's factors are laid out anew once, for as long as it is sampled from: ranks padded to a multiple of 32 with zeros,
A's transposed, so that both are read as weights are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from core import native
from core.decoder import Decoder
from core.fused import Layer
from core.kv_cache import Slot
from core.lora import ComputeCopies, Weights
from core.native_step import FewRows, NativeStep, matrices_of, of_layers

KEPT = 16  # adapters laid out at most, unless a step has more


def fast_rows(decoder: Decoder, copies: ComputeCopies) -> WideRows | FewRows | None:
    """Steps in C where this machine has them."""
    if not FewRows.available(decoder):
        return None
    return WideRows(decoder, copies) if WideRows.available(decoder) else FewRows(decoder, copies)


class WideRows:
    """Steps of one decoder."""

    def __init__(self, decoder: Decoder, copies: ComputeCopies) -> None:
        self.decoder, self.copies, self.most = decoder, copies, native.wide_rows()
        self.layers = of_layers(decoder)
        self._factors: dict[tuple[int, int], Factors] = {}

    @staticmethod
    def available(decoder: Decoder) -> bool:
        """For a decoder that core/native_step.py takes."""
        heads, first = decoder.heads, decoder.layers[0]
        widths = first.qkv.weight.shape[1], heads.q * heads.size, first.down.weight.shape[1]
        whole = all(width % 32 == 0 for width in widths) and heads.kv * heads.size % 16 == 0
        return decoder.dtype == torch.bfloat16 and whole and native.wide_rows() > 0

    def step(self, slots: Sequence[Slot], owners: Sequence[Weights]) -> WideStep:
        """Of one row for each slot; an adapter's rows are neighbours."""
        return WideStep(self, slots, owners)

    def factors(self, adapters: Sequence[Weights]) -> list[Factors]:
        """Of these adapters; other versions of them go, and what was used longest ago."""
        keys = {weights.key for weights in adapters}
        serials = {serial for serial, _ in keys}
        self._factors = {key: made for key, made in self._factors.items() if key in keys or key[0] not in serials}
        for weights in adapters:
            made = self._factors.pop(weights.key, None)
            self._factors[weights.key] = made or Factors(self.decoder, weights, self.copies.get([weights]))
        while len(self._factors) > max(KEPT, len(adapters)):
            del self._factors[next(iter(self._factors))]
        return [self._factors[weights.key] for weights in adapters]

    def forget(self) -> None:
        """Nobody is being sampled from."""
        self._factors.clear()


class Factors:
    """One adapter's in the order of native_step.c's OF_ADAPTER: a site's A's [matrices, rank, d_in], each B [d_out, rank]."""

    def __init__(self, decoder: Decoder, weights: Weights, copy: torch.Tensor) -> None:
        self.rank = -(-weights.config.rank // 32) * 32
        self.kept: list[torch.Tensor] = []
        self.addresses = torch.tensor([self._of_layer(layer, weights, copy) for layer in decoder.layers], dtype=torch.int64)

    def _of_layer(self, layer: Layer, weights: Weights, copy: torch.Tensor) -> list[int]:
        found: list[int] = []
        spare = self.rank - weights.config.rank
        for linear, matrices in matrices_of(layer):
            rows = weights.geometry.sites.get(linear.site)
            if rows is None:
                found += [0] * (1 + matrices)
                continue
            a = copy[rows.a].view(linear.weight.shape[1], matrices, -1).permute(1, 2, 0)
            factors = [F.pad(a, (0, 0, 0, spare)).contiguous(), *(F.pad(copy[part], (0, spare)) for part in rows.b)]
            self.kept += factors
            found += [factor.data_ptr() for factor in factors]
        return found


class WideStep(NativeStep):
    function = "wide_step"

    def __init__(self, wide: WideRows, slots: Sequence[Slot], owners: Sequence[Weights]) -> None:
        super().__init__(wide.decoder, wide.layers, slots)
        heads, dtype, columns = wide.decoder.heads, wide.decoder.dtype, -(-len(slots) // 16) * 16
        spans: dict[tuple[int, int], tuple[Weights, int, int]] = {}  # low, high of each adapter
        for row, weights in enumerate(owners):
            if weights.geometry.sites:
                spans[weights.key] = (weights, spans.get(weights.key, (weights, row, row))[1], row + 1)
        members = [weights for weights, _, _ in spans.values()]
        self.factors = wide.factors(members)
        table = [factors.addresses for factors in self.factors]
        addresses = torch.stack(table) if table else torch.empty(0, dtype=torch.int64)
        ranks = torch.tensor([factors.rank for factors in self.factors], dtype=torch.int64)
        low, high = (torch.tensor([span[i] for span in spans.values()], dtype=torch.int64) for i in (1, 2))
        self.adapters = addresses, ranks, low, high, torch.tensor([weights.scale for weights in members], dtype=torch.float32)
        most_rank = max((factors.rank for factors in self.factors), default=0)
        rows = heads.total * heads.size, max(self.d, heads.q * heads.size), self.width, len(members) * 3 * most_rank
        stream = torch.empty(self.d, columns, dtype=torch.float32)
        self.scratch = stream, *(torch.empty(count, columns, dtype=dtype) for count in rows)
        self.counts = len(members), most_rank
