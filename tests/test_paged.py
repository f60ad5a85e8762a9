"""Keys and values in pages, as on CUDA: the same samples and logprobs as with slabs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core import SamplingClient, SamplingParams, TrainingClient
from core.attention import Heads
from core.captured import Step, Steps
from core.futures import Future
from core.paged import PAGE, PagedPool, Pages, page_table
from core.request import SampleRequest
from core.sampler import Sampler
from core.stacked import Stacks
from tests.test_sampler import TIMEOUT, ask, assert_alike, largest_difference, prompt
from tests.tiny import KINDS, new_client

pytestmark = pytest.mark.usefixtures("one_thread")


KINDS_OF_DRAW: list[dict] = [
    {}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}, {"top_k": 1},
    {"stop": [7, 90]},
]  # fmt: skip


def with_pages(trainer: TrainingClient, kv_tokens: int) -> None:
    """Before anything is sampled."""
    engine = trainer.engine
    engine.sampler = Sampler(engine.decoder, engine.copies, kv_tokens, paged=True)


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[TrainingClient, SamplingClient]]:
    trainer = new_client(tmp_path, request.param)
    with_pages(trainer, 64 * PAGE)
    sampler = trainer.save_weights_and_get_sampling_client().result(TIMEOUT)
    yield trainer, sampler
    sampler.close()
    trainer.close()


def test_sampled_logprobs_are_the_trainers(pair: tuple[TrainingClient, SamplingClient]) -> None:
    _, sampler = pair
    prompts = [prompt(n, n) for n in (1, 2, PAGE - 1, PAGE, PAGE + 1, 300)]
    with sampler.together():
        asked = [(p, ask(sampler, p, 2, max_tokens=PAGE + 9)) for p in prompts]
    assert max(largest_difference(sampler, p, f.result(TIMEOUT)) for p, f in asked) < 1e-4
    assert all(isinstance(pool, PagedPool) for pool in sampler.engine.sampler.cache.pools.values())


def test_cached_prefixes_change_no_logprob(pair: tuple[TrainingClient, SamplingClient]) -> None:
    """A second turn continues the first one's pages, a branch copies them, a longer capacity moves them."""
    _, sampler = pair
    first = prompt(40)
    reply = ask(sampler, first, max_tokens=30).result(TIMEOUT).sequences[0].tokens
    for later in (first + reply + prompt(20, 1), first + reply[:10] + prompt(5, 2), first, first[:20], first + reply):
        assert largest_difference(sampler, later, ask(sampler, later, 2, max_tokens=70).result(TIMEOUT)) < 1e-4


def test_slabs_and_pages_sample_the_same(tmp_path: Path) -> None:
    found = []
    for paged in (False, True):
        trainer = new_client(tmp_path)
        if paged:
            with_pages(trainer, 64 * PAGE)
        sampler = trainer.save_weights_and_get_sampling_client().result(TIMEOUT)
        with sampler.together():
            futures = [
                ask(sampler, prompt(5 + 9 * i, i), 3, max_tokens=4 + 11 * i, seed=i, **params)
                for i, params in enumerate(KINDS_OF_DRAW)
            ]
        found.append([future.result(TIMEOUT) for future in futures])
        sampler.close()
        trainer.close()
    for one, other in zip(*found, strict=True):
        assert_alike(one, other)


def test_pages_come_back_when_another_capacity_needs_them(tmp_path: Path) -> None:
    trainer = new_client(tmp_path)
    with_pages(trainer, 4 * PAGE)
    sampler = trainer.save_weights_and_get_sampling_client().result(TIMEOUT)
    memory = trainer.engine.sampler.pages
    assert memory is not None
    for length in (10, 100, 10):
        futures = [ask(sampler, prompt(length, i), max_tokens=100 if length == 100 else 10) for i in range(6)]
        for i, future in enumerate(futures):
            assert largest_difference(sampler, prompt(length, i), future.result(TIMEOUT)) < 1e-4
    taken = [page for pool in trainer.engine.sampler.cache.pools.values() for pages in pool.pages for page in pages]
    assert sorted(taken + memory.free) == [1, 2, 3, 4]
    sampler.close()
    trainer.close()


