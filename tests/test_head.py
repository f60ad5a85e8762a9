"""The chunked head gives log_softmax's logprobs and gradients without the logits of a whole micro-batch."""

from __future__ import annotations

import pytest
import torch

from core.datum import LoraConfig
from core.head import UNEMBED, Head, Part, chunk_rows, run_head
from core.lora import Adapter, Geometry, Matrix, Segment, Site
from tests.tiny import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
D, V = 24, 101
CPU = torch.device("cpu")


def parts_of(adapter: Adapter | None, rows: int) -> list[Part]:
    if adapter is None:
        return [Part(slice(0, rows), Segment(0, rows, Geometry({}, 0), torch.empty(0, 0), 1.0, None), 1.0)]
    grad = torch.zeros_like(adapter.params)
    return [
        Part(slice(0, rows), Segment(0, rows, adapter.geometry, adapter.params, adapter.scale, grad, []), adapter.scale)
    ]


def unembedding(rank: int = 3) -> Adapter:
    config = LoraConfig(rank, train_attn=False, train_mlp=False)
    adapter = Adapter(config, Geometry.of([Site(UNEMBED, UNEMBED, D, (Matrix("lm_head", V),))], config), CPU)
    ((_, _, b),) = adapter.factors()
    b.copy_(0.05 * torch.randn(b.shape, generator=torch.Generator().manual_seed(5)))
    return adapter


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 700])
@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_logprobs_and_gradients(rows: int, num_targets: int, adapted: bool, size: float) -> None:
    """`size` 40: targets whose logits lie hundreds below the largest: exp(logit - target logit) would overflow."""
    generator = torch.Generator().manual_seed(rows)
    head = Head(
        torch.randn(V, D, generator=generator) * D**-0.5,
        torch.randn(V, generator=generator) if num_targets == 3 else None,
    )
    h = size * torch.randn(rows, D, generator=generator)
    targets = torch.randint(V, (rows, num_targets), generator=generator)
    g = torch.randn(rows, num_targets, generator=generator)
    adapter = unembedding() if adapted else None
    parts = parts_of(adapter, rows)
    logprobs, dh = run_head(head, h.clone(), targets, parts, lambda chunk, _: g[chunk])

    leaf = h.double().requires_grad_()
    logits = leaf @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    if adapter is not None:
        ((_, a, b),) = adapter.factors()
        a, b = a.double().requires_grad_(), b.double().requires_grad_()
        logits = logits + adapter.scale * (leaf @ a.T) @ b.T
    expected = torch.log_softmax(logits, -1).gather(1, targets)
    torch.testing.assert_close(logprobs.double(), expected.detach(), rtol=1e-5, atol=1e-5 * size)
    (expected * g).sum().backward()
    assert_close(dh.double(), leaf.grad, 1e-5 * size)
    if adapter is not None:
        adapter.params = parts[0].segment.grad
        ((_, d_a, d_b),) = adapter.factors()
        assert_close(d_a.double(), a.grad, 1e-5 * size)
        assert_close(d_b.double(), b.grad, 1e-5 * size)


def test_the_gradient_is_asked_for_once_per_chunk_with_that_chunks_logprobs() -> None:
    rows = 2 * chunk_rows(CPU) + 10
    generator = torch.Generator().manual_seed(0)
    head, h = Head(torch.randn(V, D, generator=generator), None), torch.randn(rows, D, generator=generator)
    seen: dict[int, torch.Tensor] = {}

    def gradient_of(chunk: slice, logprobs: torch.Tensor) -> torch.Tensor:
        assert chunk.start not in seen
        seen[chunk.start] = logprobs.clone()
        return torch.ones_like(logprobs)

    logprobs, _ = run_head(head, h, torch.zeros(rows, 1, dtype=torch.int64), parts_of(None, rows), gradient_of)
    assert max(len(lp) for lp in seen.values()) <= chunk_rows(CPU)
    assert torch.equal(torch.cat([seen[start] for start in sorted(seen)]), logprobs)


def test_bf16_logprobs_of_likely_tokens_are_far_better_than_bf16_logits() -> None:
    """Logits of 60 are 0.25 apart in bf16; relative to the target's they are near zero where it matters."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(V, D, generator=generator).bfloat16(), 200
    targets = torch.randint(V, (rows, 1), generator=generator)
    h = (2.5 * weight[targets[:, 0]].float() + 0.5 * torch.randn(rows, D, generator=generator)).bfloat16()
    logits = h.double() @ weight.double().T
    expected = torch.log_softmax(logits, -1).gather(1, targets).float()
    logprobs, _ = run_head(Head(weight, None), h, targets, parts_of(None, rows), None)
    plain = torch.log_softmax((h @ weight.T).float(), -1).gather(1, targets)
    assert logits.gather(1, targets).mean() > 40
    ours, theirs = ((lp - expected).abs().mean() for lp in (logprobs, plain))
    assert ours < 0.01
    assert ours < 0.2 * theirs


def test_fp32_logprobs_of_a_large_vocabulary_are_exact() -> None:
    """50,000 terms added one after another would be off by some 1e-4."""
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(9, D, generator=generator), 0.3 * torch.randn(50_000, D, generator=generator)
    targets = torch.arange(9).unsqueeze(1) * 5000
    logprobs, _ = run_head(Head(weight, None), h, targets, parts_of(None, 9), None)
    exact = torch.log_softmax(h.double() @ weight.double().T, 1).gather(1, targets)
    assert float((logprobs - exact).abs().max()) < 5e-6


def test_a_chunk_serves_several_parts() -> None:
    """Two adapters of other ranks, rows of none between them, one across the border of two chunks; as each part by itself."""
    generator = torch.Generator().manual_seed(0)
    counts, rows = (30, 50, 300), 380
    h, targets = torch.randn(rows, D, generator=generator), torch.randint(V, (rows, 2), generator=generator)
    head, g = Head(torch.randn(V, D, generator=generator) * D**-0.5, None), torch.randn(rows, 2, generator=generator)
    adapters = [unembedding(3), None, unembedding(5)]
    alone, spans, start = [], [], 0
    for adapter, count in zip(adapters, counts, strict=True):
        span = slice(start, start + count)
        parts = parts_of(adapter, count)
        found = run_head(head, h[span].clone(), targets[span], parts, lambda chunk, _, span=span: g[span][chunk])
        alone.append((*found, parts[0].segment.grad))
        spans.append(span)
        start += count
    together = [Part(span, parts_of(adapter, count)[0].segment, adapter.scale if adapter else 1.0)
                for span, adapter, count in zip(spans, adapters, counts, strict=True)]  # fmt: skip
    logprobs, dh = run_head(head, h.clone(), targets, together, lambda chunk, _: g[chunk])
    assert dh is not None
    for span, part, (theirs, their_dh, their_grad) in zip(spans, together, alone, strict=True):
        assert_close(logprobs[span], theirs, 1e-6)
        assert their_dh is not None
        assert_close(dh[span], their_dh, 2e-6)
        if their_grad is not None:
            assert part.segment.grad is not None
            assert_close(part.segment.grad, their_grad, 5e-6)
