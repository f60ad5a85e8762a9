"""Keys and values in pages, as on CUDA: the same samples and logprobs as with slabs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core import SamplingClient, TrainingClient
from core.paged import PAGE, PagedPool
from core.sampler import Sampler
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
