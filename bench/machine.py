"""What a measurement ran on: names, versions and the matmul rate of this moment."""

from __future__ import annotations

import os
import platform
import time
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


def matmul_flops(dtype, device: str, rows: int = 2048, size: int = 2048, seconds: float = 0.5) -> float:
    """Floating point operations per second of a large square-ish product on random data: the median of repeated calls."""
    import torch

    left = torch.randn(rows, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 5:
        start = time.perf_counter()
        left @ right
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * rows * size * size / sorted(times[1:])[len(times[1:]) // 2]
