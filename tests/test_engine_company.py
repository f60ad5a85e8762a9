"""Tenants of one engine do not feel each other: each ends with the weights and moments it would have had alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from core import AdamParams, ModelInput, SamplingParams, TrainingClient
from core.futures import Future
from core.losses import LOSSES
from core.packing import bins
from tests.tiny import assert_close, data, flat, gradients, held, new_client, randomise, service_at, tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")
RANKS = (1, 3, 8, 64)
LENGTHS = (1, 2, 5, 15, 16, 17, 40, 90)
CONFIGS = {"ppo": {"clip_high_threshold": 1.5}, "cispo": {"clip_high_threshold": 2.0}, "dro": {"beta": 0.2}}


@dataclass(frozen=True)
class Step:
    """One forward_backward (twice the data when `twice`), a forward, an optimizer step."""

    loss_fn: str
    lengths: tuple[int, ...]
    seed: int
    logprobs: str
    twice: bool
    adam: AdamParams


@dataclass(frozen=True)
class Script:
    """What a tenant is and does."""

    rank: int
    seed: int
    train_mlp: bool
    train_unembed: bool
    steps: tuple[Step, ...]

    def client(self, store: Path, kind: str) -> TrainingClient:
        targets = {"train_mlp": self.train_mlp, "train_unembed": self.train_unembed}
        return new_client(store, kind, self.rank, self.seed, **targets)


def script(number: int, seed: int, num_steps: int = 3) -> Script:
    draw = random.Random(f"{seed} {number}")
    steps = tuple(
        Step(
            draw.choice(sorted(LOSSES)),
            tuple(draw.choices(LENGTHS, k=draw.randint(1, 4))),
            draw.randrange(1000),
            draw.choice(("all", "weighted")),
            draw.random() < 0.3,
            AdamParams(1e-3, eps=1e-6, weight_decay=draw.choice((0.0, 0.1)), grad_clip_norm=draw.choice((0.0, 0.5))),
        )
        for _ in range(num_steps)
    )
    return Script(RANKS[number % len(RANKS)], number, number % 3 != 1, number % 4 != 3, steps)


def submit(client: TrainingClient, steps: Sequence[Step], pause: Callable[[], None] = lambda: None) -> list[Future]:
    """Every step but the last one's update, so that a gradient remains to be compared."""
    futures: list[Future] = []
    for i, step in enumerate(steps):
        batch = data(step.lengths, step.seed, step.loss_fn)
        for _ in range(1 + step.twice):
            futures.append(client.forward_backward(batch, step.loss_fn, CONFIGS.get(step.loss_fn), step.logprobs))
            pause()
        futures.append(client.forward(batch, step.loss_fn))
        if i + 1 < len(steps):
            futures.append(client.optim_step(step.adam))
            pause()
    return futures


def observed(client: TrainingClient, futures: Sequence[Future]) -> tuple[dict[str, torch.Tensor], list]:
    results = [future.result(60) for future in futures]
    return flat(client), results


def assert_same(together, alone) -> None:
    for key, value in alone[0].items():
        assert_close(together[0][key], value)
    assert bool(alone[0]["grad"].any()) and bool(alone[0]["exp_avg"].any())
    for ours, theirs in zip(together[1], alone[1], strict=True):
        for key, value in theirs.metrics.items():
            assert ours.metrics[key] == pytest.approx(value, rel=2e-5, abs=2e-4)  # a sum of hundreds of terms of either sign
        for a, b in zip(getattr(ours, "loss_fn_outputs", []), getattr(theirs, "loss_fn_outputs", []), strict=True):
            torch.testing.assert_close(a["logprobs"], b["logprobs"], rtol=2e-5, atol=5e-5)


