"""Sampling: parity with the trainer, independence of company, snapshots, ends, room, cancellation."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core import AdamParams, ModelInput, SamplingClient, SamplingParams, TrainingClient
from tests.tiny import CONTEXT, KINDS, VOCAB, data, new_client, service_at, tiny_model_dir, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TIMEOUT = 20


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(client: SamplingClient, tokens: list[int], num_samples: int = 1, **params):
    return client.sample(ModelInput.from_ints(tokens), num_samples, SamplingParams(**{"max_tokens": 12, "seed": 0, **params}))


def largest_difference(client: SamplingClient, tokens: list[int], response) -> float:
    """Between the sampler's logprobs and the trainer's for the same tokens."""
    worst = 0.0
    for sequence in response.sequences:
        scored = client.compute_logprobs(ModelInput.from_ints(tokens + sequence.tokens)).result(TIMEOUT)
        assert len(sequence.logprobs) == len(sequence.tokens)
        worst = max(worst, *(abs(a - b) for a, b in zip(scored[len(tokens) :], sequence.logprobs, strict=True)))
    return worst


def assert_alike(one, other) -> None:
    for a, b in zip(one.sequences, other.sequences, strict=True):
        assert (a.tokens, a.stop_reason) == (b.tokens, b.stop_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[TrainingClient]:
    client = new_client(tmp_path)
    yield client
    client.close()


@pytest.fixture
def sampler(trainer: TrainingClient) -> Iterator[SamplingClient]:
    client = trainer.save_weights_and_get_sampling_client().result(TIMEOUT)
    yield client
    client.close()


# ---- the same numbers as the trainer


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_logprobs_are_the_trainers(kind: str, tmp_path: Path) -> None:
    clients = [new_client(tmp_path, kind, rank=rank, seed=rank) for rank in (1, 4, 4, 8)]
    samplers = [c.save_weights_and_get_sampling_client().result(TIMEOUT) for c in clients]
    samplers.append(service_at(tmp_path).create_sampling_client(base_model=str(tiny_model_dir(kind))).result(TIMEOUT))
    prompts = [prompt(n, n) for n in (1, 2, 17, 70, 300)]
    asked = [(s, p, ask(s, p, 2, max_tokens=30)) for s in samplers for p in prompts]
    assert max(largest_difference(s, p, f.result(TIMEOUT)) for s, p, f in asked) < 1e-4
    for client in (*samplers, *clients):
        client.close()


def test_an_adapter_without_some_of_its_sites_is_sampled_as_it_is_trained(tmp_path: Path) -> None:
    clients = [
        new_client(tmp_path, rank=3, train_mlp=False),
        new_client(tmp_path, rank=3, train_unembed=False, train_attn=False),
    ]
    samplers = [c.save_weights_and_get_sampling_client().result(TIMEOUT) for c in clients]
    asked = [(s, ask(s, prompt(9))) for s in samplers]
    assert max(largest_difference(s, prompt(9), f.result(TIMEOUT)) for s, f in asked) < 1e-4
    for client in (*samplers, *clients):
        client.close()


def test_many_wide_adapters_and_sequences_that_move_between_slots_are_sampled_as_they_are_trained(tmp_path: Path) -> None:
    from core.stacked import CONCAT_RANK

    clients = [new_client(tmp_path, rank=CONCAT_RANK // 4, seed=i) for i in range(5)]
    samplers = [client.save_weights_and_get_sampling_client().result(TIMEOUT) for client in clients]
    with samplers[0].together():  # lengths so that early slots fall idle, and of two capacities
        futures = [ask(s, prompt(5 + i, i), 2, max_tokens=4 + 5 * i) for i in range(15) for s in [samplers[i % 5]]]
    for i, future in enumerate(futures):
        assert largest_difference(samplers[i % 5], prompt(5 + i, i), future.result(TIMEOUT)) < 1e-4
    for client in (*samplers, *clients):
        client.close()


def test_cached_prefixes_change_no_logprob(sampler: SamplingClient) -> None:
    """A second turn continues the first one's slot; a branch copies it; a repeat finds it whole."""
    first = prompt(40)
    reply = ask(sampler, first, max_tokens=30).result(TIMEOUT).sequences[0].tokens
    for later in (first + reply + prompt(20, 1), first + reply[:10] + prompt(5, 2), first, first[:20], first + reply):
        assert largest_difference(sampler, later, ask(sampler, later, 2).result(TIMEOUT)) < 1e-4


