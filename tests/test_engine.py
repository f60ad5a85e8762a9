"""The verbs of a training client: what moves, what does not, in which order, and what travels back."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from core import AdamParams, EngineOptions, ModelNotFound, ServiceClient, TrainingClient, clients
from core.engine import Call
from core.futures import Future
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
        with pytest.raises(ValueError, match="^optim_step without a gradient: call forward_backward first$"):
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
    with pytest.raises(FloatingPointError, match=r"^the gradient of optimizer step 1 is not finite \(norm (nan|inf)\); weights unmoved$"):
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
    with pytest.raises(ValueError, match="^rank is 0, expected at least 1$"):
        new_client(tmp_path, rank=0)
    assert not clients._engines


def test_info_says_what_a_recipe_may_want_to_know(tmp_path: Path) -> None:
    client = new_client(tmp_path, "qwen3")
    info = client.get_info()
    assert (info.base_model, info.model_type, info.hidden_size) == (str(tiny_model_dir("qwen3")), "qwen3", 32)
    assert (info.vocab_size, info.max_length, info.dtype, info.device, info.token_budget) == (VOCAB, CONTEXT, "float32", "cpu", 1024)
    assert info.num_parameters == sum(p.numel() for p in client.engine.decoder.model.parameters()) > 30_000
    client.close()


# ---- bfloat16


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_bfloat16_is_near_float32(kind: str, tmp_path: Path) -> None:
    """The same weights rounded to bf16 move a token's logprob by 0.03 nats in the mean; adapters stay fp32."""
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
    assert_close(rounded.adapter.grad, exact.adapter.grad, 0.05)
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


# ---- order, futures, the engine's life


def test_a_clients_operations_run_in_the_order_of_submission(tmp_path: Path) -> None:
    ahead, waiting = new_client(tmp_path), new_client(tmp_path)
    futures = []
    for number in range(5):
        futures += [ahead.forward_backward(data(LENGTHS, number), "cross_entropy"), ahead.optim_step(AdamParams(1e-2))]
        futures.append(ahead.forward(data(LENGTHS), "cross_entropy"))
        waiting.forward_backward(data(LENGTHS, number), "cross_entropy").result()
        waiting.optim_step(AdamParams(1e-2)).result()
        expected = waiting.forward(data(LENGTHS), "cross_entropy").result()
    assert futures[-1].result().metrics == expected.metrics
    assert torch.equal(flat(ahead)["params"], flat(waiting)["params"])
    for client in (ahead, waiting):
        client.close()


