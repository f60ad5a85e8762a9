"""How a batch is cut and laid out changes nothing: size of micro-batches, packing, order, recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from core import TrainingClient
from core.datum import LoraConfig
from core.decoder import Decoder, Rows
from core.lora import Adapter
from core.objective import Objective
from core.packing import TARGETS_PER_ROW, Item, cut, in_order
from tests.tiny import assert_close, data, datum, new_client, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 64, 100, 255, 256, 257, 300, 513, 600]
SOME = [3, 17, 16, 40, 1, 90, 15, 2]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def client(request, tmp_path_factory) -> Iterator[TrainingClient]:
    client = new_client(tmp_path_factory.mktemp("store"), request.param)
    yield client
    client.close()


def gradient(
    client: TrainingClient, batch, token_budget: int = 1024, **options
) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    """(logprobs, gradient, loss) of one forward_backward."""
    client.engine.token_budget = token_budget
    client.adapter.clear_grad()
    output = client.forward_backward(batch, "cross_entropy", **options).result()
    found = client.adapter.grad.clone()
    client.engine.token_budget = 1024
    client.adapter.clear_grad()
    return [o["logprobs"] for o in output.loss_fn_outputs], found, output.metrics["loss:sum"]


def one_by_one(client: TrainingClient, batch) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    parts = [gradient(client, [one]) for one in batch]
    return [lp for lps, _, _ in parts for lp in lps], sum(g for _, g, _ in parts), sum(loss for _, _, loss in parts)


def assert_same(left, right) -> None:
    for a, b in zip(left[0], right[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert_close(left[1], right[1])
    assert left[2] == pytest.approx(right[2], rel=1e-5)


def test_packed_sequences_do_not_see_each_other(client: TrainingClient) -> None:
    batch = data(LENGTHS)
    alone = one_by_one(client, batch)
    assert_same(gradient(client, batch, 1024), alone)
    assert_same(gradient(client, batch, 100_000), alone)


@pytest.mark.parametrize("token_budget", [16, 64, 4096])
def test_the_size_of_micro_batches_changes_nothing(client: TrainingClient, token_budget: int) -> None:
    batch = data(SOME)
    assert_same(gradient(client, batch, token_budget), one_by_one(client, batch))


def test_the_order_of_data_changes_nothing_but_the_order_of_logprobs(client: TrainingClient) -> None:
    batch = data(SOME)
    logprobs, found, loss = gradient(client, batch[::-1], 64)
    assert_same((logprobs[::-1], found, loss), gradient(client, batch, 64))


def test_recomputing_layers_in_backward_changes_nothing(client: TrainingClient) -> None:
    batch = data(SOME)
    expected = gradient(client, batch)
    client.engine.recompute = True
    assert_same(gradient(client, batch), expected)
    client.engine.recompute = False


def test_leaving_out_the_logprobs_of_untrained_tokens_changes_no_gradient(client: TrainingClient) -> None:
    batch = data(SOME)
    everywhere, expected, loss = gradient(client, batch, 64)
    weighted, found, same_loss = gradient(client, batch, 64, logprobs="weighted")
    assert_close(found, expected)
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for one, full, some in zip(batch, everywhere, weighted, strict=True):
        trained = one.loss_fn_inputs["weights"] != 0
        assert bool((full < 0).all())
        assert bool((some[~trained] == 0).all())
        torch.testing.assert_close(some[trained], full[trained], rtol=1e-5, atol=1e-5)


def test_a_repeated_sequence_counts_as_often_as_it_is_there(client: TrainingClient) -> None:
    _, once, _ = gradient(client, [datum(20)])
    _, thrice, _ = gradient(client, [datum(20), datum(33, 5), datum(20), datum(20)])
    _, other, _ = gradient(client, [datum(33, 5)])
    assert_close(thrice - other, 3 * once, 2e-5)


def test_forward_backward_twice_equals_all_data_at_once(client: TrainingClient) -> None:
    batch = data(SOME)
    _, expected, _ = gradient(client, batch)
    for half in (batch[:3], batch[3:]):
        client.forward_backward(half, "cross_entropy").result()
    assert_close(client.adapter.grad, expected)


def items(lengths: list[int], num_targets: list[int] | None = None) -> list[Item]:
    adapter = Adapter.__new__(Adapter)
    adapter.config = LoraConfig()
    return [
        Item(0, i, adapter, torch.tensor(tokens(length, i)), torch.zeros(length, k, dtype=torch.int64), None)
        for i, (length, k) in enumerate(zip(lengths, num_targets or [1] * len(lengths), strict=True))
    ]


def test_micro_batches_hold_every_sequence_once_and_the_budget_within_one_sequence() -> None:
    lengths = torch.randint(1, 200, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    for token_budget in (50, 200, 1024, 10**6):
        batches = cut(in_order(items(lengths), True), token_budget)
        assert sorted(item.index for batch in batches for item in batch) == list(range(80))
        for batch in batches:
            assert len(batch) == 1 or sum(item.length for item in batch) < token_budget + max(
                item.length for item in batch
            )
    assert len(cut(in_order(items(lengths), True), 10**6)) == 1


def test_micro_batches_are_few_and_even() -> None:
    batches = cut(in_order(items([10] * 110), True), 1000)
    assert [sum(item.length for item in batch) for batch in batches] == [550, 550]


def test_a_micro_batch_has_one_number_of_targets_per_position() -> None:
    batches = cut(in_order(items([5, 6, 7, 8], [1, 3, 1, 3]), True), 1000)
    assert [[item.index for item in batch] for batch in batches] == [[2, 0], [3, 1]]


def test_a_sequence_longer_than_the_budget_stands_alone() -> None:
    batches = cut(in_order(items([5, 500, 6, 499]), True), 100)
    assert [[item.length for item in batch] for batch in batches][:2] == [[500], [499]]
    assert all(len(batch) == 1 for batch in batches[:2])


def test_a_sequence_that_is_there_a_thousand_times_takes_several_micro_batches() -> None:
    """Its rows are computed once in each, but the unembedding of every copy takes its time, in which others wait."""
    copies = [replace(item, tokens=torch.arange(100)) for item in items([100] * 1000)]
    batches = cut(in_order(copies, True), 500)
    assert max(map(len, batches)) <= 500 * TARGETS_PER_ROW // 100 + 1 and sum(map(len, batches)) == 1000
    few = [replace(item, wanted=torch.tensor([99])) for item in copies[:60]]  # one target each
    assert [len(batch) for batch in cut(in_order(few, True), 500)] == [60]


class Cramped:
    """A decoder on a device with room for so many tokens at a time, and for three times as many with recomputation."""

    def __init__(self, decoder: Decoder, room: int) -> None:
        self.decoder, self.room, self.refused = decoder, room, 0

    def __getattr__(self, name: str):
        return getattr(self.decoder, name)

    def train(self, rows: Rows, objective: Objective, recompute: bool) -> torch.Tensor:
        if len(rows.tokens) > self.room * (3 if recompute else 1):
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.decoder.train(rows, objective, recompute)


@contextmanager
def cramped(client: TrainingClient, room: int) -> Iterator[Cramped]:
    engine, decoder = client.engine, client.engine.decoder
    client.adapter.clear_grad()
    engine.decoder = Cramped(decoder, room)
    yield engine.decoder
    engine.decoder, engine.token_budget, engine.recompute = decoder, 1024, False


@pytest.mark.parametrize(("room", "refused", "token_budget"), [(200, 0, 1024), (100, 1, 92), (40, 2, 92)])
def test_out_of_memory_halves_the_budget_then_recomputes_and_the_gradient_is_the_same(
    client: TrainingClient, room: int, refused: int, token_budget: int
) -> None:
    batch = data(SOME)
    logprobs, expected, loss = gradient(client, batch)
    with cramped(client, room) as decoder:
        output = client.forward_backward(batch, "cross_entropy").result()
        assert (decoder.refused, client.engine.token_budget) == (refused, token_budget)
        assert client.engine.recompute is (room == 40)
    assert_same(
        ([o["logprobs"] for o in output.loss_fn_outputs], client.adapter.grad, output.metrics["loss:sum"]),
        (logprobs, expected, loss),
    )


def test_out_of_memory_in_a_custom_loss_is_answered_too(client: TrainingClient) -> None:
    batch = data(SOME)
    _, expected, _ = gradient(client, batch)

    def fn(data, logprobs):
        return -sum((lp * d.loss_fn_inputs["weights"]).sum() for d, lp in zip(data, logprobs, strict=True)), {}

    with cramped(client, 100) as decoder:
        client.forward_backward_custom(batch, fn).result()
        assert decoder.refused == 1
    assert_close(client.adapter.grad, expected)


def test_a_sequence_that_never_fits_ends_in_one_line_and_leaves_no_gradient(client: TrainingClient) -> None:
    line = r"^one sequence of 90 tokens does not fit even with recomputation .*: lower max_length$"
    with cramped(client, 20), pytest.raises(torch.OutOfMemoryError, match=line):
        client.forward_backward(data(SOME), "cross_entropy").result()
    assert not client.adapter.has_grad
    assert not client.adapter.grad.any()
