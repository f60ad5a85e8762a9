"""engine.exact: numbers do not depend on company, and the sampler's are the trainer's to the bit, in bf16 too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core import AdamParams, Datum, ModelInput, SamplingParams, TrainingClient
from core.exact import TILE
from core.exact_step import Row, exact_step
from core.kv_cache import Slabs, Slot
from core.packing import make_segment
from tests.test_sampler import TIMEOUT, ask, prompt
from tests.tiny import assert_close, data, datum, randomise, service_at, tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")


def exact_client(store: Path, kind: str, dtype: str, rank: int, seed: int) -> TrainingClient:
    service = service_at(store, dtype=dtype, exact=True)
    client = service.create_lora_training_client(str(tiny_model_dir(kind)), rank, seed).result(TIMEOUT)
    randomise(client, seed)
    return client


@pytest.fixture(params=[("llama", "bfloat16"), ("qwen3", "bfloat16"), ("llama-tied", "float32")], ids=str)
def clients(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[TrainingClient]]:
    made = [exact_client(tmp_path, *request.param, rank, seed) for rank, seed in ((4, 0), (4, 1), (8, 2))]
    yield made
    for client in made:
        client.close()


def trained_logprobs(client: TrainingClient, tokens: list[int], reply: list[int], company: list[Datum]) -> list[float]:
    """Of the reply, from a training pass with others in it."""
    weights = [0.0] * (len(tokens) - 1) + [1.0] * len(reply)
    every = tokens + reply
    mine = Datum(ModelInput.from_ints(every[:-1]), {"target_tokens": torch.tensor(every[1:]), "weights": torch.tensor(weights)})
    output = client.forward_backward([*company, mine], "cross_entropy", logprobs="weighted").result(TIMEOUT)
    client.adapter.clear_grad()
    return output.loss_fn_outputs[-1]["logprobs"][len(tokens) - 1 :].tolist()


def test_sampled_logprobs_are_the_trainers_to_the_bit(clients: list[TrainingClient]) -> None:
    samplers = [client.save_weights_and_get_sampling_client().result(TIMEOUT) for client in clients]
    asked = [(i, p, ask(samplers[i], p, 2, max_tokens=40)) for i in range(3) for p in map(prompt, (1, 31, 70), (i, 5, 6))]
    for i, tokens, future in asked:
        for sequence in future.result(TIMEOUT).sequences:
            assert sequence.logprobs == trained_logprobs(clients[i], tokens, sequence.tokens, data([50, 3, 90], i))
    for sampler in samplers:
        sampler.close()


def test_a_seed_fixes_a_sample_whatever_else_is_in_flight(clients: list[TrainingClient]) -> None:
    samplers = [client.save_weights_and_get_sampling_client().result(TIMEOUT) for client in clients]
    alone = ask(samplers[0], prompt(40), 2, max_tokens=30, seed=7).result(TIMEOUT)
    with samplers[0].together():
        others = [ask(samplers[i % 3], prompt(3 + 11 * i, i), 3, max_tokens=9 * i + 1, temperature=0.8) for i in range(8)]
        among = ask(samplers[0], prompt(40), 2, max_tokens=30, seed=7)
    found = among.result(TIMEOUT)
    assert [(s.tokens, s.logprobs) for s in found.sequences] == [(s.tokens, s.logprobs) for s in alone.sequences]
    for future in others:
        future.result(TIMEOUT)
    for sampler in samplers:
        sampler.close()


def test_logprobs_of_a_pass_do_not_depend_on_company(clients: list[TrainingClient]) -> None:
    one = datum(70, 3)
    alone = clients[0].forward([one], "cross_entropy").result(TIMEOUT)
    others = [clients[i].forward(data([200, 5, 33], i), "cross_entropy") for i in (1, 2)]
    among = clients[0].forward([*data([9, 120, 70], 4), one], "cross_entropy").result(TIMEOUT)
    assert torch.equal(alone.loss_fn_outputs[0]["logprobs"], among.loss_fn_outputs[-1]["logprobs"])
    for future in others:
        future.result(TIMEOUT)


def test_it_trains_as_without(tmp_path: Path) -> None:
    exact = exact_client(tmp_path, "qwen3", "float32", 4, 0)
    plain = service_at(tmp_path).create_lora_training_client(str(tiny_model_dir("qwen3")), 4, 0).result(TIMEOUT)
    randomise(plain, 0)
    assert exact.engine is not plain.engine
    for client in (exact, plain):
        client.forward_backward(data([40, 7, 100]), "cross_entropy")
        client.optim_step(AdamParams(1e-3)).result(TIMEOUT)
    assert torch.allclose(exact.adapter.params, plain.adapter.params, atol=2e-5)
    exact.close()
    plain.close()


def test_greedy_samples_and_more_sequences_than_a_step_takes(tmp_path: Path) -> None:
    client = exact_client(tmp_path, "llama", "bfloat16", 4, 0)
    sampler = client.save_weights_and_get_sampling_client().result(TIMEOUT)
    many = ask(sampler, prompt(9), TILE + 3, max_tokens=3).result(TIMEOUT).sequences
    assert len(many) == TILE + 3
    greedy = ask(sampler, prompt(9), max_tokens=3, temperature=0.0).result(TIMEOUT).sequences[0]
    for sequence in (many[0], many[-1], greedy):
        assert sequence.logprobs == trained_logprobs(client, prompt(9), sequence.tokens, [])
    sampler.close()
    client.close()


def test_uniform_numbers_are_not_rounded_to_fp32(tmp_path: Path) -> None:
    """Then a token would give way to the next one only halfway between two fp32 numbers."""
    client = exact_client(tmp_path, "llama", "float32", 4, 0)
    decoder = client.engine.decoder
    pool = Slabs(64, 1, len(decoder.layers), decoder.heads, decoder.dtype, decoder.device)
    weights = client.adapter.snapshot()
    segment = make_segment(0, 1, [weights], [(weights, 0, 1)], client.engine.copies, with_grad=False)

    @torch.no_grad()
    def drawn(uniform: float) -> int:
        return exact_step(decoder, [Row(Slot(pool, 0), 1, 0, SamplingParams(), uniform, None)], [segment])[0][0]

    low, high = 0.5, 1 - 2**-20
    first = drawn(low)
    assert drawn(high) != first
    while high - low > 2**-45:
        middle = (low + high) / 2
        low, high = (middle, high) if drawn(middle) == first else (low, middle)
    assert abs(high * 2**25 - round(high * 2**25)) > 2**-10
    client.close()


def test_several_targets_custom_losses_and_recomputation(tmp_path: Path) -> None:
    client = exact_client(tmp_path, "qwen3", "bfloat16", 4, 0)
    one = datum(33, 3)
    targets = one.loss_fn_inputs["target_tokens"]
    two = Datum(one.model_input, {"target_tokens": torch.stack([targets, targets.flip(0)], dim=1)})

    def minus_sum(_, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.cat([lp.flatten() for lp in logprobs]).sum(), {}

    def passed(recompute: bool) -> list[torch.Tensor]:
        client.engine.recompute = recompute
        output = client.forward_backward_custom([two], minus_sum).result(TIMEOUT)
        gradient = client.adapter.grad.clone()
        client.adapter.clear_grad()
        return [output.loss_fn_outputs[0]["logprobs"], gradient]

    plain = client.forward_backward([two], "cross_entropy").result(TIMEOUT).loss_fn_outputs[0]["logprobs"]
    gradient = client.adapter.grad.clone()
    client.adapter.clear_grad()
    for recompute in (False, True):
        logprobs, found = passed(recompute)
        assert torch.equal(logprobs, plain)
        assert_close(found, gradient, 1e-2)
    alone = client.forward([Datum(one.model_input, {"target_tokens": targets})], "cross_entropy").result(TIMEOUT)
    assert torch.equal(plain[:, 0], alone.loss_fn_outputs[0]["logprobs"])
    client.close()
