"""How much memory this process has used."""

from __future__ import annotations

import sys


def peak_memory_gb() -> float:
    """Peak of this process in GB (10^9 bytes): of the GPU's allocator when CUDA is in use, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