def test_greedy_sampling_is_transformers_generate(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    client = service_at(tmp_path).create_sampling_client(base_model=str(tiny_model_dir())).result(TIMEOUT)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32)
    tokens = prompt(25)
    theirs = model.generate(
        torch.tensor([tokens]), attention_mask=torch.ones(1, 25, dtype=torch.long), max_new_tokens=20, do_sample=False,
        eos_token_id=-1,
    )  # fmt: skip
    ours = ask(client, tokens, max_tokens=20, temperature=0.0).result(TIMEOUT).sequences[0].tokens
    assert ours == theirs[0, 25:].tolist()
    client.close()


def test_prompt_logprobs_and_the_likeliest_tokens(sampler: SamplingClient) -> None:
    tokens = prompt(15)
    scored = sampler.compute_logprobs(ModelInput.from_ints(tokens)).result(TIMEOUT)
    params = SamplingParams(max_tokens=1)
    response = sampler.sample(ModelInput.from_ints(tokens), 1, params, True, topk_prompt_logprobs=VOCAB).result(TIMEOUT)
    assert response.prompt_logprobs[0] is None and response.topk_prompt_logprobs[0] is None
    assert response.prompt_logprobs[1:] == pytest.approx(scored[1:], abs=1e-5)
    for token, logprob, likeliest in zip(tokens[1:], scored[1:], response.topk_prompt_logprobs[1:], strict=True):
        assert dict(likeliest)[token] == pytest.approx(logprob, abs=1e-4)
        assert [value for _, value in likeliest] == sorted((value for _, value in likeliest), reverse=True)


# ---- the right distribution


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.5}])
def test_tokens_come_as_often_as_their_probability(sampler: SamplingClient, params: dict) -> None:
    n, tokens = 3000, prompt(6)
    response = ask(sampler, tokens, n, max_tokens=1, **params).result(TIMEOUT)
    likeliest = sampler.sample(
        ModelInput.from_ints([*tokens, 0]), 1, SamplingParams(max_tokens=1), topk_prompt_logprobs=VOCAB
    ).result(TIMEOUT).topk_prompt_logprobs[-1]  # fmt: skip
    tempered = torch.tensor([value for _, value in likeliest]).double() / params.get("temperature", 1.0)
    expected = torch.softmax(tempered, 0)
    whole = expected.clone()
    expected[params.get("top_k", VOCAB) :] = 0
    expected = expected / expected.sum()
    expected[(expected.cumsum(0) - expected) >= params.get("top_p", 1.0)] = 0
    expected = expected / expected.sum()
    counts = Counter(sequence.tokens[0] for sequence in response.sequences)
    for (token, _), p, untouched in zip(likeliest, expected.tolist(), whole.tolist(), strict=True):
        assert abs(counts[token] - n * p) <= 4.5 * (n * p * (1 - p)) ** 0.5 + 1e-9 + (p > 0)
        for sequence in response.sequences[:200]:
            if sequence.tokens[0] == token:  # not renormalised over what top_k and top_p leave
                assert sequence.logprobs[0] == pytest.approx(torch.tensor(untouched).log().item(), abs=1e-4)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 2e-214])
def test_the_coldest_temperatures_are_none(sampler: SamplingClient, temperature: float) -> None:
    found = ask(sampler, prompt(6), temperature=temperature).result(TIMEOUT)
    assert_alike(found, ask(sampler, prompt(6), temperature=0.0).result(TIMEOUT))


