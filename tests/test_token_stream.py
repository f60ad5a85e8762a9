"""Tokens as they are sampled: the same as the result's, in time, and given up with their reader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core import ModelInput, SamplingClient, SamplingParams, StreamedToken
from tests.tiny import new_client, service_at, tiny_model_dir, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = ModelInput.from_ints(tokens(20, seed=1))


@pytest.fixture
def sampler(tmp_path: Path) -> Iterator[SamplingClient]:
    trainer = new_client(tmp_path)
    client = trainer.save_weights_and_get_sampling_client().result(20)
    yield client
    client.close()
    trainer.close()


def wait_until_idle(client: SamplingClient) -> None:
    deadline = time.monotonic() + 20
    while client.engine.sampler.busy or any(slot.busy for slot in client.engine.sampler.cache.slots()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_streamed_tokens_are_those_of_the_result(sampler: SamplingClient) -> None:
    params = SamplingParams(max_tokens=30, seed=3, stop=[7, 70])
    whole = sampler.sample(PROMPT, 3, params).result(20)
    with sampler.stream(PROMPT, 3, params) as stream:
        found = list(stream)
        assert list(stream) == []  # an end stays one
    streamed = stream.future.result(20)
    assert [one.tokens for one in streamed.sequences] == [one.tokens for one in whole.sequences]
    for number, sequence in enumerate(streamed.sequences):
        mine = [one for one in found if one.sequence == number]
        assert [one.token for one in mine] == sequence.tokens
        assert [one.logprob for one in mine] == sequence.logprobs


@pytest.mark.parametrize("options", [{}, {"exact": True}])
def test_the_first_token_comes_long_before_the_last(options: dict, tmp_path: Path) -> None:
    client = service_at(tmp_path, **options).create_sampling_client(base_model=str(tiny_model_dir())).result(20)
    with client.stream(PROMPT, 1, SamplingParams(max_tokens=900)) as stream:
        assert next(stream).sequence == 0
        assert not stream.future.done()
    client.close()


def test_a_reader_that_leaves_gives_the_slots_back(sampler: SamplingClient) -> None:
    started = time.monotonic()
    with sampler.stream(PROMPT, 4, SamplingParams(max_tokens=900)) as stream:
        next(stream)
    wait_until_idle(sampler)
    assert stream.future.done()
    assert len(list(stream)) < 3000  # what had come by then, and no error
    forgotten = sampler.stream(PROMPT, 4, SamplingParams(max_tokens=900))
    future = forgotten.future
    del forgotten  # nobody can read it any more
    assert future.done()
    wait_until_idle(sampler)
    assert time.monotonic() - started < 4  # 7,200 tokens would take longer


def test_a_callback_that_raises_fails_its_own_request(sampler: SamplingClient) -> None:
    def refuse(found: StreamedToken) -> None:
        raise LookupError(f"no reader for token {len(str(found))}")

    beside = sampler.sample(PROMPT, 1, SamplingParams(max_tokens=40, seed=0))
    broken = sampler.sample(PROMPT, 1, SamplingParams(max_tokens=40, seed=1), on_token=refuse)
    with pytest.raises(LookupError):
        broken.result(20)
    assert len(beside.result(20).sequences[0].tokens) == 40
    wait_until_idle(sampler)


def test_what_fails_a_request_is_raised_by_its_stream(sampler: SamplingClient) -> None:
    with pytest.raises(ValueError, match="max_tokens=0"):
        sampler.stream(PROMPT, 1, SamplingParams(max_tokens=0))
    stream = sampler.stream(PROMPT, 1, SamplingParams(max_tokens=900))
    next(stream)
    stream.future.set_exception(FloatingPointError("diverged"))
    with pytest.raises(FloatingPointError):
        list(stream)
