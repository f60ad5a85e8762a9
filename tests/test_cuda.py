"""The engine on a GPU: the CPU's numbers in fp32, the trainer's in the sampler, whatever is captured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core import AdamParams, EngineOptions, ModelInput, SamplingParams, ServiceClient, TrainingClient
from core.attention import Heads, attend, consecutive, make_layout, varlen_between
from core.elementwise import kernels
from tests.tiny import KINDS, assert_close, data, new_client, randomise, tiny_model_dir, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = torch.device("cuda")
TIMEOUT = 300


@pytest.fixture(autouse=True)
def real_products() -> Iterator[None]:
    """fp32 products in fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def client_on(
    store: Path, kind: str = "llama", dtype: str = "float32", rank: int = 4, seed: int = 0, **options
) -> TrainingClient:
    service = ServiceClient(store, EngineOptions(dtype, "cuda", **options))
    client = service.create_lora_training_client(str(tiny_model_dir(kind)), rank, seed).result(TIMEOUT)
    randomise(client, seed)
    return client


def test_kernels_and_varlen_attention_are_in_use() -> None:
    assert kernels(CUDA) is not None
    assert varlen_between(CUDA, torch.bfloat16) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_losses_logprobs_gradients_and_steps_are_the_cpus(kind: str, tmp_path: Path) -> None:
    ours, theirs = client_on(tmp_path, kind), new_client(tmp_path, kind)
    batch = data([5, 40, 17, 64, 1])
    for _ in range(2):
        left, right = (client.forward_backward(batch, "cross_entropy").result(TIMEOUT) for client in (ours, theirs))
        for a, b in zip(left.loss_fn_outputs, right.loss_fn_outputs, strict=True):
            assert_close(a["logprobs"], b["logprobs"], 1e-5)
        assert_close(ours.adapter.grad.cpu(), theirs.adapter.grad, 1e-4)
        for client in (ours, theirs):
            client.optim_step(AdamParams(1e-3)).result(TIMEOUT)
    assert_close(ours.adapter.params.cpu(), theirs.adapter.params, 1e-3)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("heads", [Heads(4, 2, 64), Heads(8, 1, 128), Heads(4, 4, 32)], ids=str)
def test_varlen_attention_is_the_grouped_one_and_so_are_its_gradients(heads: Heads) -> None:
    lengths = [5, 300, 64, 1]
    qkv = torch.randn(sum(lengths), heads.total, heads.size, device=CUDA)
    assert varlen_between(CUDA, torch.bfloat16) is not None
    d_out = torch.randn(sum(lengths), heads.q * heads.size, device=CUDA)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        one = qkv.to(dtype, copy=True).requires_grad_()
        out = attend(one, make_layout(consecutive(lengths), heads, CUDA, dtype), heads.size**-0.5)
        out.backward(d_out.to(dtype))
        assert one.grad is not None
        found.append((out.detach().float(), one.grad.float()))
    for exact, rounded in zip(*found, strict=True):
        assert_close(rounded, exact, 1e-2)


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    batch = data([5, 40, 17, 300], weights=False)
    found = []
    for dtype in ("float32", "bfloat16"):
        client = client_on(tmp_path, "qwen3", dtype)
        output = client.forward_backward(batch, "cross_entropy").result(TIMEOUT)
        found.append((torch.cat([o["logprobs"] for o in output.loss_fn_outputs]), client.adapter.grad.clone()))
        client.close()
    (exact, gradient), (rounded, rounded_gradient) = found
    assert (rounded - exact).abs().mean() < 0.03
    assert_close(rounded_gradient, gradient, 0.05)


def gaps(client: TrainingClient, sampler, asked: list[tuple[list[int], object]]) -> torch.Tensor:
    """The sampler's logprobs less the trainer's."""
    found = []
    for prompt, future in asked:
        for sequence in future.result(TIMEOUT).sequences:  # type: ignore[attr-defined]
            scored = sampler.compute_logprobs(ModelInput.from_ints(prompt + sequence.tokens)).result(TIMEOUT)
            found.append(torch.tensor(sequence.logprobs) - torch.tensor(scored[len(prompt) :]))
    return torch.cat(found)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 0.3)])
def test_sampled_logprobs_are_the_trainers(captured: bool, dtype: str, limit: float, tmp_path: Path) -> None:
    """Several adapters of two ranks and the base; lengths over several pages; new weights after a step, in captured steps."""
    clients = [client_on(tmp_path, "qwen3", dtype, rank, seed, cuda_graphs=captured) for rank, seed in ((4, 0), (4, 1), (8, 2))]
    for turn in range(3):
        samplers = [client.save_weights_and_get_sampling_client().result(TIMEOUT) for client in clients]
        asked = []
        with samplers[0].together():
            for i, n in enumerate((1, 2, 63, 64, 65, 200)):
                for sampler in samplers:
                    prompt = tokens(n, 10 * turn + i)
                    params = SamplingParams(20 + 30 * (i % 3), seed=0)
                    asked.append((sampler, prompt, sampler.sample(ModelInput.from_ints(prompt), 2, params)))
        for client, sampler in zip(clients, samplers, strict=True):
            gap = gaps(client, sampler, [(prompt, future) for s, prompt, future in asked if s is sampler])
            assert gap.abs().max() < limit
            assert gap.square().mean() / 2 < limit**2 / 20
        steps = clients[0].engine.sampler.steps
        assert steps is not None and bool(steps._made) is captured
        for client in clients:
            client.forward_backward(data([9, 30], turn), "cross_entropy")
            client.optim_step(AdamParams(3e-3)).result(TIMEOUT)
        for sampler in samplers:
            sampler.close()
    for client in clients:
        client.close()


def test_a_seed_fixes_the_sample_and_a_cached_prefix_does_not_change_it(tmp_path: Path) -> None:
    client = client_on(tmp_path, "llama")
    sampler = client.save_weights_and_get_sampling_client().result(TIMEOUT)
    prompt = ModelInput.from_ints(tokens(150, 1))
    first, second = (sampler.sample(prompt, 3, SamplingParams(40, seed=5)).result(TIMEOUT) for _ in range(2))
    assert [s.tokens for s in first.sequences] == [s.tokens for s in second.sequences]
    sampler.close()
    client.close()
