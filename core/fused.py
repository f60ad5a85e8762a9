"""The decoder's passes over a packed micro-batch, each an autograd function with a hand-written backward.

HF's eager modules spend most of a CPU step in elementwise work and keep several copies of every activation. Here the residual
stream is fp32, normalised inputs are recomputed in backward from it, base weights get no gradient, and the adapters' gradients
go straight to their segments. T rows, d hidden size; x is the residual stream [T, d] fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.attention import Extent, Heads, Layout
from core.elementwise import (
    HeadNorms,
    Norm,
    added,
    normalise,
    normalise_backward,
    rotate_heads,
    rotate_heads_backward,
    swiglu,
    swiglu_backward,
)
from core.exact import tiled
from core.lora import Segment, add_a_gradient, add_lora, add_lora_backward, lora_input_gradient


@dataclass
class Linear:
    """The concatenated weights of a site: weight [d_out, d_in], bias [d_out] or None."""

    site: str
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass
class Layer:
    """One decoder layer's frozen tensors."""

    attention_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear

    @property
    def head_norms(self) -> HeadNorms | None:
        return None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)


@dataclass
class Batch:
    """What every layer needs to know of the micro-batch."""

    heads: Heads
    extents: Sequence[Extent]
    layout: Layout | None  # None: exact
    segments: list[Segment]
    cos: torch.Tensor  # [T, 1, size / 2], compute dtype
    sin: torch.Tensor
    dtype: torch.dtype
    scaling: float  # of attention scores

    @property
    def exact(self) -> bool:
        return self.layout is None

    def product(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        return linear_product(x, linear, self.exact)


def linear_product(x: torch.Tensor, linear: Linear, exact: bool) -> torch.Tensor:
    """x [T, d_in] -> [T, d_out]."""
    return tiled(x, linear.weight, linear.bias) if exact else F.linear(x, linear.weight, linear.bias)


class AttentionInput(torch.autograd.Function):
    """x -> rotated q, rotated k, v as [T, q + 2 kv heads, size]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: Layer, batch: Batch) -> torch.Tensor:
        heads = batch.heads
        h, inverse = normalise(x, layer.attention_norm, batch.dtype)
        y = batch.product(h, layer.qkv)
        ctx.kept = add_lora(h, y, layer.qkv.site, batch.segments, batch.exact)
        y = y.view(-1, heads.total, heads.size)
        out = rotate_heads(y, batch.cos, batch.sin, heads, layer.head_norms)
        ctx.save_for_backward(x, inverse, None if layer.head_norms is None else y)
        ctx.layer, ctx.batch = layer, batch
        return out

    @staticmethod
    def backward(ctx, d_out: torch.Tensor):
        x, inverse, raw = ctx.saved_tensors
        layer, batch, heads = ctx.layer, ctx.batch, ctx.batch.heads
        dy = rotate_heads_backward(d_out, raw, batch.cos, batch.sin, heads, layer.head_norms)
        dy = dy.view(dy.shape[0], -1)
        dh = dy @ layer.qkv.weight
        h, _ = normalise(x, layer.attention_norm, batch.dtype, inverse)
        add_lora_backward(h, dy, dh, ctx.kept, layer.qkv.site, batch.segments, batch.exact)
        return normalise_backward(dh, x, inverse, layer.attention_norm), None, None


class AttentionOutput(torch.autograd.Function):
    """x + the output projection of the attended values a [T, q * size]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, a: torch.Tensor, layer: Layer, batch: Batch) -> torch.Tensor:
        y = batch.product(a, layer.output)
        ctx.kept = add_lora(a, y, layer.output.site, batch.segments, batch.exact)
        ctx.save_for_backward(a)
        ctx.layer, ctx.batch = layer, batch
        return added(x, y)

    @staticmethod
    def backward(ctx, d_out: torch.Tensor):
        (a,) = ctx.saved_tensors
        dy = d_out.to(ctx.batch.dtype)
        da = dy @ ctx.layer.output.weight
        add_lora_backward(a, dy, da, ctx.kept, ctx.layer.output.site, ctx.batch.segments, ctx.batch.exact)
        return d_out, da, None, None


class Mlp(torch.autograd.Function):
    """x + down(silu(gate(h)) * up(h)), h the normalised x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: Layer, batch: Batch) -> torch.Tensor:
        h, inverse = normalise(x, layer.mlp_norm, batch.dtype)
        gate_up = batch.product(h, layer.gate_up)
        ctx.kept = add_lora(h, gate_up, layer.gate_up.site, batch.segments, batch.exact)
        a = swiglu(gate_up)
        y = batch.product(a, layer.down)
        ctx.kept_down = add_lora(a, y, layer.down.site, batch.segments, batch.exact)
        ctx.save_for_backward(x, inverse, gate_up)
        ctx.layer, ctx.batch = layer, batch
        return added(x, y)

    @staticmethod
    def backward(ctx, d_out: torch.Tensor):
        x, inverse, gate_up = ctx.saved_tensors
        layer, batch = ctx.layer, ctx.batch
        dy = d_out.to(batch.dtype)
        da = dy @ layer.down.weight
        dus = lora_input_gradient(dy, da, ctx.kept_down, layer.down.site, batch.segments, batch.exact)
        a, d_gate_up = swiglu_backward(gate_up, da)
        add_a_gradient(a, dus, layer.down.site, batch.segments, batch.exact)
        dh = d_gate_up @ layer.gate_up.weight
        h, _ = normalise(x, layer.mlp_norm, batch.dtype, inverse)
        add_lora_backward(h, d_gate_up, dh, ctx.kept, layer.gate_up.site, batch.segments, batch.exact)
        return normalise_backward(dh, x, inverse, layer.mlp_norm, add=d_out), None, None
