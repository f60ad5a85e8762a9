"""Attention over packed rows equals torch's own, sequence by sequence: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from core.attention import BLOCK, Heads, attend, consecutive, make_layout
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
@pytest.mark.parametrize("heads", [Heads(4, 2, 8), Heads(3, 3, 16), Heads(6, 1, 4)], ids=str)
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