def alone(scripts: Sequence[Script], store: Path, kind: str) -> list:
    results = []
    for one in scripts:
        client = one.client(store, kind)
        results.append(observed(client, submit(client, one.steps)))
        client.close()
    return results


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("seed", [0, 1])
def test_tenants_of_other_ranks_losses_and_targets_in_the_same_micro_batches(kind: str, seed: int, tmp_path: Path) -> None:
    scripts = [script(number, seed) for number in range(8)]
    expected = alone(scripts, tmp_path, kind)
    clients = [one.client(tmp_path, kind) for one in scripts]
    with held(clients[0].engine):
        futures = [submit(client, one.steps) for client, one in zip(clients, scripts, strict=True)]
    for client, submitted, result in zip(clients, futures, expected, strict=True):
        assert_same(observed(client, submitted), result)
        client.close()


@pytest.mark.parametrize("token_budget", [16, 1024])
@pytest.mark.parametrize("seed", [2, 3])
def test_tenants_in_threads_at_random_moments(token_budget: int, seed: int, tmp_path: Path) -> None:
    scripts = [script(number, seed) for number in range(6)]
    expected = alone(scripts, tmp_path, "llama")
    clients = [one.client(tmp_path, "llama") for one in scripts]
    clients[0].engine.token_budget = token_budget
    results: list = [None] * len(scripts)

    def run(number: int) -> None:
        draw = random.Random(number)
        futures = submit(clients[number], scripts[number].steps, lambda: time.sleep(draw.choice((0, 0, 0.001, 0.003))))
        results[number] = observed(clients[number], futures)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(scripts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client, together, result in zip(clients, results, expected, strict=True):
        assert_same(together, result)
        client.close()


def test_adapters_that_share_a_segment_and_adapters_that_do_not(tmp_path: Path) -> None:
    """Short rows of several adapters are one product with the others' columns zeroed; both ways give the same."""
    clients = [new_client(tmp_path, rank=rank, seed=rank) for rank in RANKS]
    engine, expected = clients[0].engine, []
    for lengths, num_segments in (((3, 5), 1), ((200, 200, 200), 2)):
        for number, client in enumerate(clients):
            client.forward_backward(data(lengths, number), "cross_entropy").result()
        expected = [gradients(client) for client in clients]
        for client in clients:
            client.adapter.clear_grad()
        assert len(bins([(c.adapter, sum(lengths)) for c in clients], on_cpu=True)) == num_segments
        with held(engine):
            futures = [c.forward_backward(data(lengths, number), "cross_entropy") for number, c in enumerate(clients)]
        for client, future, before in zip(clients, futures, expected, strict=True):
            future.result(60)
            for name, (d_a, d_b) in gradients(client).items():
                assert_close(d_a, before[name][0])
                assert_close(d_b, before[name][1])
            client.adapter.clear_grad()
    for client in clients:
        client.close()


def test_a_tenant_that_has_diverged_does_not_reach_its_neighbours(tmp_path: Path) -> None:
    """0 * inf is NaN, also in the columns that a shared product has zeroed."""
    good, bad = new_client(tmp_path, rank=2, seed=1), new_client(tmp_path, rank=2, seed=2)
    good.forward_backward(data([5, 9]), "cross_entropy").result()
    expected = flat(good)["grad"]
    good.adapter.clear_grad()
    randomise(bad, 2, size=1e30)
    with held(good.engine):
        ours = good.forward_backward(data([5, 9]), "cross_entropy")
        theirs = bad.forward_backward(data([5, 9]), "cross_entropy")
    assert not torch.isfinite(theirs.result(60).loss_fn_outputs[0]["logprobs"]).all()
    assert all(torch.isfinite(o["logprobs"]).all() for o in ours.result(60).loss_fn_outputs)
    assert_close(flat(good)["grad"], expected)
    with pytest.raises(FloatingPointError):
        bad.optim_step(AdamParams()).result()
    good.optim_step(AdamParams()).result()
    for client in (good, bad):
        client.close()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_loads_meanwhile_changes_no_number(tmp_path: Path, dtype: str, default: torch.dtype) -> None:
    """transformers sets torch's default dtype while it builds a model, for all threads."""

    rows = data((20, 9, 33))
    given = {"target_tokens": rows[0].loss_fn_inputs["target_tokens"], "weights": [0.1] * 20}
    rows[0] = replace(rows[0], loss_fn_inputs=given)

    def run(store: Path) -> list:
        options = {"dtype": dtype, "device": "cpu"}
        clients = [service_at(store, **options).create_lora_training_client(str(tiny_model_dir()), rank=rank).result()
                   for rank in (2, 5)]  # fmt: skip
        found: list = []
        torch.set_default_dtype(default if store.name == "meanwhile" else torch.float32)
        try:
            for client in clients:
                found += client.forward_backward(rows, "cross_entropy").result().loss_fn_outputs
                found.append({"logprobs": client.adapter.grad.clone()})
                client.optim_step(AdamParams(1e-3, eps=1.0)).result()  # no sign of a gradient that is nearly 0 counts
            samplers = [client.save_weights_and_get_sampling_client().result() for client in clients]
            prompt, params = ModelInput.from_ints(list(range(5, 40))), SamplingParams(max_tokens=6, temperature=0.7, seed=1)
            for future in [sampler.sample(prompt, 2, params) for sampler in samplers]:
                replies = [torch.tensor(s.logprobs, dtype=torch.float32) for s in future.result().sequences]
                found += [{"logprobs": reply} for reply in replies if dtype == "float32"]  # bf16 may draw another token
        finally:
            torch.set_default_dtype(torch.float32)
            for client in clients:
                client.close()
        return [one["logprobs"] for one in found]

    most = 1e-4 if dtype == "float32" else 0.1  # of the largest; in bf16 two runs of the same differ too
    for before, meanwhile in zip(run(tmp_path / "before"), run(tmp_path / "meanwhile"), strict=True):
        assert meanwhile.dtype == before.dtype and meanwhile.shape == before.shape
        assert float((meanwhile - before).abs().max()) <= most * float(before.abs().max())


def test_one_tenants_weight_decay_and_step_do_not_touch_another(tmp_path: Path) -> None:
    mine, other = new_client(tmp_path, rank=3, seed=1), new_client(tmp_path, rank=3, seed=2)
    for client in (mine, other):
        client.forward_backward(data([9]), "cross_entropy").result()
    before = flat(other)
    mine.optim_step(AdamParams(1.0, weight_decay=0.5)).result()
    after = flat(other)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (other.adapter.step, mine.adapter.step) == (0, 1)
    for client in (mine, other):
        client.close()


def test_clip_norm_is_per_adapter(tmp_path: Path) -> None:
    clients = [new_client(tmp_path, rank=3, seed=seed) for seed in (1, 2)]
    with held(clients[0].engine):
        futures = [c.forward_backward(data([9 * (n + 1)], n), "cross_entropy") for n, c in enumerate(clients)]
    [future.result(60) for future in futures]
    norms = [float(flat(client)["grad"].norm()) for client in clients]
    results = [client.optim_step(AdamParams(grad_clip_norm=0.1)).result().metrics for client in clients]
    assert [result["grad_norm:mean"] for result in results] == pytest.approx(norms)
    for client in clients:  # the first moment is (1 - beta1) times the clipped gradient
        assert float(flat(client)["exp_avg"].norm()) == pytest.approx(0.1 * 0.1, rel=1e-5)
        client.close()


def test_a_request_that_fails_leaves_its_neighbour_in_the_pass_alone(tmp_path: Path) -> None:
    good, bad = new_client(tmp_path, rank=2, seed=1), new_client(tmp_path, rank=2, seed=2)

    def fails(data, logprobs):
        raise RuntimeError("my own mistake")

    with held(good.engine):
        ours = good.forward_backward(data([5]), "cross_entropy")
        theirs = bad.forward_backward_custom(data([5]), fails)
    with pytest.raises(RuntimeError, match="my own mistake"):
        theirs.result(60)
    assert ours.result(60).metrics["loss:sum"] > 0
    assert good.adapter.has_grad and not bad.adapter.has_grad
    for client in (good, bad):
        client.close()
