"""Decode steps of few rows on a CPU as one call of core/native_step.c: nothing but weights is read, and those once.

What the C code gets are tables of addresses: of each layer its tensors; of each adapter and layer its factors; of each row
where its sequence's keys and values lie. This module makes them and keeps what they point to alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from core import native
from core.decoder import Decoder
from core.fused import Layer, Linear
from core.kv_cache import Slabs, Slot
from core.lora import ComputeCopies, Weights


class FewRows:
    """Steps of one decoder."""

    def __init__(self, decoder: Decoder, copies: ComputeCopies) -> None:
        self.decoder, self.copies, self.most = decoder, copies, native.FEW[decoder.dtype]
        self.layers = of_layers(decoder)

    @staticmethod
    def available(decoder: Decoder) -> bool:
        norms = {norm.eps for layer in decoder.layers for norm in (layer.attention_norm, layer.mlp_norm)}
        of_heads = {norm.eps for layer in decoder.layers for norm in layer.head_norms or ()}
        alike = len(norms) == 1 and len(of_heads) <= 1
        return decoder.device.type == "cpu" and not decoder.exact and alike and native.available()

    def step(self, slots: Sequence[Slot], owners: Sequence[Weights]) -> FewStep:
        """Of one row for each slot."""
        return FewStep(self, slots, owners)

    def forget(self) -> None:
        """Nobody is being sampled from."""


class NativeStep:
    """The rows of a batch that stays the same for several steps, for one function of the C code.

    What differs between these is set by whoever inherits: tensors about adapters, scratch memory, and counts of adapters.
    """

    function: str
    adapters: tuple[torch.Tensor, ...]
    scratch: tuple[torch.Tensor, ...]
    counts: tuple[int, ...]

    def __init__(self, decoder: Decoder, layers: torch.Tensor, slots: Sequence[Slot]) -> None:
        self.decoder, self.layers = decoder, layers
        self.d, self.width = decoder.layers[0].qkv.weight.shape[1], decoder.layers[0].down.weight.shape[1]
        self.places = torch.tensor([_place(slot) for slot in slots])

    def run(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The residual stream after the last layer for tokens [n] at positions [n]: [n, d] fp32."""
        decoder, heads, first = self.decoder, self.decoder.heads, self.decoder.layers[0]
        x = F.embedding(tokens, decoder.embedding).float()
        cosine, sine = decoder.rotary_tables(x, positions)
        native.call(
            self.function, decoder.dtype, self.layers, self.places, positions, *self.adapters, cosine, sine, x, *self.scratch,
            len(x), self.d, heads.q, heads.kv, heads.size, self.width, len(decoder.layers), *self.counts,
            first.attention_norm.eps, first.q_norm.eps if first.q_norm is not None else 0.0, float(decoder.scaling),
        )  # fmt: skip
        return x


class FewStep(NativeStep):
    function = "decode_step"

    def __init__(self, few: FewRows, slots: Sequence[Slot], owners: Sequence[Weights]) -> None:
        super().__init__(few.decoder, few.layers, slots)
        decoder, heads, n = few.decoder, few.decoder.heads, len(slots)
        adapters = list({weights.key: weights for weights in owners if weights.geometry.sites}.values())
        number = {weights.key: i for i, weights in enumerate(adapters)}
        self.copies = [few.copies.get([weights]) for weights in adapters]
        factors = torch.tensor(
            [[_of_adapter(layer, weights, copy) for layer in decoder.layers]
             for weights, copy in zip(adapters, self.copies, strict=True)], dtype=torch.int64,
        )  # fmt: skip
        ranks = torch.tensor([weights.config.rank for weights in adapters], dtype=torch.int64)
        adapter_of = torch.tensor([number.get(weights.key, -1) for weights in owners])
        self.adapters = factors, ranks, adapter_of, torch.tensor([weights.scale for weights in adapters], dtype=torch.float32)
        most_rank = max((weights.config.rank for weights in adapters), default=0)
        qkv = torch.empty(n, heads.total, heads.size, dtype=decoder.dtype)
        attended = torch.empty(n, heads.q, heads.size, dtype=decoder.dtype)
        act, low = (torch.empty(n, width, dtype=torch.float32) for width in (self.width, 3 * most_rank))
        self.scratch = qkv, attended, act, low
        self.counts = (most_rank,)


def of_layers(decoder: Decoder) -> torch.Tensor:
    """[layers, OF_LAYER] addresses."""
    return torch.tensor([_of_layer(layer) for layer in decoder.layers])


def matrices_of(layer: Layer) -> list[tuple[Linear, int]]:
    """The sites of a layer, in the order of native_step.c, and of how many matrices each is."""
    return [(layer.qkv, 3), (layer.output, 1), (layer.gate_up, 2), (layer.down, 1)]


def _of_layer(layer: Layer) -> list[int]:
    """In the order of native_step.c's OF_LAYER; 0: there is none."""
    linear = (layer.qkv, layer.output, layer.gate_up, layer.down)
    qkv, output, gate_up, down = ([_address(one.weight), _address(one.bias)] for one in linear)
    norms = [_address(norm.weight if norm is not None else None) for norm in (layer.q_norm, layer.k_norm)]
    return [_address(layer.attention_norm.weight), *qkv, *norms, *output, _address(layer.mlp_norm.weight), *gate_up, *down]


def _of_adapter(layer: Layer, weights: Weights, copy: torch.Tensor) -> list[int]:
    """In the order of OF_ADAPTER: each site's A's as one address, then each B's."""
    found = []
    for linear, matrices in matrices_of(layer):
        rows = weights.geometry.sites.get(linear.site)
        found += [0] * (1 + matrices) if rows is None else [_address(copy[part]) for part in (rows.a, *rows.b)]
    return found


def _place(slot: Slot) -> list[int]:
    """In the order of OF_PLACE: the slot in layer 0, how far apart layers are, in values, and the room of a slot."""
    pool = slot.pool
    assert isinstance(pool, Slabs)
    k, v = pool.k, pool.v
    return [_address(k[0, slot.index]), _address(v[0, slot.index]), v.stride(0), pool.capacity]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
