"""What lies between the matrix products: RMSNorm, rotary embedding, SwiGLU, and their backward.

Each is one kernel where it can be built (core/kernels.py by Triton on CUDA, core/native.py by a C compiler on CPUs), elsewhere
a few operations of torch.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

from core import native
from core.attention import Heads

log = logging.getLogger("cook.engine")


@dataclass
class Norm:
    """RMSNorm: weight [d] fp32."""

    weight: torch.Tensor
    eps: float


HeadNorms = tuple[Norm, Norm]  # of q heads and of k heads


@functools.cache
def kernels(device: torch.device) -> ModuleType | None:
    """core.kernels or core.native, once it has been built for this device; None where there is no compiler for it."""
    if device.type == "cpu":
        return native if native.available() else None
    if device.type != "cuda":
        return None
    try:
        from core import kernels as found

        found.swiglu(torch.zeros(1, 2, device=device))
        return found
    except Exception as error:  # whatever keeps Triton from building; the numbers are the same without it
        log.warning("Triton kernels are not available (%s): torch's operations instead, which take longer", error)
        return None


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as size 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()


def normalise(
    x: torch.Tensor, norm: Norm, dtype: torch.dtype, inverse: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x [T, d] in dtype, its inverse root mean square [T, 1], which may be given)."""
    if (fast := kernels(x.device)) is not None:
        return fast.normed(x, norm.weight, norm.eps, dtype, inverse)
    if inverse is None:
        inverse = rms(x, norm.eps)
    return _scaled(x, inverse, norm, dtype), inverse


def normalise_backward(
    dh: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, norm: Norm, add: torch.Tensor | None = None
) -> torch.Tensor:
    """d x for h = x * inverse * weight, and `add` added to it; dh in the compute dtype, result fp32."""
    if (fast := kernels(x.device)) is not None:
        return fast.normed_backward(dh, x, norm.weight, inverse, add)
    dx = _backward(dh, x, inverse, norm)
    return dx if add is None else dx.add_(add)


def added(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [T, d] fp32 + y in the compute dtype."""
    return native.added(x, y) if kernels(x.device) is native else x + y


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [T, 2 * width]."""
    if (fast := kernels(gate_up.device)) is not None:
        return fast.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def swiglu_backward(gate_up: torch.Tensor, da: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(silu(gate) * up once more, d gate_up); da is used up."""
    if (fast := kernels(gate_up.device)) is native:
        return native.swiglu_with_gradient(gate_up, da)
    if fast is not None:
        return fast.swiglu(gate_up), fast.swiglu_backward(gate_up, da)
    gate, up = gate_up.chunk(2, dim=1)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=1)
    active = F.silu(gate)
    torch.mul(da, active, out=d_up)
    torch.ops.aten.silu_backward(da.mul_(up), gate, grad_input=d_gate)
    return active.mul_(up), d_gate_up


def rotate_heads(y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norms: HeadNorms | None) -> torch.Tensor:
    """y [T, q + 2 kv heads, size] -> (normed and) rotated q and k, v as it is. cos and sin [T, 1, size / 2]."""
    if (fast := kernels(y.device)) is not None:
        return fast.rotated(y, cos, sin, heads, *_split(norms))
    turned, out = heads.q + heads.kv, torch.empty_like(y)
    out[:, turned:] = y[:, turned:]
    if norms is None:
        _rotate(y[:, :turned], cos, sin, out[:, :turned])
        return out
    for part, norm in _parts(heads, norms):
        raw = y[:, part]
        _rotate(_scaled(raw, rms(raw, norm.eps), norm, y.dtype), cos, sin, out[:, part])
    return out


def rotate_heads_backward(
    d_out: torch.Tensor, raw: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norms: HeadNorms | None
) -> torch.Tensor:
    """d y; `raw` is y, needed where heads are normed."""
    if (fast := kernels(d_out.device)) is not None:
        return fast.rotated(raw, cos, sin, heads, *_split(norms), d_out=d_out)
    turned, dy = heads.q + heads.kv, torch.empty_like(d_out)
    dy[:, turned:] = d_out[:, turned:]
    _rotate(d_out[:, :turned], cos, -sin, dy[:, :turned])
    if norms is not None and raw is not None:
        for part, norm in _parts(heads, norms):
            values = raw[:, part].float()
            dy[:, part] = _backward(dy[:, part], values, rms(values, norm.eps), norm)
    return dy


def _scaled(x: torch.Tensor, inverse: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    return (x * inverse).mul_(norm.weight).to(dtype)


def _backward(dh: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, norm: Norm) -> torch.Tensor:
    g = dh * norm.weight
    along = torch.linalg.vecdot(g, x).unsqueeze(-1).mul_(inverse.pow(3)).mul_(1.0 / x.shape[-1])
    return g.mul_(inverse).addcmul_(x, along, value=-1)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Rotary embedding of [T, H, size] into `out`; backward is the same with -sin."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)


def _parts(heads: Heads, norms: HeadNorms) -> list[tuple[slice, Norm]]:
    return [(slice(0, heads.q), norms[0]), (slice(heads.q, heads.q + heads.kv), norms[1])]


def _split(norms: HeadNorms | None) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, tuple[float, float]]:
    if norms is None:
        return None, (0.0, 0.0)
    return (norms[0].weight, norms[1].weight), (norms[0].eps, norms[1].eps)
