"""Whose rows come next when several clients wait."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core import AdamParams, ModelInput, TrainingClient
from core.futures import Future
from tests.tiny import data, flat, held, service_at, tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = 64
BATCHES = 10  # micro-batches of a large request


def clients(store: Path) -> tuple[TrainingClient, TrainingClient]:
    """Two tenants of an engine that has no others."""
    gc.collect()
    return _client(store, 4), _client(store, 2)


def _client(store: Path, rank: int) -> TrainingClient:
    trainer = service_at(store, token_budget=BUDGET).create_lora_training_client(str(tiny_model_dir("llama")), rank)
    return trainer.result()


def large(client: TrainingClient) -> Future:
    return client.forward_backward(data([BUDGET] * BATCHES), "cross_entropy")


def small(client: TrainingClient) -> Future:
    return client.forward_backward(data([BUDGET // 4]), "cross_entropy")


class Log:
    """Names of futures, in the order in which they are answered."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def watch(self, name: str, future: Future, then: Callable[[], None] = lambda: None) -> Future:
        def answered() -> None:
            self.names.append(name)
            then()

        future.add_done_callback(answered)
        return future


def test_a_small_request_does_not_wait_for_a_large_one_before_it(tmp_path: Path) -> None:
    one, other = clients(tmp_path)
    log = Log()
    with held(one.engine):
        futures = [log.watch("large", large(one)), log.watch("small", small(other))]
    assert [future.result(60).metrics["loss:sum"] > 0 for future in futures] == [True, True]
    assert log.names == ["small", "large"]


def test_a_small_request_does_not_share_the_rows_of_a_large_one(tmp_path: Path) -> None:
    """Though they would fit: it would be answered at the end of both."""
    one, other = clients(tmp_path)
    with held(one.engine):
        larger = one.forward_backward(data([BUDGET - BUDGET // 4]), "cross_entropy")
        smaller = small(other)
    assert larger.result(60) and smaller.result(60)
    assert larger.begun is not None and smaller.ended is not None and larger.begun >= smaller.ended


def test_a_request_joins_while_a_large_one_is_computed(tmp_path: Path) -> None:
    """Each small one is submitted when the one before is answered, as a client does that waits for its result."""
    one, other = clients(tmp_path)
    log, done = Log(), threading.Event()

    def next_one(left: int) -> None:
        if left:
            log.watch("small", small(other), lambda: next_one(left - 1))
        else:
            done.set()

    with held(one.engine):
        log.watch("large", large(one))
        next_one(5)
    assert done.wait(60)
    assert log.names[:5] == ["small"] * 5
    assert large(one).result(60).metrics["loss:sum"] > 0


def test_a_full_queue_of_large_requests_leaves_others_their_share(tmp_path: Path) -> None:
    one, other = clients(tmp_path)
    log = Log()
    with held(one.engine):
        futures = [log.watch("flood", large(one)) for _ in range(8)]
        futures.append(log.watch("other", large(other)))
    for future in futures:
        future.result(60)
    assert log.names.index("other") <= 2


def test_a_full_queue_of_small_requests_leaves_a_large_one_its_share(tmp_path: Path) -> None:
    one, other = clients(tmp_path)
    log = Log()
    count = 3 * 4 * BATCHES  # three times the rows of the large one
    with held(one.engine):
        futures = [log.watch("small", small(one)) for _ in range(count)]
        futures.append(log.watch("large", large(other)))
    for future in futures:
        future.result(60)
    assert log.names.index("large") <= 4 * BATCHES + 4


def test_who_was_away_has_saved_nothing_up(tmp_path: Path) -> None:
    one, other = clients(tmp_path)
    for _ in range(4):
        large(one).result(60)
    log = Log()
    with held(one.engine):
        futures = [log.watch("other", large(other)), log.watch("other", large(other)), log.watch("one", small(one))]
    for future in futures:
        future.result(60)
    assert log.names == ["one", "other", "other"]


def test_clients_that_submit_one_after_another_share_a_micro_batch(tmp_path: Path) -> None:
    one, other = clients(tmp_path)
    small(one).result(60)
    one.engine.micro_batch_seconds = 250.0  # it waits a fiftieth of what one takes
    first = small(one)
    one.optim_step(AdamParams(1e-3))  # no other client's: the wait goes on
    time.sleep(0.2)
    assert first.begun is None
    start = time.monotonic()
    second = small(other)  # all are there: no more waiting
    for future in (first, second):
        future.result(60)
    assert first.begun is not None and first.begun >= start and time.monotonic() - start < 4


def test_a_single_client_waits_for_nobody(tmp_path: Path) -> None:
    gc.collect()
    one = _client(tmp_path, 4)
    small(one).result(60)
    one.engine.micro_batch_seconds = 250.0
    start = time.monotonic()
    small(one).result(60)
    assert time.monotonic() - start < 4


# ---- adapters of idle clients


def test_an_idle_adapter_leaves_the_device_and_comes_back_as_it_was(tmp_path: Path) -> None:
    service = service_at(tmp_path, park_after=0.5)
    alone, parked = (service.create_lora_training_client(str(tiny_model_dir("llama")), 4).result() for _ in range(2))
    before = parked.adapter.exp_avg  # the buffer: another one holds the moments once they have moved
    for trainer in (alone, parked):
        trainer.forward_backward(data([20], seed=1), "cross_entropy").result(60)
        trainer.optim_step(AdamParams(1e-2)).result(60)
        trainer.forward_backward(data([30], seed=2), "cross_entropy").result(60)
    snapshot = parked.save_weights_and_get_sampling_client().result(60)
    deadline = time.monotonic() + 30
    alone.forward(data([5]), "cross_entropy").result(60)
    while not parked.adapter.parked:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        alone.forward(data([5]), "cross_entropy").result(60)  # a busy server parks too
    assert not alone.adapter.parked and parked.adapter.exp_avg is not before
    prompt = ModelInput.from_ints([5, 6, 7])
    assert snapshot.compute_logprobs(prompt).result(60)[1] is not None
    for trainer in (alone, parked):  # the gradient that waited is used too
        trainer.optim_step(AdamParams(1e-2)).result(60)
    assert not parked.adapter.parked
    for key, value in flat(alone).items():
        assert torch.equal(flat(parked)[key], value), key
