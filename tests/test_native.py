"""core/native*.c compute what torch's operations do; a machine without a compiler gets those."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from core import native
from core.attention import Heads
from core.datum import LoraConfig
from core.decoder import Decoder
from core.elementwise import Norm
from core.inference import Decode, run
from core.kv_cache import Slabs
from core.lora import ComputeCopies, Geometry, Weights, add_lora
from core.native_step import FewRows
from core.native_wide import WideRows
from core.packing import make_segment
from tests.tiny import KINDS, tiny_model, tiny_model_dir

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler for this processor, or another OpenMP")
DTYPES = {torch.float32: 3e-6, torch.bfloat16: 2**-8}  # rounding of one value, relative
ROWS, WIDTH = 37, 50  # no multiples of a vector


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))).to(dtype)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, atol: float = 1e-5) -> None:
    """Equal but for the last rounding of each value."""
    difference = (found.float() - exact).abs().max()
    assert torch.allclose(found.float(), exact, rtol=DTYPES[found.dtype], atol=atol), difference


def test_the_gradient_of_swiglu_is_computed_many_values_at_once(dtype: torch.dtype) -> None:
    """gcc gives up on a loop with six pointers unless it is told that they lie apart: 12 times slower, the same numbers."""
    gate_up, da = random(512, 3072, dtype=dtype), random(512, 1536, dtype=dtype)

    def least(call: Callable[[], object]) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    assert least(lambda: native.swiglu_with_gradient(gate_up, da)) < 8 * least(lambda: native.swiglu(gate_up))


def test_normalised_rows_and_their_gradient(dtype: torch.dtype) -> None:
    norm = Norm(0.5 + torch.rand(WIDTH), 1e-5)
    x, dh, add = random(ROWS, WIDTH).requires_grad_(), random(ROWS, WIDTH, dtype=dtype), random(ROWS, WIDTH, size=3.0)
    expected = F.rms_norm(x, (WIDTH,), norm.weight, norm.eps)
    h, inverse = native.normed(x.detach(), norm.weight, norm.eps, dtype, None)
    assert_rounded(h, expected.detach())
    again, same = native.normed(x.detach(), norm.weight, norm.eps, dtype, inverse)
    assert torch.equal(again, h) and same is inverse
    expected.backward(dh.float())
    assert x.grad is not None
    assert_rounded(native.normed_backward(dh, x.detach(), norm.weight, inverse, add), x.grad + add)
    assert_rounded(native.normed_backward(dh, x.detach(), norm.weight, inverse, None), x.grad)


def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    gate_up, da = random(ROWS, 2 * WIDTH, dtype=dtype, size=4.0), random(ROWS, WIDTH, dtype=dtype)
    leaf = gate_up.float().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    expected = F.silu(gate) * up
    assert_rounded(native.swiglu(gate_up), expected.detach())
    expected.backward(da.float())
    assert leaf.grad is not None
    again, found = native.swiglu_with_gradient(gate_up, da)
    assert_rounded(again, expected.detach())
    assert_rounded(found, leaf.grad)


def test_what_is_added_to_the_residual_stream(dtype: torch.dtype) -> None:
    x, y = random(ROWS, WIDTH), random(ROWS, WIDTH, dtype=dtype)
    assert torch.equal(native.added(x, y), x + y)


def test_turned_heads_turn_back(dtype: torch.dtype) -> None:
    heads = Heads(q=4, kv=2, size=10)
    y, angle = random(ROWS, heads.total, heads.size, dtype=dtype), random(ROWS, 1, heads.size // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    first, second = y[:, :6].float().chunk(2, dim=-1)
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    out = native.rotated(y, cos, sin, heads)
    assert_rounded(out[:, :6], expected)
    assert torch.equal(out[:, 6:], y[:, 6:])
    back = native.rotated(None, cos, sin, heads, d_out=out)  # of rounded values, by a rounded angle
    assert_rounded(back, y.float(), atol=8 * DTYPES[dtype])


def test_normed_and_turned_heads_and_their_gradient(dtype: torch.dtype) -> None:
    heads, norms = Heads(q=4, kv=2, size=10), (Norm(0.5 + torch.rand(10), 1e-5), Norm(0.5 + torch.rand(10), 1e-3))
    y, d_out = (random(ROWS, heads.total, heads.size, dtype=dtype, size=size).clone() for size in (2.0, 1.0))
    angle = random(ROWS, 1, heads.size // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    leaf = y.float().requires_grad_()
    parts = zip(leaf.split([4, 2, 2], dim=1)[:2], norms, strict=True)
    first, second = torch.cat([F.rms_norm(part, (10,), norm.weight, norm.eps) for part, norm in parts], dim=1).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    expected = torch.cat([turned, leaf[:, 6:]], dim=1)
    expected.backward(d_out.float())
    assert leaf.grad is not None
    given = (cos, sin, heads, (norms[0].weight, norms[1].weight), (norms[0].eps, norms[1].eps))
    twice = 4 * DTYPES[dtype]  # what is normed is rounded before it is turned
    assert_rounded(native.rotated(y, *given), expected.detach(), atol=twice)
    assert_rounded(native.rotated(y, *given, d_out=d_out), leaf.grad, atol=twice)


@pytest.mark.parametrize(("queries", "keys", "left"), [(7, 7, (0, 0)), (5, 24, (3, 17)), (33, 48, (0, 9))])
def test_causal_softmax(queries: int, keys: int, left: tuple[int, int], dtype: torch.dtype) -> None:
    scores, group = random(2, 3 * queries, keys, dtype=dtype, size=5.0), 3
    position = torch.arange(queries).repeat_interleave(group).view(1, -1, 1) + keys - queries
    key = torch.arange(keys)
    seen = (key <= position) & (key >= torch.tensor(left).view(2, 1, 1))
    expected = torch.softmax((0.3 * scores.float()).masked_fill(~seen, float("-inf")), dim=-1)
    found = native.causal_softmax(scores.clone(), 0.3, torch.tensor(left, dtype=torch.int32), group)
    assert_rounded(found, expected)
    assert (found == 0)[~seen.expand_as(found)].all()


def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    x = random(4, WIDTH)
    x[1, 3] = float("nan")
    h, _ = native.normed(x, torch.ones(WIDTH), 1e-5, dtype, None)
    assert h[1].isnan().all() and h[[0, 2, 3]].isfinite().all()
    gate_up = random(4, 2 * WIDTH, dtype=dtype)
    gate_up[2, 5] = float("nan")
    assert native.swiglu(gate_up)[2].isnan().tolist() == [i == 5 for i in range(WIDTH)]


def test_a_row_does_not_depend_on_how_many_there_are(dtype: torch.dtype) -> None:
    """What several threads share, and what one does alone."""
    gate_up = random(4000, 2 * WIDTH, dtype=dtype)
    assert torch.equal(native.swiglu(gate_up)[:3], native.swiglu(gate_up[:3].clone()))


def test_without_a_compiler_the_numbers_are_the_same(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from core import *; from core import native\n"
        "service = ServiceClient(sys.argv[2], EngineOptions(dtype='float32', device='cpu'))\n"
        "sampler = service.create_sampling_client(base_model=sys.argv[1]).result()\n"
        "print(native.available(), *sampler.compute_logprobs(ModelInput.from_ints(range(60))).result()[1:])"
    )

    def told(**changed: str) -> tuple[str, list[float]]:
        command = [sys.executable, "-c", program, str(tiny_model_dir("llama")), str(tmp_path)]
        environment = {**os.environ, **changed}
        words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        return words[0], [float(word) for word in words[1:]]

    built, with_kernels = told()
    missing, without = told(PATH=str(tmp_path), COOK_CACHE=str(tmp_path))
    assert (built, missing) == ("True", "False")
    assert with_kernels == pytest.approx(without, abs=1e-4)


@pytest.mark.parametrize(("size", "group", "kv"), [(8, 1, 2), (24, 3, 1), (64, 4, 1), (16, 7, 2)])
def test_rows_look_at_their_cached_past(size: int, group: int, kv: int, dtype: torch.dtype) -> None:
    """Three sequences of one row each, one of them longer than a block of keys, in slots and rows of any order."""
    heads, room, scaling = Heads(kv * group, kv, size), 640, size**-0.5
    k, v = random(5, kv, room // 16, size, 16, dtype=dtype), random(5, kv, room, size, dtype=dtype)
    qkv, out = random(6, heads.total, size, dtype=dtype), torch.zeros(6, heads.q, size, dtype=dtype)
    rows, slots, positions = torch.tensor([4, 0, 3]), torch.tensor([1, 4, 2]), torch.tensor([0, 600, 17])
    native.cached_attention(qkv, out, rows, slots, positions, k, v, scaling, heads)
    q, new_k, new_v = qkv.split([heads.q, kv, kv], dim=1)
    for row, slot, position in zip(rows, slots, positions, strict=True):
        keys, values = k[slot].transpose(1, 2).flatten(2)[..., : position + 1], v[slot, :, : position + 1]
        assert torch.equal(keys[..., -1], new_k[row])
        assert torch.equal(values[:, -1], new_v[row])
        weights = torch.softmax(q[row].view(kv, group, size).float() @ keys.float() * scaling, dim=-1)
        assert_rounded(out[row], (weights @ values.float()).view(heads.q, size))
    assert not out[[1, 2, 5]].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_step_of_few_rows_is_one_of_many(kind: str, count: int, dtype: torch.dtype) -> None:
    model: Any = tiny_model(kind)
    decoder = Decoder(model.to(dtype), dtype, torch.device("cpu"))
    assert_like_products(decoder, FewRows(decoder, ComputeCopies(dtype)), owners_of(decoder, count))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "each"), [(1, 1), (3, 1), (40, 1), (40, 6), (100, 50)])
def test_a_step_with_tiles_is_one_without(kind: str, count: int, each: int) -> None:
    """Adapters of `each` rows, whose borders are not those of the tiles."""
    model: Any = tiny_model(kind, intermediate_size=64)  # whole tiles
    decoder = Decoder(model.to(torch.bfloat16), torch.bfloat16, torch.device("cpu"))
    assert WideRows.available(decoder)
    owners = [weights for weights in owners_of(decoder, -(-count // each)) for _ in range(each)][:count]
    assert_like_products(decoder, WideRows(decoder, ComputeCopies(torch.bfloat16)), owners)


def owners_of(decoder: Decoder, count: int) -> list[Weights]:
    return sorted((adapter(decoder, i) for i in range(count)), key=lambda weights: (weights.config.rank, weights.key))


def assert_like_products(decoder: Decoder, rows: FewRows | WideRows, owners: list[Weights]) -> None:
    """A step gives what torch's products give, for sequences in slots of two sizes."""
    dtype, count = decoder.dtype, len(owners)
    pools = [Slabs(64 << i, count, len(decoder.layers), decoder.heads, dtype, decoder.device) for i in range(2)]
    for pool in pools:
        pool.grow(count)
        pool.k.copy_(random(*pool.k.shape, dtype=dtype))
        pool.v.copy_(random(*pool.v.shape, dtype=dtype))
    slots = [pools[i % 2].slots[i // 2] for i in range(count)]
    tokens, positions = torch.arange(count) + 5, 7 * torch.arange(count) % 60
    found = rows.step(slots, owners).run(tokens, positions)
    parts = Decode.of(slots, positions)
    for part in parts:
        part.ready(dtype)
    segments = [make_segment(i, i + 1, [w], [(w, 0, 1)], rows.copies, with_grad=False) for i, w in enumerate(owners)]
    with torch.no_grad():
        expected = run(decoder, tokens, positions, partial(add_lora, segments=segments), parts)
    limit = 1e-5 if dtype == torch.float32 else 0.02  # where a rounding went the other way
    assert (found - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("kind", [FewRows, WideRows])
def test_an_overflowing_adapter_spoils_only_its_own_row(kind: type[FewRows | WideRows], request: pytest.FixtureRequest) -> None:
    if kind is WideRows:
        request.getfixturevalue("tiles")
    dtype = torch.float32 if kind is FewRows else torch.bfloat16
    model: Any = tiny_model(intermediate_size=64)
    decoder = Decoder(model.to(dtype), dtype, torch.device("cpu"))
    pool = Slabs(64, 4, len(decoder.layers), decoder.heads, dtype, decoder.device)
    pool.grow(3)
    owners = [adapter(decoder, i) for i in (1, 4, 5)]
    owners[1].params.fill_(1e30)
    step = kind(decoder, ComputeCopies(dtype)).step(pool.slots[:3], owners)
    x = step.run(torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.int64))
    assert torch.isfinite(x[[0, 2]]).all()
    assert not torch.isfinite(x[1]).any()


def adapter(decoder: Decoder, number: int) -> Weights:
    """One of several ranks and geometries, none for every fourth."""
    config = LoraConfig(rank=(1, 4, 20)[number % 3], train_mlp=number % 5 != 2)
    geometry = Geometry({}, 0) if number % 4 == 3 else Geometry.of(decoder.sites, config)
    params = 0.1 * random(geometry.num_rows, config.rank)
    return Weights((number, 0), config, geometry, params)