def test_a_seed_fixes_samples_whatever_else_is_in_flight(tmp_path: Path) -> None:
    clients = [new_client(tmp_path, rank=r, seed=r) for r in (2, 5)]
    samplers = [c.save_weights_and_get_sampling_client().result(TIMEOUT) for c in clients]
    alone = ask(samplers[0], prompt(20), 3, seed=7).result(TIMEOUT)
    noise = [ask(samplers[i % 2], prompt(3 + i, i), 2, seed=None, max_tokens=5 + i) for i in range(10)]
    again = ask(samplers[0], prompt(20), 3, seed=7)
    noise += [ask(samplers[1], prompt(20), 2, seed=i) for i in range(4)]
    assert_alike(alone, again.result(TIMEOUT))
    assert len({tuple(s.tokens) for s in alone.sequences}) == 3  # each sample has a seed of its own
    for future in noise:
        future.result(TIMEOUT)
    for client in (*samplers, *clients):
        client.close()


# ---- ends


def test_stop_tokens_and_strings_end_a_sample_and_are_part_of_it(sampler: SamplingClient) -> None:
    free = ask(sampler, prompt(5), max_tokens=60).result(TIMEOUT).sequences[0].tokens
    stop = next(t for t in free[5:] if t < 256 and free.index(t) > 3)
    at = free.index(stop)
    by_id = ask(sampler, prompt(5), max_tokens=60, stop=[stop]).result(TIMEOUT).sequences[0]
    assert (by_id.tokens, by_id.stop_reason) == (free[: at + 1], "stop")
    assert ask(sampler, prompt(5), max_tokens=at).result(TIMEOUT).sequences[0].stop_reason == "length"


def test_a_stop_string_may_lie_across_tokens(sampler: SamplingClient) -> None:
    tokenizer = tiny_tokenizer()
    for seed in range(30):
        free = ask(sampler, prompt(5), max_tokens=40, seed=seed).result(TIMEOUT).sequences[0].tokens
        text = tokenizer.decode(free[10:13])
        if "\ufffd" not in text and len(text) == 3 and text not in tokenizer.decode(free[:12]):
            break
    else:
        pytest.fail("no sample with three plain bytes")
    found = ask(sampler, prompt(5), max_tokens=40, seed=seed, stop=[text]).result(TIMEOUT).sequences[0]
    assert (found.tokens, found.stop_reason) == (free[:13], "stop")
    alone = ask(sampler, prompt(5), max_tokens=40, seed=seed, stop="no such text \u2603").result(TIMEOUT).sequences[0]
    assert (alone.tokens, alone.stop_reason) == (free, "length")


def test_what_the_prompt_ends_with_is_no_stop(sampler: SamplingClient) -> None:
    tokens = tiny_tokenizer().encode("abc")
    assert len(ask(sampler, tokens, stop="abc", max_tokens=9).result(TIMEOUT).sequences[0].tokens) == 9


# ---- snapshots


def test_a_snapshot_does_not_change_when_training_goes_on(trainer: TrainingClient) -> None:
    before = trainer.save_weights_and_get_sampling_client().result(TIMEOUT)
    first = ask(before, prompt(9), 4).result(TIMEOUT)
    for _ in range(3):
        trainer.forward_backward(data([20, 30]), "cross_entropy")
        trainer.optim_step(AdamParams(learning_rate=0.05))
    after = trainer.save_weights_and_get_sampling_client().result(TIMEOUT)
    assert_alike(ask(before, prompt(9), 4).result(TIMEOUT), first)
    moved = ask(after, prompt(9), 4).result(TIMEOUT)
    assert moved.sequences[0].logprobs != first.sequences[0].logprobs
    assert largest_difference(after, prompt(9), moved) < 1e-4
    before.close()
    after.close()


