"""The layout of adapters: what is where, products with it, several side by side."""

from __future__ import annotations

import pytest
import torch

from core import native, native_lora
from core.datum import AdamParams, LoraConfig
from core.lora import Adapter, ComputeCopies, Geometry, Matrix, Segment, Site, add_lora, add_lora_backward
from tests.tiny import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SITES = [
    Site("qkv", "attn", 12, (Matrix("q", 8), Matrix("k", 4), Matrix("v", 4))),
    Site("down", "mlp", 20, (Matrix("d", 12),)),
]


def random_adapter(rank: int, seed: int, **targets) -> Adapter:
    config = LoraConfig(rank, seed, **targets)
    adapter = Adapter(config, Geometry.of(SITES, config), CPU)
    generator = torch.Generator().manual_seed(seed)
    for _, _, b in adapter.factors():
        b.copy_(torch.randn(b.shape, generator=generator))
    return adapter


def test_every_number_of_an_adapter_belongs_to_exactly_one_factor() -> None:
    adapter = random_adapter(5, 0)
    shapes = {name: (tuple(a.shape), tuple(b.shape)) for name, a, b in adapter.factors()}
    assert shapes == {"q": ((5, 12), (8, 5)), "k": ((5, 12), (4, 5)), "v": ((5, 12), (4, 5)), "d": ((5, 20), (12, 5))}
    adapter.params.zero_()
    for _, a, b in adapter.factors():
        a.add_(1)
        b.add_(1)
    assert torch.equal(adapter.params, torch.ones_like(adapter.params))


def test_scale_is_32_over_rank() -> None:
    assert [random_adapter(rank, 0).scale for rank in (1, 8, 32, 64)] == [32.0, 4.0, 1.0, 0.5]


