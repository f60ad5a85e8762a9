"""The C code for AMX on a processor without: see the fixture `tiles`."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from core import native


@functools.cache
def emulated() -> ctypes.CDLL:
    """core/native*.c with tests/tiles.h."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None
    header = Path(__file__).with_name("tiles.h")
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "tiles.so"
        command = [compiler, *native.FLAGS, *native.VALUES[torch.bfloat16], "-D__AMX_BF16__", "-include", str(header)]
        subprocess.run([*command, str(native.SOURCES[0]), "-o", str(built)], check=True, capture_output=True, timeout=120)
        return ctypes.CDLL(str(built))