def test_a_snapshot_is_not_a_copy_and_its_buffer_is_used_again(trainer: TrainingClient) -> None:
    def step() -> None:
        trainer.forward_backward(data([9]), "cross_entropy")
        trainer.optim_step(AdamParams(learning_rate=0.01)).result(TIMEOUT)

    buffers = set()
    for _ in range(6):
        step()
        client = trainer.save_weights_and_get_sampling_client().result(TIMEOUT)
        assert client.weights.params is trainer.adapter.params
        buffers.add(trainer.adapter.params.data_ptr())
        client.close()
        del client
    assert len(buffers) <= 3


def test_weights_saved_for_the_sampler_are_sampled_alike(trainer: TrainingClient, tmp_path: Path) -> None:
    now = trainer.save_weights_and_get_sampling_client().result(TIMEOUT)
    saved = trainer.save_weights_for_sampler("w").result(TIMEOUT)
    assert not (Path(saved.directory) / "optimizer.safetensors").exists()
    loaded = service_at(tmp_path).create_sampling_client(saved.path).result(TIMEOUT)
    assert_alike(ask(loaded, prompt(9), 2).result(TIMEOUT), ask(now, prompt(9), 2).result(TIMEOUT))
    now.close()
    loaded.close()


# ---- room, company, cancellation


def test_more_than_there_is_room_for_waits(tmp_path: Path) -> None:
    service = service_at(tmp_path, kv_tokens=256)  # four slots of 64
    client = service.create_sampling_client(base_model=str(tiny_model_dir("qwen2"))).result(TIMEOUT)
    cache = client.engine.sampler.cache
    assert cache.max_tokens == 256
    futures = [ask(client, prompt(3 + i % 50, i), 2, max_tokens=10) for i in range(20)]
    futures.append(ask(client, prompt(100), max_tokens=100))  # takes all of it, in another pool
    futures += [ask(client, prompt(3 + i % 50, i), 2, max_tokens=10) for i in range(5)]
    for i, future in enumerate(futures[:20]):
        assert largest_difference(client, prompt(3 + i % 50, i), future.result(TIMEOUT)) < 1e-4
    assert [len(s.tokens) for f in futures[20:] for s in f.result(TIMEOUT).sequences] == [100] + [10] * 10
    assert cache.room >= 0
    client.close()


def test_a_long_prompt_is_computed_in_parts(sampler: SamplingClient) -> None:
    from core import sampler as module

    assert module.PREFILL_ROWS["cpu"] >= 1024 > CONTEXT - 24
    many = [prompt(CONTEXT - 24, i) for i in range(3)]  # together more than one pass takes
    futures = [ask(sampler, tokens, max_tokens=3) for tokens in many]
    for tokens, future in zip(many, futures, strict=True):
        assert largest_difference(sampler, tokens, future.result(TIMEOUT)) < 1e-4


def wait_until_idle(client: SamplingClient) -> None:
    deadline = time.monotonic() + TIMEOUT
    while client.engine.sampler.busy:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_cancelled_request_gives_its_slots_back(sampler: SamplingClient) -> None:
    future = ask(sampler, prompt(5), 4, max_tokens=900)
    assert future.cancel()
    ask(sampler, prompt(6), max_tokens=3).result(TIMEOUT)
    wait_until_idle(sampler)
    assert not any(slot.busy for slot in sampler.engine.sampler.cache.slots())

    async def impatient() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ask(sampler, prompt(7), 4, max_tokens=1000), 0.02)

    started = time.monotonic()
    asyncio.run(impatient())
    wait_until_idle(sampler)
    assert time.monotonic() - started < 2  # 4,000 tokens would take longer


def test_sampling_begins_while_a_long_training_step_runs(trainer: TrainingClient, sampler: SamplingClient) -> None:
    trainer.engine.token_budget = 64
    long_step = trainer.forward_backward(data([60] * 200), "cross_entropy")
    sampled = ask(sampler, prompt(5), max_tokens=3)
    sampled.result(TIMEOUT)
    assert not long_step.done()
    long_step.result(TIMEOUT)


