"""core/native.c and what includes it on a CPU: compiled by the machine's own C compiler in a few seconds, once, and kept
in the user's cache.

The names are those of core/kernels.py, its counterpart for CUDA. Without a compiler, or with another OpenMP than the one that
torch brings, torch's operations compute the same in two to three times the time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core.gguf import cache_directory
from core.machine import libgomp

if TYPE_CHECKING:
    from core.attention import Heads

log = logging.getLogger("cook.engine")
NAMES = (  # each includes the next
    "native_lora.c", "native_attention.c", "native_wide.c", "native_step.c", "native_sampling.c", "native.c",
)  # fmt: skip
SOURCES = [Path(__file__).with_name(name) for name in NAMES]
FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-nodefaultlibs",
)  # fmt: skip
FEW = {torch.float32: 16, torch.bfloat16: 8}  # rows up to which sampling does without products; at most FEW of the C code
VALUES = {torch.bfloat16: ("-DBF16",), torch.float32: ()}


@functools.cache
def available() -> bool:
    """Whether this machine has built both libraries, or can."""
    if platform.machine() not in ("x86_64", "AMD64") or libgomp() is None:
        return False
    try:
        for dtype in VALUES:
            _library(dtype)
        return True
    except (OSError, subprocess.SubprocessError) as error:
        log.info("no C kernels (%s): torch's operations instead, which take longer", error)
        return False


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise OSError("there is no C compiler: install gcc")
    command = [compiler, *FLAGS, *VALUES[dtype]]
    about = f"{command} {torch.__version__} {_processor()}".encode() + b"".join(source.read_bytes() for source in SOURCES)
    built = cache_directory() / f"native-{hashlib.sha256(about).hexdigest()[:16]}.so"
    if not built.exists():
        _build(command, built)
    gomp = libgomp()
    assert gomp is not None
    ctypes.CDLL(gomp._name, ctypes.RTLD_GLOBAL)  # what the library's parallel loops call, with torch's own threads
    return ctypes.CDLL(str(built))


def _build(command: list[str], target: Path) -> None:
    """Aside, then renamed: two processes may be at it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        subprocess.run([*command, str(SOURCES[0]), "-o", str(made)], check=True, capture_output=True, timeout=120)
        made.replace(target)


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), platform.processor())


def call(name: str, dtype: torch.dtype, *values: torch.Tensor | float | int | None) -> None:
    """A function of the C code as it is for values of that type."""
    getattr(_library(dtype), name)(*map(_argument, values))


def _argument(value: torch.Tensor | float | int | None):
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_void_p() if value is None else ctypes.c_long(value)


def normed(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, inverse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x [T, d] fp32 in dtype, 1 / rms [T, 1])."""
    x, given = x.contiguous(), inverse is not None
    inverse = x.new_empty(len(x), 1) if inverse is None else inverse
    h = torch.empty(x.shape, dtype=dtype)
    call("normed", dtype, x, weight, eps, inverse, int(given), h, *x.shape)
    return h, inverse


def normed_backward(
    dh: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, add: torch.Tensor | None
) -> torch.Tensor:
    """dx [T, d] fp32."""
    x, dx = x.contiguous(), torch.empty_like(x)
    call("normed_backward", dh.dtype, dh.contiguous(), x, weight, inverse, add, dx, *x.shape)
    return dx


def added(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [T, d] fp32 + y."""
    out = torch.empty_like(x)
    call("added", y.dtype, x, y, out, *x.shape)
    return out


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 width] -> [T, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    call("swiglu", gate_up.dtype, gate_up, out, rows, width)
    return out


def swiglu_with_gradient(gate_up: torch.Tensor, da: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(swiglu(gate_up), d gate_up)."""
    out, d_gate_up = torch.empty_like(da), torch.empty_like(gate_up)
    call("swiglu_with_gradient", gate_up.dtype, gate_up, da, out, d_gate_up, *da.shape)
    return out, d_gate_up


def rotated(
    y: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, heads: Heads,
    weights: tuple[torch.Tensor, torch.Tensor] | None = None, eps: tuple[float, float] = (0.0, 0.0),
    d_out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y [T, heads.total, size] with q and k heads normed, if there are weights, and turned by cos and sin [T, 1, size / 2].
    Given d_out of that shape: its gradient (y is read if heads are normed)."""
    given = y if d_out is None else d_out
    assert given is not None and (weights is None or y is not None)
    given, out = given.contiguous(), torch.empty(given.shape, dtype=given.dtype)
    raw = y.contiguous() if y is not None and weights is not None and d_out is not None else None
    call("rotated", given.dtype, given, raw, cos.contiguous(), sin.contiguous(), *(weights or (None, None)), *eps, out,
          len(given), heads.q, heads.kv, heads.size, int(d_out is not None))  # fmt: skip
    return out


def causal_softmax(scores: torch.Tensor, scaling: float, left: torch.Tensor, group: int) -> torch.Tensor:
    """softmax(scaling * scores) in place. scores [batch, queries * group, keys], left [batch] int32: see core/native.c."""
    batch, rows, keys = scores.shape
    call("causal_softmax", scores.dtype, scores, scaling, left, batch, rows // group, group, keys)
    return scores


def cached_attention(
    qkv: torch.Tensor, out: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, scaling: float, heads: Heads,
) -> None:  # fmt: skip
    """New rows of qkv [T, heads.total, size] put their keys and values into a layer's k [slots, kv, room / 16, size, 16] and
    v [slots, kv, room, size] and look at all up to their positions; rows of out [T, heads.q, size]. Indices [n] int64."""
    call("cached_attention", qkv.dtype, qkv, out, rows, slots, positions, k, v, scaling,
          len(rows), v.shape[2], heads.q, heads.kv, heads.size)  # fmt: skip


def packs(dtype: torch.dtype, size: int) -> bool:
    """Whether the products of core/native_attention.c are there, and take that width."""
    return size % 16 == 0 and available() and bool(_library(dtype).packs())


def logits_of_few(weight: torch.Tensor, h: torch.Tensor, shift: torch.Tensor) -> torch.Tensor | None:
    """weight h^T - shift as [V, n], rounded once; None where products by torch are the better way."""
    n, d = h.shape
    if h.device.type != "cpu" or n > FEW[h.dtype] or not available() or (h.dtype == torch.bfloat16 and wide_rows()):
        return None
    out = h.new_empty(len(weight), n)
    call("few_logits", h.dtype, weight, h.float().contiguous(), shift.float().contiguous(), out, n, d, len(weight))
    return out


@functools.cache
def wide_rows() -> int:
    """Rows that wide_step takes at most; 0 without AMX."""
    return _library(torch.bfloat16).wide_rows() if available() else 0
