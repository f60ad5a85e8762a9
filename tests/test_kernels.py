"""The Triton kernels compute what torch's operations do: interpreted on the CPU, and compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core import elementwise as plain
from core.attention import Heads
from core.paged import PAGE, attend_pages
from tests.tiny import assert_close

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
HEADS = [Heads(4, 2, 8), Heads(3, 1, 10), Heads(16, 4, 16)]
needs_triton = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="no GPU: see the interpreted run")


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
def test_interpreted_on_the_cpu() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def torch_only(function, *args):
    """What `function` of core/elementwise.py gives without kernels."""
    to_cpu = [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args]
    to_cpu = [tuple(plain.Norm(n.weight.cpu(), n.eps) for n in arg) if isinstance(arg, tuple) else arg for arg in to_cpu]
    return function(*(plain.Norm(arg.weight.cpu(), arg.eps) if isinstance(arg, plain.Norm) else arg for arg in to_cpu))


@needs_triton
@pytest.mark.parametrize("d", [32, 57, 130])
def test_rms_norm_and_its_gradient(d: int) -> None:
    from core import kernels

    x, dh, add, norm = noise(7, d), noise(7, d) * 2, noise(7, d) + 1, plain.Norm(noise(d), 1e-3)
    expected, inverse = torch_only(plain.normalise, x, norm, torch.float32)
    h, found = kernels.normed(x, norm.weight, norm.eps, torch.float32, None)
    assert_close(h.cpu(), expected, 1e-6)
    assert_close(found.cpu(), inverse, 1e-6)
    assert_close(kernels.normed(x, norm.weight, 0.0, torch.float32, found)[0].cpu(), expected, 1e-6)  # the given one counts
    for added in (None, add):
        dx = kernels.normed_backward(dh, x, norm.weight, found, added)
        assert_close(dx.cpu(), torch_only(plain.normalise_backward, dh, x, inverse, norm, added), 1e-6)


@needs_triton
def test_swiglu_and_its_gradient() -> None:
    from core import kernels

    gate_up, da = noise(5, 140), noise(5, 70)
    assert_close(kernels.swiglu(gate_up).cpu(), torch_only(plain.swiglu, gate_up), 1e-6)
    assert_close(kernels.swiglu_backward(gate_up, da).cpu(), torch_only(plain.swiglu_backward, gate_up, da.clone())[1], 1e-6)


@needs_triton
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_rotated_heads_and_their_gradient(heads: Heads, normed: bool) -> None:
    from core import kernels

    y, d_out, angle = noise(6, heads.total, heads.size), noise(6, heads.total, heads.size) + 1, noise(6, 1, heads.size // 2)
    cos, sin = angle.cos(), angle.sin()
    norms = (plain.Norm(noise(heads.size), 1e-5), plain.Norm(noise(heads.size) + 1, 1e-2)) if normed else None
    raw = y if normed else None
    out = kernels.rotated(y, cos, sin, heads, *plain._split(norms))
    dy = kernels.rotated(raw, cos, sin, heads, *plain._split(norms), d_out=d_out)
    assert_close(out.cpu(), torch_only(plain.rotate_heads, y, cos, sin, heads, norms), 1e-6)
    assert_close(dy.cpu(), torch_only(plain.rotate_heads_backward, d_out, raw, cos, sin, heads, norms), 2e-6)


@needs_triton
@pytest.mark.parametrize(("heads", "rows"), [(HEADS[0], 3), (HEADS[2], 80), (Heads(6, 2, 24), 1)], ids=str)
def test_attention_over_pages_of_sequences_of_any_length(heads: Heads, rows: int) -> None:
    from core import kernels

    k, v = noise(30, PAGE, heads.kv, heads.size), noise(30, PAGE, heads.kv, heads.size) * 2
    generator = torch.Generator().manual_seed(rows)
    positions = torch.randint(0, 6 * PAGE, (rows,), generator=generator)
    positions[0] = 6 * PAGE - 1
    table = torch.stack([torch.randperm(30, generator=generator)[:6] for _ in range(rows)]).int()
    q = noise(rows, heads.total, heads.size)[:, : heads.q]
    expected = torch.empty(rows, heads.q, heads.size)
    attend_pages(q.cpu(), k.cpu(), v.cpu(), table, positions, 0.3, heads, expected)
    found = torch.empty(rows, heads.q, heads.size, device=DEVICE)
    kernels.attend_pages(q, k, v, table.to(DEVICE), positions.to(DEVICE), 0.3, heads, found)
    assert_close(found.cpu(), expected, 2e-6)
