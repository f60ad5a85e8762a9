"""What a measurement ran on: names, versions, and the matmul and memory rates of this moment."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe(device: str) -> dict:
    import torch

    about = {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gb": round(_memory_bytes() / 1e9), "device": device}
    if device != "cpu":
        about["gpu"] = torch.cuda.get_device_name(device)
    for package in ("torch", "transformers", "peft", "trl"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = None
    return about


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line for line in lines if line.startswith("flags")), "")
    return name + "".join(f" {flag}" for flag in ("avx512_bf16", "amx_bf16") if flag in flags)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fast_dtype(device: str) -> str:
    """bfloat16, but float32 on a CPU that would emulate it: for the other side too."""
    from core import EngineOptions

    dtype, _ = EngineOptions(device=device).resolve()
    return str(dtype).removeprefix("torch.")


def matmul_flops(dtype, device: str, seconds: float = 0.5) -> float:
    """Floating point operations per second of a large square product on random data: the median of repeated calls."""
    import torch

    rows = size = 2048 if device == "cpu" else 8192
    left = torch.randn(rows, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    return 2 * rows * size * size / _median_seconds(lambda: left @ right, device, seconds)


def memory_bandwidth(device: str, seconds: float = 0.5) -> float:
    """Bytes per second between memory and processor: the faster of a large copy and a large matrix-vector product."""
    import torch

    size = 1 << 28 if device == "cpu" else 1 << 31
    matrix, vector = torch.ones(size // 4096 // 4, 4096, device=device), torch.ones(4096, device=device)
    target = torch.empty_like(matrix)
    copied = 2 * size / _median_seconds(lambda: target.copy_(matrix), device, seconds)
    return max(copied, size / _median_seconds(lambda: matrix @ vector, device, seconds))


def _median_seconds(work: Callable[[], object], device: str, seconds: float) -> float:
    """Of repeated calls, the first left out."""
    import torch

    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 5:
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times[1:]) // 2]
