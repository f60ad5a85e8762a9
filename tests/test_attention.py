"""Attention over packed rows equals torch's own, sequence by sequence: values and gradients.

Heads of a multiple of 16 go through core/native_attention.c where there is a compiler, others through torch's operations.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from core import native
from core.attention import BLOCK, Extent, Heads, Layout, attend, consecutive, make_layout
from tests.tiny import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
PACKS = [
    [1], [2], [15], [16], [17], [1, 1, 1, 1], [1, 2, 15, 16, 17], [17, 16, 15, 2, 1], [40, 40, 40],
    [33, 90, 3, 64, 63, 65],
    [BLOCK - 1, BLOCK, BLOCK + 1], [2 * BLOCK + 5, 3], [600, 512, 100, 300, 1, 599],
]  # fmt: skip


def reference(qkv: torch.Tensor, lengths: list[int], heads: Heads, scaling: float) -> torch.Tensor:
    outputs = []
    for part in qkv.split(lengths):
        q, k, v = (t.transpose(0, 1) for t in part.split([heads.q, heads.kv, heads.kv], dim=1))
        k, v = (t.repeat_interleave(heads.group, 0) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        outputs.append(out.transpose(0, 1).reshape(len(part), -1))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize("heads", [Heads(4, 2, 8), Heads(3, 3, 16), Heads(6, 1, 4), Heads(9, 3, 64)], ids=str)
def test_values_and_gradients_of_any_mix_of_lengths(lengths: list[int], heads: Heads) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = sum(lengths)
    qkv = torch.randn(rows, heads.total, heads.size, generator=generator).mul_(1.5)
    d_out = torch.randn(rows, heads.q * heads.size, generator=generator)
    ours, theirs = (qkv.clone().requires_grad_() for _ in range(2))
    left = attend(ours, make_layout(consecutive(lengths), heads, CPU, torch.float32), 0.4)
    right = reference(theirs, lengths, heads, 0.4)
    assert_close(left.detach(), right.detach(), 2e-6)
    left.backward(d_out)
    right.backward(d_out)
    assert_close(ours.grad, theirs.grad, 5e-6)


def test_a_later_token_and_another_sequence_change_nothing() -> None:
    heads, lengths = Heads(4, 2, 8), [20, 300, 7]
    qkv = torch.randn(sum(lengths), heads.total, heads.size, generator=torch.Generator().manual_seed(0))
    layout = make_layout(consecutive(lengths), heads, CPU, torch.float32)
    before = attend(qkv, layout, 0.3)
    changed = qkv.clone()
    changed[20 + 200 :] += 100.0  # the second half of the second sequence, and the third
    after = attend(changed, layout, 0.3)
    assert torch.equal(before[: 20 + 200], after[: 20 + 200])
    assert not torch.equal(before[20 + 200 :], after[20 + 200 :])


SHARED = [  # two prompts, replies to them, and a reply to a prompt and a reply; an extent of one row
    Extent(0, 50), Extent(50, 33), Extent(83, 20, torch.arange(50)), Extent(103, 70, torch.arange(50)),
    Extent(173, 1, torch.arange(31)), Extent(174, 16, torch.arange(50, 83)),
    Extent(190, 18, torch.cat([torch.arange(50), torch.arange(83, 96)])),
]  # fmt: skip


def whole(extents: list[Extent]) -> list[torch.Tensor]:
    """The rows of every sequence from its first position on."""
    own = [torch.arange(e.start, e.start + e.length) for e in extents]
    return [rows if e.prefix is None else torch.cat([e.prefix, rows]) for e, rows in zip(extents, own, strict=True)]


def run(layout: Layout, qkv: torch.Tensor, d_out: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    given = qkv.clone().requires_grad_()
    out = attend(given, layout, scaling)
    out.backward(d_out)
    assert given.grad is not None
    return out.detach(), given.grad


@pytest.mark.parametrize("heads", [Heads(4, 2, 8), Heads(9, 3, 64), Heads(5, 1, 48), Heads(72, 1, 16)], ids=str)
def test_rows_that_several_sequences_begin_with(heads: Heads) -> None:
    generator = torch.Generator().manual_seed(heads.q)
    qkv = torch.randn(208, heads.total, heads.size, generator=generator)
    d_out = torch.randn(208, heads.q * heads.size, generator=generator)
    layout = make_layout(SHARED, heads, CPU, torch.float32)
    assert (layout.table is not None) == (native.available() and heads.size % 16 == 0)
    out, grad = run(layout, qkv, d_out, 0.3)
    apart = qkv.clone().requires_grad_()
    for extent, rows in zip(SHARED, whole(SHARED), strict=True):
        mine = reference(apart[rows], [len(rows)], heads, 0.3)[-extent.length :]
        own = slice(extent.start, extent.start + extent.length)
        assert_close(out[own], mine.detach(), 2e-6)
        mine.backward(d_out[own])
    assert apart.grad is not None
    assert_close(grad, apart.grad, 5e-6)


@pytest.mark.skipif(not native.packs(torch.bfloat16, 64), reason="no compiler, or a processor without products in bf16")
@pytest.mark.parametrize("products", ["vectors", "tiles"])
def test_bf16_is_as_near_to_fp32_as_torchs_operations(
    products: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "tiles":
        request.getfixturevalue("tiles")
    heads = Heads(9, 3, 64)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(208, heads.total, heads.size, generator=generator).bfloat16()
    d_out = torch.randn(208, heads.q * heads.size, generator=generator).bfloat16()
    exact = run(make_layout(SHARED, heads, CPU, torch.float32), qkv.float(), d_out.float(), 0.125)
    ours = run(make_layout(SHARED, heads, CPU, torch.bfloat16), qkv, d_out, 0.125)
    monkeypatch.setattr(native, "packs", lambda *_: False)
    theirs = run(make_layout(SHARED, heads, CPU, torch.bfloat16), qkv, d_out, 0.125)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert (mine.float() - right).norm() <= 1.02 * (other.float() - right).norm()
        assert_close(mine.float(), right, 0.02)


def test_a_sequence_that_has_diverged_leaves_others_alone_and_shows_it() -> None:
    heads, lengths = Heads(2, 1, 16), [20, 30]
    qkv = torch.randn(50, heads.total, heads.size, generator=torch.Generator().manual_seed(0))
    qkv[3, heads.q :] = float("nan")
    out, grad = run(make_layout(consecutive(lengths), heads, CPU, torch.float32), qkv, torch.ones(50, 32), 0.25)
    assert out[:20].isnan().any() and grad[:20].isnan().any()
    assert out[20:].isfinite().all() and grad[20:].isfinite().all()