def test_the_same_requests_give_the_same_bits(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        client = new_client(tmp_path, rank=3)
        for number in range(3):
            client.forward_backward(data((40, 90, 7), number), "cross_entropy", logprobs="weighted")
            client.optim_step(AdamParams(1e-2)).result()
        results.append(flat(client)["params"])
        client.close()
    assert torch.equal(*results)


def test_every_verb_can_be_awaited(tmp_path: Path) -> None:
    async def steps() -> list[float]:
        client = await service_at(tmp_path).create_lora_training_client(str(tiny_model_dir()), 4)
        losses = []
        for _ in range(2):
            gradient = client.forward_backward(data(LENGTHS), "cross_entropy")
            update = client.optim_step(AdamParams(1e-2))
            output, _ = await asyncio.gather(gradient, update)
            losses.append(output.metrics["loss:sum"])
        with pytest.raises(ValueError, match="without a gradient"):
            await client.optim_step(AdamParams())
        assert (await client.save_state("a")).path.endswith("/weights/a")
        client.close()
        return losses

    first, second = asyncio.run(steps())
    assert second < first


def test_who_stops_waiting_cancels_nothing(tmp_path: Path) -> None:
    """An await that is cancelled, or a result() that times out, leaves the operation, the engine and its tenants as they are."""
    client, other = new_client(tmp_path, seed=1), new_client(tmp_path, seed=2)
    gate = threading.Event()
    client.engine.submit(client.tenant, Call(gate.wait, Future()))
    futures = [client.forward_backward(data(LENGTHS), "cross_entropy"), client.optim_step(AdamParams())]
    theirs = other.forward_backward(data(LENGTHS), "cross_entropy")

    async def impatient() -> None:
        for future in futures:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(future, 0.01)

    asyncio.run(impatient())
    with pytest.raises(TimeoutError):
        futures[0].result(0.01)
    gate.set()
    assert futures[1].result(60).metrics["grad_norm:mean"] > 0
    assert theirs.result(60).metrics["loss:sum"] > 0
    assert client.adapter.step == 1 and other.adapter.has_grad
    for one in (client, other):
        one.close()


def test_a_completed_future_is_done() -> None:
    future = Future.completed(3)
    assert future.done() and future.result() == 3

    async def awaited() -> int:
        return await future

    assert asyncio.run(awaited()) == 3


def test_the_last_client_frees_the_base_model(tmp_path: Path) -> None:
    first, second = new_client(tmp_path), new_client(tmp_path)
    other = new_client(tmp_path, "qwen2")
    engine = first.engine
    assert first.engine is second.engine and other.engine is not engine
    model = weakref.ref(engine.decoder.model)
    first.close()
    assert second.forward(data(LENGTHS), "cross_entropy").result().metrics["loss:sum"] > 0
    second.close()
    second.close()  # twice is once
    assert [engine for engine, _ in clients._engines.values()] == [other.engine]
    engine._thread.join(10)
    assert not engine._thread.is_alive()
    del engine, first, second
    gc.collect()
    assert model() is None
    other.close()
    assert not clients._engines


def test_a_client_that_nobody_holds_leaves_by_itself_once_its_work_is_done(tmp_path: Path) -> None:
    futures = [new_client(tmp_path).forward(data(LENGTHS), "cross_entropy") for _ in range(3)]
    assert all(future.result(60).metrics["loss:sum"] > 0 for future in futures)
    gc.collect()
    assert not clients._engines


def test_closing_one_idle_client_does_not_close_another(tmp_path: Path) -> None:
    made = [new_client(tmp_path, seed=seed) for seed in range(3)]
    made[2].close()
    for client in made[:2]:
        assert client.forward(data(LENGTHS), "cross_entropy").result(60).metrics["loss:sum"] > 0
    for client in made[:2]:
        client.close()


def test_a_closed_client_says_so_and_its_adapter_is_freed(tmp_path: Path) -> None:
    client, other = new_client(tmp_path), new_client(tmp_path)
    client.forward(data(LENGTHS), "cross_entropy").result()
    client.close()
    with pytest.raises(RuntimeError, match="^this training client is closed$"):
        client.forward(data(LENGTHS), "cross_entropy")
    adapter = weakref.ref(client.adapter)
    del client
    other.forward(data(LENGTHS), "cross_entropy").result()  # the engine has passed the other's leaving
    deadline = time.monotonic() + 5
    while adapter() is not None and time.monotonic() < deadline:
        gc.collect()
    assert adapter() is None
    other.close()


def test_a_process_may_end_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    """A thread inside torch at interpreter exit would abort it."""
    program = f"""
from tests.tiny import *
torch.set_num_threads(1)
client = service_at({str(tmp_path)!r}).create_lora_training_client({str(tiny_model_dir())!r}).result()
futures = [client.forward_backward(data([900] * 6), "cross_entropy") for _ in range(20)]
futures[0].result()
"""
    root = Path(__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


# ---- what cannot be had


def test_engine_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^engine.dtype=float16, expected auto, bfloat16 or float32$"):
        EngineOptions("float16", "cpu").resolve()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="^engine.device=cuda, but this torch sees no CUDA device: use engine.device=cpu$"):
            EngineOptions("auto", "cuda").resolve()
        assert EngineOptions().resolve()[1].type == "cpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instruct-q4_0", "unknown model 'smollm2-135m-instruct-q4_0': give a hub id (organisation/name), a directory"
         " or a .gguf file; did you mean 'smollm2-135m-instruct-q4_1'?"),
        ("/no/such/place", "no model directory at /no/such/place"),
        ("/no/such/model.gguf", "no GGUF file at /no/such/model.gguf"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_here_is_refused_in_one_line(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as error:
        ServiceClient(tmp_path).create_lora_training_client(name).result()
    assert str(error.value) == message
    assert not clients._engines


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=f"^{tmp_path} holds no config.json: not a model directory$"):
        service_at(tmp_path).create_lora_training_client(str(tmp_path)).result()
    (tmp_path / "config.json").write_text((tiny_model_dir() / "config.json").read_text())
    with pytest.raises(ModelNotFound, match=f"^model '{tmp_path}' at {tmp_path} cannot be loaded: ") as error:
        service_at(tmp_path).create_lora_training_client(str(tmp_path)).result()
    assert "\n" not in str(error.value)