def segments_of(adapters: list[Adapter], lengths: list[int], shared: bool) -> list[Segment]:
    """One segment per adapter, or one for all with the columns of the others zeroed."""
    if not shared:
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return [
            Segment(s, s + n, a.geometry, a.params, a.scale, torch.zeros_like(a.params), [(a, slice(0, a.config.rank))])
            for a, s, n in zip(adapters, starts, lengths, strict=True)
        ]
    factors, ranks = ComputeCopies(torch.float32).get(adapters), [a.config.rank for a in adapters]
    scale, columns, row, column = torch.zeros(sum(lengths), sum(ranks)), [], 0, 0
    for adapter, rank, length in zip(adapters, ranks, lengths, strict=True):
        columns.append((adapter, slice(column, column + rank)))
        scale[row : row + length, column : column + rank] = adapter.scale
        row, column = row + length, column + rank
    return [Segment(0, sum(lengths), adapters[0].geometry, factors, scale, torch.zeros_like(factors), columns)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_products_and_gradients_of_several_adapters(site: Site, shared: bool) -> None:
    """y += s (x A^T) B^T and its backward, against autograd on each adapter's own rows."""
    adapters, lengths = [random_adapter(rank, rank) for rank in (1, 3, 8)], [5, 1, 9]
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(15, site.d_in, generator=generator), torch.randn(15, site.d_out, generator=generator)
    y, dx = torch.zeros(15, site.d_out), torch.zeros(15, site.d_in)
    segments = segments_of(adapters, lengths, shared)
    kept = add_lora(x, y, site.name, segments)
    add_lora_backward(x, dy, dx, kept, site.name, segments)
    for segment in segments:
        segment.fold()
    names = [matrix.name for matrix in site.matrices]
    for adapter, rows, d_rows, y_rows, dx_rows in zip(
        adapters, x.split(lengths), dy.split(lengths), y.split(lengths), dx.split(lengths), strict=True
    ):
        leaf = rows.clone().requires_grad_()
        pairs = {name: (a.clone().requires_grad_(), b.clone().requires_grad_()) for name, a, b in adapter.factors()}
        expected = torch.cat([adapter.scale * (leaf @ pairs[n][0].T) @ pairs[n][1].T for n in names], 1)
        expected.backward(d_rows)
        assert_close(y_rows, expected.detach(), 1e-6)
        assert_close(dx_rows, leaf.grad, 1e-6)
        assert adapter.has_grad
        adapter.params = adapter.grad
        for name, d_a, d_b in adapter.factors():
            if name in names:
                assert_close(d_a, pairs[name][0].grad, 1e-6)
                assert_close(d_b, pairs[name][1].grad, 1e-6)
            else:
                assert not d_a.any() and not d_b.any()


def test_rows_of_adapters_that_leave_a_site_out_pass_untouched() -> None:
    adapter = random_adapter(2, 0, train_mlp=False)
    (segment,) = segments_of([adapter], [4], shared=False)
    x, y = torch.randn(4, 20), torch.zeros(4, 12)
    kept = add_lora(x, y, "down", [segment])
    dx = torch.zeros(4, 20)
    add_lora_backward(x, torch.randn(4, 12), dx, kept, "down", [segment])
    assert not y.any() and not dx.any() and not segment.grad.any()


def test_a_copy_is_made_anew_when_and_only_when_an_adapter_has_moved() -> None:
    one, two = random_adapter(1, 1), random_adapter(2, 2)
    copies = ComputeCopies(torch.bfloat16)
    both = copies.get([one, two])
    assert (both.dtype, both.shape[1]) == (torch.bfloat16, 3)
    assert copies.get([one, two]) is both
    one.grad.fill_(1.0)
    one.optim_step(AdamParams(0.1))
    moved = copies.get([one, two])
    assert moved is not both
    assert torch.equal(moved[:, :1], one.params.bfloat16())
    assert torch.equal(moved[:, 1:], two.params.bfloat16())
    copies.forget(one)
    assert not copies._copies


def test_snapshots_that_nobody_holds_leave_nothing_behind() -> None:
    adapter = random_adapter(2, 0)
    for _ in range(20):
        adapter.snapshot()
        adapter.make_own()
    assert len(adapter._lent) <= 1


def test_in_fp32_one_adapter_alone_is_used_without_a_copy() -> None:
    adapter = random_adapter(2, 0)
    assert ComputeCopies(torch.float32).get([adapter]) is adapter.params


@pytest.mark.skipif(not native.available(), reason="no C compiler for this processor")
@pytest.mark.parametrize("way", ["fp32", "bf16", "tiles"])
@pytest.mark.parametrize("d_outs", [(80, 16, 16), (192,), (96, 96)], ids=str)
def test_the_c_code_adds_what_products_add(
    d_outs: tuple[int, ...], way: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of any ranks beside one without a factor here, with more rows than are summed at once."""
    dtype = torch.float32 if way == "fp32" else torch.bfloat16
    if way == "tiles":
        request.getfixturevalue("tiles")
    if not native_lora.available(dtype, torch.device("cpu")):
        pytest.skip("a processor without products in bf16")
    site = Site("s", "mlp", 112, tuple(Matrix(f"m{i}", d_out) for i, d_out in enumerate(d_outs)))
    other = Site("t", "attn", 16, (Matrix("o", 16),))
    generator = torch.Generator().manual_seed(len(d_outs))
    segments, start = [], 0
    for count, rank, sites in ((16, 1, [site]), (48, 7, [other, site]), (32, 4, [other]), (304, 32, [site]), (64, 40, [site])):
        config = LoraConfig(rank=rank, train_mlp=site in sites, train_attn=other in sites)
        adapter = Adapter(config, Geometry.of(sites, config), torch.device("cpu"))
        params = adapter.params.uniform_(-0.3, 0.3, generator=generator).to(dtype)
        segments.append(Segment(start, start + count, adapter.geometry, params, adapter.scale, torch.empty_like(params)))
        start += count
    shapes = ((start, 112), (start, sum(d_outs)), (start, sum(d_outs)), (start, 112))
    x, y, dy, dx = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)

    def results() -> list[torch.Tensor]:
        out, gradient = y.clone(), dx.clone()
        for segment in segments:
            assert segment.grad is not None
            segment.grad.zero_()
        add_lora_backward(x, dy, gradient, add_lora(x, out, "s", segments), "s", segments)
        return [out, gradient, *(segment.grad.clone() for segment in segments if segment.grad is not None)]

    assert native_lora.takes(x, "s", segments)
    ours = results()
    monkeypatch.setattr(native_lora, "takes", lambda *_: False)
    for mine, theirs in zip(ours, results(), strict=True):
        assert_close(mine.float(), theirs.float(), 2e-6 if dtype == torch.float32 else 0.02)
