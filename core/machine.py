"""What the machine allows: dtype, device, micro-batch size, and the allocator kept from giving memory back."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def keep_freed_memory() -> None:
    """Keep freed activations in the process: glibc would return them to the kernel and fault every page in again.

    One arena, because those of other threads are unmapped when they empty; 32 MB is the largest threshold glibc accepts.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 1 << 25), (_M_TRIM_THRESHOLD, (1 << 31) - 1)):
            libc.mallopt(option, value)
    except (OSError, AttributeError):  # another libc: nothing to set
        return


keep_freed_memory()  # before torch starts threads: an arena, once made, stays
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # shapes of products kept ready; 1,024 hold 0.2 GB more

import torch  # noqa: E402

if TYPE_CHECKING:
    from core.decoder import Decoder

CPU_TOKEN_BUDGET = 1024  # tokens per micro-batch: products run at nearly full speed, activations take 18 kB a token-layer
BF16_TOKEN_BUDGET = 2048  # with AMX oneDNN leaves one of two cores idle in products of few columns below 1,500 rows


@dataclass(frozen=True)
class EngineOptions:
    """dtype auto: bfloat16 on CUDA and on CPUs with bf16 instructions, else float32. None: by the machine.

    kv_tokens is the room for keys and values of sequences being sampled; train_share the part of the time that training
    gets while both wait; cuda_graphs whether decode steps are captured; exact: see core/exact.py. park_after: seconds without
    an operation, after which a client's adapter waits in host memory for its next one; by default 600 on CUDA, never on a CPU.
    """

    dtype: str = "auto"
    device: str = "auto"
    token_budget: int | None = None
    kv_tokens: int | None = None
    train_share: float = 0.5
    cuda_graphs: bool = True
    exact: bool = False
    park_after: float | None = None

    def resolve(self) -> tuple[torch.dtype, torch.device]:
        device = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"engine.device={device}, but this torch sees no CUDA device: use engine.device=cpu")
        name = self.dtype
        if name == "auto":
            name = "bfloat16" if device.startswith("cuda") or cpu_has_bf16() else "float32"
        if name not in ("bfloat16", "float32"):
            raise ValueError(f"engine.dtype={name}, expected auto, bfloat16 or float32")
        return getattr(torch, name), torch.device(device)


def cpu_has_bf16() -> bool:
    """Whether products in bf16 have instructions of their own. oneDNN says yes wherever there is AVX-512, and emulates them
    at a quarter of the rate of fp32."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def release_workers() -> None:
    """Let go of the calling thread's OpenMP workers (they come back with its next parallel operation).

    libgomp counts the workers of all threads. More than there are cores, and every idle worker sleeps at once instead of
    spinning: waking it costs each small operation of the engine's thread 50 us (77 us against 24 us measured on two cores).
    """
    if (openmp := libgomp()) is not None:
        openmp.omp_pause_resource_all(1)  # omp_pause_soft; refused (-1) inside a parallel region


@functools.cache
def libgomp() -> ctypes.CDLL | None:
    """The one that torch has loaded; None elsewhere than on Linux or with another OpenMP."""
    maps = Path("/proc/self/maps")
    names = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line} if maps.exists() else set()
    if len(names) != 1:
        return None
    try:
        library = ctypes.CDLL(names.pop())
        library.omp_pause_resource_all.argtypes = [ctypes.c_int]
        return library
    except (OSError, AttributeError):  # before OpenMP 5.0
        return None


def activation_bytes(num_layers: int, hidden: int, qkv: int, attended: int, intermediate: int, element: int) -> int:
    """Bytes a token keeps between forward and backward: two fp32 residuals a layer, the rest in the compute dtype."""
    return num_layers * (2 * 4 * hidden + element * (2 * qkv + attended + 2 * intermediate + 256))


def token_budget(device: torch.device, bytes_per_token: int, element: int, reserved: int = 0) -> int:
    """Tokens per micro-batch; values of `element` bytes. On CUDA what activations can take of what is free but `reserved`."""
    if device.type == "cpu":
        return BF16_TOKEN_BUDGET if element == 2 else CPU_TOKEN_BUDGET
    fits = int(0.6 * (torch.cuda.mem_get_info(device)[0] - reserved) / bytes_per_token)
    return max(256, min(16_384, fits // 256 * 256))


def default_kv_tokens(decoder: Decoder) -> int:
    """Room for keys and values: a third of the free memory on CUDA, up to 4 GiB on a CPU; taken as it is needed."""
    heads, layers = decoder.heads, len(decoder.layers)
    room = 4 << 30 if decoder.device.type == "cpu" else torch.cuda.mem_get_info(decoder.device)[0] // 3
    return max(1024, room // (2 * layers * heads.kv * heads.size * decoder.dtype.itemsize))


def default_token_budget(decoder: Decoder) -> int:
    heads, layers = decoder.heads, decoder.layers
    sizes = decoder.embedding.shape[1], heads.total * heads.size, heads.q * heads.size, layers[0].down.weight.shape[1]
    return token_budget(decoder.device, activation_bytes(len(layers), *sizes, decoder.dtype.itemsize), decoder.dtype.itemsize)