def test_sampling_beside_training_leaves_the_gradient_alone(trainer: TrainingClient, sampler: SamplingClient) -> None:
    trainer.engine.token_budget = 64
    trainer.forward_backward(data([30] * 20), "cross_entropy").result(TIMEOUT)
    alone = trainer.adapter.grad.clone()
    trainer.adapter.clear_grad()
    futures = [ask(sampler, prompt(5, i), 2, max_tokens=50) for i in range(8)]
    trainer.forward_backward(data([30] * 20), "cross_entropy").result(TIMEOUT)
    assert torch.equal(trainer.adapter.grad, alone)
    for future in futures:
        future.result(TIMEOUT)


def test_many_threads_may_sample_at_once(sampler: SamplingClient) -> None:
    expected = [ask(sampler, prompt(4 + i, i)).result(TIMEOUT) for i in range(8)]
    found = [None] * 8

    def work(i: int) -> None:
        found[i] = ask(sampler, prompt(4 + i, i)).result(TIMEOUT)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[s.tokens for s in f.sequences] for f in found] == [[s.tokens for s in e.sequences] for e in expected]


def test_a_diverged_adapter_fails_alone(tmp_path: Path) -> None:
    good, bad = new_client(tmp_path, seed=1), new_client(tmp_path, seed=2)
    bad.adapter.params.fill_(float("nan"))
    samplers = [c.save_weights_and_get_sampling_client().result(TIMEOUT) for c in (good, bad)]
    expected = ask(samplers[0], prompt(9), 2).result(TIMEOUT)
    futures = [ask(s, prompt(9), 2) for s in samplers]
    with pytest.raises(FloatingPointError, match=r"^the model's logits are not finite: the adapter has diverged$"):
        futures[1].result(TIMEOUT)
    assert [s.tokens for s in futures[0].result(TIMEOUT).sequences] == [s.tokens for s in expected.sequences]
    assert largest_difference(samplers[0], prompt(12), ask(samplers[0], prompt(12)).result(TIMEOUT)) < 1e-4
    for client in (*samplers, good, bad):
        client.close()


# ---- bad requests


@pytest.mark.parametrize(
    ("length", "params", "message"),
    [
        (0, {}, "the prompt is empty, expected at least one token"),
        (CONTEXT + 1, {}, f"the prompt has {CONTEXT + 1} tokens, the model's context is {CONTEXT}"),
        (
            CONTEXT - 5, {"max_tokens": 6},
            f"a prompt of {CONTEXT - 5} tokens and max_tokens=6 make {CONTEXT + 1}, the model's context is {CONTEXT}",
        ),
        (5, {"max_tokens": 0}, f"max_tokens=0 with a prompt of 5 tokens and a context of {CONTEXT}: expected at least 1"),
        (5, {"temperature": -1.0}, "temperature is -1.0, expected 0 or more"),
        (5, {"top_p": 0.0}, "top_p is 0.0, expected more than 0 and at most 1"),
        (5, {"top_k": 0}, "top_k is 0, expected -1 (all) or at least 1"),
        (5, {"stop": [""]}, "stop is [''], expected a string, strings or token ids (none empty)"),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_in_one_line(sampler: SamplingClient, length: int, params: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ask(sampler, prompt(length), **params)
    assert str(caught.value) == message


def test_tokens_outside_the_vocabulary_are_refused(sampler: SamplingClient) -> None:
    with pytest.raises(ValueError, match=rf"^the prompt has token {VOCAB}, outside the vocabulary of {VOCAB}$"):
        ask(sampler, [1, VOCAB])


def test_a_request_that_could_never_fit_is_refused(tmp_path: Path) -> None:
    service = service_at(tmp_path, kv_tokens=128)
    client = service.create_sampling_client(base_model=str(tiny_model_dir("qwen2"))).result(TIMEOUT)
    with pytest.raises(ValueError, match=r"^a prompt of 100 tokens and max_tokens=50 take 256 tokens of key-value room, eng"):
        ask(client, prompt(100), max_tokens=50)
    client.close()
