"""The verbs of a training client: what moves and what does not, a new adapter, bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core import AdamParams, TrainingClient, clients
from tests.tiny import CONTEXT, VOCAB, assert_close, data, datum, factors, flat, new_client, service_at, tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (5, 17, 30)


def logprobs(client: TrainingClient, batch=None) -> torch.Tensor:
    outputs = client.forward(batch or data(LENGTHS), "cross_entropy").result().loss_fn_outputs
    return torch.cat([output["logprobs"] for output in outputs])


# ---- what moves


def test_forward_backward_moves_no_weight_and_forward_leaves_no_gradient(tmp_path: Path) -> None:
    client = new_client(tmp_path)
    base = [parameter.clone() for parameter in client.engine.decoder.model.parameters()]
    before = flat(client)
    client.forward(data(LENGTHS), "cross_entropy").result()
    assert not client.adapter.has_grad
    assert all(torch.equal(flat(client)[key], value) for key, value in before.items())
    client.forward_backward(data(LENGTHS), "cross_entropy").result()
    after = flat(client)
    assert after["grad"].any()
    assert all(torch.equal(after[key], before[key]) for key in ("params", "exp_avg", "exp_avg_sq"))
    client.optim_step(AdamParams()).result()
    assert not torch.equal(flat(client)["params"], before["params"])
    assert all(torch.equal(*pair) for pair in zip(base, client.engine.decoder.model.parameters(), strict=True))
    client.close()


@pytest.mark.parametrize(
    "adam",
    [
        AdamParams(1e-2),
        AdamParams(3e-3, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.3),
        AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=0.5),
        AdamParams(1e-2, grad_clip_norm=1e9),
    ],
)
def test_optim_step_is_adamw_with_decoupled_decay(adam: AdamParams, tmp_path: Path) -> None:
    client = new_client(tmp_path)
    theirs = torch.nn.Parameter(client.adapter.params.clone())
    optimizer = torch.optim.AdamW([theirs], adam.learning_rate, (adam.beta1, adam.beta2), adam.eps, adam.weight_decay)
    for number in range(4):
        client.forward_backward(data(LENGTHS, number), "cross_entropy").result()
        theirs.grad = client.adapter.grad.clone()
        norm = float(theirs.grad.norm())
        if adam.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_([theirs], adam.grad_clip_norm)
        optimizer.step()
        assert client.optim_step(adam).result().metrics == {"grad_norm:mean": pytest.approx(norm, rel=1e-6)}
        assert client.adapter.step == number + 1
        assert not client.adapter.grad.any()
    assert_close(client.adapter.params, theirs.detach(), 1e-6)
    assert_close(client.adapter.exp_avg, optimizer.state[theirs]["exp_avg"], 1e-6)
    assert_close(client.adapter.exp_avg_sq, optimizer.state[theirs]["exp_avg_sq"], 1e-6)
    client.close()


def test_optim_step_by_the_formula(tmp_path: Path) -> None:
    """The first step by hand: decay, then lr * g / (|g| + eps), since both bias corrections cancel."""
    client = new_client(tmp_path)
    client.forward_backward(data(LENGTHS), "cross_entropy").result()
    before = flat(client)
    client.optim_step(AdamParams(0.01, weight_decay=0.5, eps=1e-3)).result()
    g = before["grad"]
    expected = before["params"] * (1 - 0.01 * 0.5) - 0.01 * g / (g.abs() + 1e-3)
    assert_close(client.adapter.params, expected, 1e-6)
    client.close()


def test_optim_step_without_a_gradient_is_refused(tmp_path: Path) -> None:
    client = new_client(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^optim_step without a gradient: call forward_backward first$"):
            client.optim_step(AdamParams()).result()
        client.forward_backward(data(LENGTHS), "cross_entropy").result()
        client.optim_step(AdamParams()).result()
    assert client.adapter.step == 2
    client.close()


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_dropped(tmp_path: Path) -> None:
    client = new_client(tmp_path)
    huge = datum(9, loss_fn="importance_sampling")
    huge.loss_fn_inputs["logprobs"][:] = -1000.0  # ratio exp(990)
    client.forward_backward([huge], "importance_sampling").result()
    before = flat(client)
    with pytest.raises(
        FloatingPointError,
        match=r"^the gradient of optimizer step 1 is not finite \(norm (nan|inf)\); weights unmoved$",
    ):
        client.optim_step(AdamParams()).result()
    after = flat(client)
    assert all(torch.equal(after[key], before[key]) for key in ("params", "exp_avg", "exp_avg_sq"))
    assert not client.adapter.has_grad and not after["grad"].any()
    client.forward_backward(data(LENGTHS), "cross_entropy").result()
    client.optim_step(AdamParams()).result()
    assert torch.isfinite(client.adapter.params).all() and client.adapter.step == 1
    client.close()


def test_training_learns_its_data_by_heart(tmp_path: Path) -> None:
    client, batch = new_client(tmp_path, noise=False, rank=8), data((20, 30), weights=False)
    losses = []
    for _ in range(60):
        losses.append(client.forward_backward(batch, "cross_entropy"))
        client.optim_step(AdamParams(2e-2))
    first, last = (losses[i].result().metrics["loss:sum"] for i in (0, -1))
    assert first > 5 * 50 and last < 0.1 * first
    client.close()


# ---- a new adapter


def test_a_new_adapter_equals_the_base_whatever_its_rank_and_seed(tmp_path: Path) -> None:
    made = [new_client(tmp_path, rank=rank, seed=rank, noise=False) for rank in (1, 4, 16)]
    first, *others = [logprobs(client) for client in made]
    assert all(torch.equal(first, other) for other in others)
    for client in made:
        assert all(not b.any() for _, b in factors(client).values())
        client.close()


def test_first_steps_do_not_depend_on_the_rank(tmp_path: Path) -> None:
    """alpha is fixed and A's bound does not know the rank: d W after one step of B has one size for all ranks."""
    moves = []
    for rank in (1, 4, 16):
        client = new_client(tmp_path, rank=rank, noise=False)
        before = logprobs(client)
        client.forward_backward(data(LENGTHS), "cross_entropy").result()
        client.optim_step(AdamParams(1e-4)).result()
        moves.append(float((logprobs(client) - before).abs().mean()))
        client.close()
    assert max(moves) < 1.6 * min(moves)


