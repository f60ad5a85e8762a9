"""The decoder's passes over a packed micro-batch, each an autograd function with a hand-written backward.

HF's eager modules spend most of a CPU step in elementwise work and keep several copies of every activation. Here the residual
stream is fp32, normalised inputs are recomputed in backward from it, base weights get no gradient, and the adapters' gradients
go straight to their segments. T rows, d hidden size; x is the residual stream [T, d] fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.attention import Layout
from core.lora import Segment, add_lora, add_lora_backward


@dataclass
class Norm:
    """RMSNorm: weight [d] fp32."""

    weight: torch.Tensor
    eps: float


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


@dataclass
class Batch:
    """What every layer needs to know of the micro-batch."""

    layout: Layout
    segments: list[Segment]
    cos: torch.Tensor  # [T, 1, size / 2], compute dtype
    sin: torch.Tensor
    dtype: torch.dtype
    scaling: float  # of attention scores


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as size 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()


def normalise(x: torch.Tensor, inverse: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    return (x * inverse).mul_(norm.weight).to(dtype)


def normalise_backward(dh: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, norm: Norm) -> torch.Tensor:
    """d x for h = x * inverse * weight; dh in the compute dtype, result fp32."""
    g = dh * norm.weight
    along = torch.linalg.vecdot(g, x).unsqueeze(-1).mul_(inverse.pow(3)).mul_(1.0 / x.shape[-1])
    return g.mul_(inverse).addcmul_(x, along, value=-1)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Rotary embedding of [T, H, size] into `out`; backward is the same with -sin."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)


class AttentionInput(torch.autograd.Function):
    """x -> rotated q, rotated k, v as [T, q + 2 kv heads, size]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: Layer, batch: Batch) -> torch.Tensor:
        heads = batch.layout.heads
        inverse = rms(x, layer.attention_norm.eps)
        h = normalise(x, inverse, layer.attention_norm, batch.dtype)
        y = F.linear(h, layer.qkv.weight, layer.qkv.bias)
        ctx.kept = add_lora(h, y, layer.qkv.site, batch.segments)
        y = y.view(-1, heads.total, heads.size)
        out = torch.empty_like(y)
        out[:, heads.q + heads.kv :] = y[:, heads.q + heads.kv :]
        raw = None
        if layer.q_norm is None or layer.k_norm is None:
            rotate(y[:, : heads.q + heads.kv], batch.cos, batch.sin, out[:, : heads.q + heads.kv])
        else:
            raw = y[:, : heads.q + heads.kv]
            for part, norm in _normed_parts(heads, layer):
                normed = normalise(raw[:, part], rms(raw[:, part], norm.eps), norm, batch.dtype)
                rotate(normed, batch.cos, batch.sin, out[:, part])
        ctx.save_for_backward(x, inverse, raw)
        ctx.layer, ctx.batch = layer, batch
        return out

    @staticmethod
    def backward(ctx, d_out: torch.Tensor):
        x, inverse, raw = ctx.saved_tensors
        layer, batch, heads = ctx.layer, ctx.batch, ctx.batch.layout.heads
        dy = torch.empty_like(d_out)
        dy[:, heads.q + heads.kv :] = d_out[:, heads.q + heads.kv :]
        rotate(d_out[:, : heads.q + heads.kv], batch.cos, -batch.sin, dy[:, : heads.q + heads.kv])
        if raw is not None:
            for part, norm in _normed_parts(heads, layer):
                values = raw[:, part].float()
                dy[:, part] = normalise_backward(dy[:, part], values, rms(values, norm.eps), norm)
        dy = dy.view(dy.shape[0], -1)
        dh = dy @ layer.qkv.weight
        h = normalise(x, inverse, layer.attention_norm, batch.dtype)
        add_lora_backward(h, dy, dh, ctx.kept, layer.qkv.site, batch.segments)
        return normalise_backward(dh, x, inverse, layer.attention_norm), None, None


def _normed_parts(heads, layer: Layer) -> list[tuple[slice, Norm]]:
    assert layer.q_norm is not None and layer.k_norm is not None
    return [(slice(0, heads.q), layer.q_norm), (slice(heads.q, heads.q + heads.kv), layer.k_norm)]


class AttentionOutput(torch.autograd.Function):
    """x + the output projection of the attended values a [T, q * size]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, a: torch.Tensor, layer: Layer, batch: Batch) -> torch.Tensor:
        y = F.linear(a, layer.output.weight, layer.output.bias)
        ctx.kept = add_lora(a, y, layer.output.site, batch.segments)
        ctx.save_for_backward(a)
        ctx.layer, ctx.batch = layer, batch
        return x + y

    @staticmethod
    def backward(ctx, d_out: torch.Tensor):
        (a,) = ctx.saved_tensors
        dy = d_out.to(ctx.batch.dtype)
        da = dy @ ctx.layer.output.weight
        add_lora_backward(a, dy, da, ctx.kept, ctx.layer.output.site, ctx.batch.segments)
        return d_out, da, None, None


class Mlp(torch.autograd.Function):
    """x + down(silu(gate(h)) * up(h)), h the normalised x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: Layer, batch: Batch) -> torch.Tensor:
        inverse = rms(x, layer.mlp_norm.eps)
        h = normalise(x, inverse, layer.mlp_norm, batch.dtype)
        gate_up = F.linear(h, layer.gate_up.weight, layer.gate_up.bias)
        ctx.kept = add_lora(h, gate_up, layer.gate_up.site, batch.segments)
        gate, up = gate_up.chunk(2, dim=1)
        a = F.silu(gate).mul_(up)
        y = F.linear(a, layer.down.weight, layer.down.bias)
        ctx.kept_down = add_lora(a, y, layer.down.site, batch.segments)
        ctx.save_for_backward(x, inverse, gate_up)
        ctx.layer, ctx.batch = layer, batch
        return x + y

    @staticmethod
    def backward(ctx, d_out: torch.Tensor):
        x, inverse, gate_up = ctx.saved_tensors
        layer, batch = ctx.layer, ctx.batch
        gate, up = gate_up.chunk(2, dim=1)
        activated = F.silu(gate)
        a = activated * up
        dy = d_out.to(batch.dtype)
        da = dy @ layer.down.weight
        add_lora_backward(a, dy, da, ctx.kept_down, layer.down.site, batch.segments)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=1)
        torch.mul(da, activated, out=d_up)
        torch.ops.aten.silu_backward(da.mul_(up), gate, grad_input=d_gate)
        dh = d_gate_up @ layer.gate_up.weight
        h = normalise(x, inverse, layer.mlp_norm, batch.dtype)
        add_lora_backward(h, d_gate_up, dh, ctx.kept, layer.gate_up.site, batch.segments)
        return normalise_backward(dh, x, inverse, layer.mlp_norm).add_(d_out), None, None