def test_a_table_is_as_wide_as_the_context_though_slots_are_larger() -> None:
    """A context of 40,960 tokens is given a slot of 65,536."""
    pool = Pages(1, Heads(1, 1, 8), torch.float32, torch.device("cpu"), 5 * PAGE).new_pool(4 * PAGE, 1)
    pool.grow(1)
    assert page_table(pool.slots, 3).tolist() == [[1, 2, 3]]
    assert page_table(pool.slots, 5).tolist() == [[1, 2, 3, 4, 0]]


def test_nothing_that_is_not_finite_stays_in_the_pages(tmp_path: Path) -> None:
    """Each sequence of a diverged request has written some; under weights of 0 it would spoil whoever comes next."""
    trainer = new_client(tmp_path)
    with_pages(trainer, 64 * PAGE)
    trainer.adapter.params.fill_(1e15)  # finite, but not its products
    trainer.adapter.version += 1
    sampler = trainer.save_weights_and_get_sampling_client().result(TIMEOUT)
    with pytest.raises(FloatingPointError):
        ask(sampler, prompt(1), 4).result(TIMEOUT)
    sampler.close()
    trainer.close()  # the engine's thread ends with its last client
    trainer.engine._thread.join(TIMEOUT)
    memory = trainer.engine.sampler.pages
    assert memory is not None and memory.k.numel() > 0
    assert bool(torch.isfinite(memory.k).all()) and bool(torch.isfinite(memory.v).all())


def test_only_steps_whose_adapters_can_come_back_are_kept(tmp_path: Path) -> None:
    """Each holds the tensors of its stacks."""
    trainers = [new_client(tmp_path, rank=rank) for rank in range(1, 8)]
    engine = trainers[0].engine
    memory = Pages(1, engine.decoder.heads, torch.float32, engine.device, PAGE)
    steps, stacks = Steps(engine.decoder, memory, capture=False), Stacks(engine.copies, stay=True)
    for trainer in trainers:
        (rows,) = stacks.rows_of([(trainer.adapter.snapshot(), 1)], engine.device)
        steps._made[(id(rows.stack),)] = Step(engine.decoder, memory, 1, 2, [rows.stack])
        steps.forget_others(stacks.kept)
    assert [step.stacks[0].rank for step in steps._made.values()] == [3, 4, 5, 6, 7]
    for trainer in trainers:
        trainer.close()


class CancelledAt(Future):
    """Cancelled when it is asked for the n-th time."""

    def __init__(self, look: int) -> None:
        super().__init__()
        self.left = look

    def done(self) -> bool:
        self.left -= 1
        return self.left <= 0 or super().done()


@pytest.mark.parametrize("paged", [False, True])
def test_a_request_cancelled_at_any_moment_gives_its_slot_back(paged: bool, tmp_path: Path) -> None:
    trainer = new_client(tmp_path)
    engine = trainer.engine
    weights, params = trainer.adapter.snapshot(), SamplingParams(9, seed=0)
    for look in range(1, 20):
        sampler = Sampler(engine.decoder, engine.copies, 64 * PAGE, paged=paged)
        for future in (CancelledAt(look), Future()):
            sampler.submit(SampleRequest(prompt(5), 1, params, 9, weights, lambda tokens: False, future))
        while sampler.busy:
            sampler.step()
        assert not any(slot.busy for slot in sampler.cache.slots())
        assert all(pool.num_busy == 0 for pool in sampler.cache.pools.values())
    trainer.close()


def test_a_failure_lets_go_of_the_adapters(tmp_path: Path) -> None:
    trainer = new_client(tmp_path)
    engine = trainer.engine
    sampler = Sampler(engine.decoder, engine.copies, 64 * PAGE, paged=True)
    weights, future = trainer.adapter.snapshot(), Future()
    params = SamplingParams(20, seed=0)
    sampler.submit(SampleRequest(prompt(5), 1, params, 20, weights, lambda tokens: False, future))
    for _ in range(3):
        sampler.step()
    kept = weakref.ref(weights)
    del weights
    sampler.fail_all(RuntimeError("the device is gone"))
    assert kept() is None
    with pytest.raises(RuntimeError, match="the device is gone"):
        future.result(0)
    trainer.close()