def test_a_is_uniform_within_its_bound_and_the_seed_decides_it(tmp_path: Path) -> None:
    one, same, other = (new_client(tmp_path, rank=64, seed=seed, noise=False) for seed in (3, 3, 4))
    for name, (a, _) in factors(one).items():
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound
        assert a.abs().max() > 0.99 * bound
        assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(float(a.mean())) < 0.1 * bound
        assert torch.equal(a, factors(same)[name][0])
        assert not torch.equal(a, factors(other)[name][0])
    values = torch.cat([a.reshape(-1) for a, _ in factors(one).values()])
    assert len(values.unique()) > 0.9 * len(values)  # no two matrices share their draw
    for client in (one, same, other):
        client.close()


def test_a_rank_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^rank is 0, expected at least 1$"):
        new_client(tmp_path, rank=0)
    assert not clients._engines


def test_info_says_what_a_recipe_may_want_to_know(tmp_path: Path) -> None:
    client = new_client(tmp_path, "qwen3")
    info = client.get_info()
    assert (info.base_model, info.model_type, info.hidden_size) == (str(tiny_model_dir("qwen3")), "qwen3", 32)
    assert (info.vocab_size, info.max_length, info.dtype, info.device, info.token_budget) == (
        VOCAB,
        CONTEXT,
        "float32",
        "cpu",
        1024,
    )
    assert info.num_parameters == sum(p.numel() for p in client.engine.decoder.model.parameters()) > 30_000
    client.close()


# ---- bfloat16


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_bfloat16_is_near_float32(kind: str, tmp_path: Path) -> None:
    """Weights rounded to bf16 move a logprob by 0.025 nats in the mean, a gradient by 5 %; adapters stay fp32."""
    exact = new_client(tmp_path, kind, rank=3)
    saved = exact.save_state("a").result()
    service = service_at(tmp_path, dtype="bfloat16")
    rounded = service.create_training_client_from_state(saved.path).result()
    assert rounded.get_info().dtype == "bfloat16"
    assert rounded.engine.fingerprint == exact.engine.fingerprint
    assert {tensor.dtype for tensor in flat(rounded).values()} == {torch.float32}
    batch = data((40, 70, 90))
    difference = (logprobs(rounded, batch) - logprobs(exact, batch)).abs()
    assert 0 < difference.mean() < 0.06 and difference.max() < 0.5
    for client in (exact, rounded):
        client.forward_backward(batch, "cross_entropy").result()
    assert_close(rounded.adapter.grad, exact.adapter.grad, 0.08)
    packed = rounded.adapter.grad.clone()
    rounded.adapter.clear_grad()
    for one in batch:
        rounded.forward_backward([one], "cross_entropy").result()
    assert_close(rounded.adapter.grad, packed, 0.03)
    for client in (exact, rounded):
        client.close()


def test_steps_smaller_than_bf16_can_hold_still_add_up(tmp_path: Path) -> None:
    client = service_at(tmp_path, dtype="bfloat16").create_lora_training_client(str(tiny_model_dir()), 4).result()
    before = factors(client)
    for _ in range(3):
        client.forward_backward(data(LENGTHS), "cross_entropy").result()
        client.optim_step(AdamParams(1e-7)).result()
    for name, (a, _) in factors(client).items():
        moved = (a - before[name][0]).abs()
        assert 0 < moved.max() < 1e-6
    client.close()
