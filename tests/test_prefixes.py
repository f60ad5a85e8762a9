"""Rows that sequences share are computed once, and change nothing."""

from __future__ import annotations

import random

import pytest
import torch

from core import Datum, ModelInput, TrainingClient
from core.lora import ComputeCopies
from core.packing import cut, in_order, lay_out
from core.prefixes import order, share
from tests.test_packing import assert_same, gradient, items, one_by_one
from tests.tiny import VOCAB, new_client

pytestmark = pytest.mark.usefixtures("one_thread")


def family(seed: int, size: int = 12, vocab: int = 4) -> list[list[int]]:
    """Sequences that branch off one another at random places; some are prefixes of others, some equal."""
    rng = random.Random(seed)
    found = [[rng.randrange(vocab) for _ in range(rng.randrange(1, 90))]]
    while len(found) < size:
        stem = rng.choice(found)
        stem = stem[: rng.randrange(0, len(stem) + 1)] if rng.random() < 0.8 else stem
        found.append(stem + [rng.randrange(vocab) for _ in range(rng.choice([0, 1, 5, 40]))] or [0])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_spans_spell_every_sequence(seed: int) -> None:
    sequences = [torch.tensor(one) for one in family(seed)]
    spans, last = share(sequences)
    for tokens, end in zip(sequences, last, strict=True):
        path = end.path()
        assert torch.equal(torch.cat([span.tokens for span in path]), tokens)
        assert [span.start for span in path[1:]] == [span.stop for span in path[:-1]]
    assert {id(span) for end in last for span in end.path()} == {id(span) for span in spans}
    places = {id(span): i for i, span in enumerate(spans)}
    assert all(span.parent is None or places[id(span.parent)] < places[id(span)] for span in spans)


@pytest.mark.parametrize("seed", range(5))
def test_order_keeps_every_sequence_and_puts_like_beginnings_together(seed: int) -> None:
    sequences = [torch.tensor(one) for one in family(seed, size=20)]
    indices, rows = order(sequences)
    assert sorted(indices) == list(range(20))
    spelt = {tuple(one[: i + 1].tolist()) for one in sequences for i in range(len(one))}
    assert sum(rows) == len(spelt)  # every distinct beginning is new once


def test_sixteen_replies_to_one_prompt_take_its_rows_once() -> None:
    prompt, rng = list(range(100)), random.Random(0)
    group = items([112] * 16)
    tokens = [torch.tensor(prompt + [rng.randrange(100) for _ in range(12)]) for _ in group]
    group = [type(a)(0, i, a.adapter, t, a.targets, None) for i, (a, t) in enumerate(zip(group, tokens, strict=True))]
    assert [len(batch) for batch in cut(in_order(group, True), 512)] == [16]
    whole = cut(in_order(group, False), 512)  # CUDA's kernel, and engine.exact: each takes all of its own
    assert [len(batch) for batch in whole] == [4] * 4


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def client(request, tmp_path_factory):
    client = new_client(tmp_path_factory.mktemp("store"), request.param)
    yield client
    client.close()


def data_of(sequences: list[list[int]], seed: int) -> list[Datum]:
    rng = torch.Generator().manual_seed(seed)
    return [
        Datum(
            ModelInput.from_ints(one),
            {
                "target_tokens": torch.randint(VOCAB, (len(one),), generator=rng),
                "weights": torch.rand(len(one), generator=rng) * (torch.rand(len(one), generator=rng) < 0.7),
            },
        )
        for one in sequences
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("token_budget", [64, 512])
def test_sharing_changes_neither_logprobs_nor_gradients(client: TrainingClient, seed: int, token_budget: int) -> None:
    batch = data_of(family(seed), seed)
    assert_same(gradient(client, batch, token_budget), one_by_one(client, batch))


def test_shared_beginnings_longer_than_a_block_of_queries(client: TrainingClient) -> None:
    rng = random.Random(1)
    stem = [rng.randrange(VOCAB) for _ in range(300)]
    batch = data_of([stem + [rng.randrange(VOCAB) for _ in range(n)] for n in (1, 40, 280, 290, 0)], 0)
    assert_same(gradient(client, batch, 4096), one_by_one(client, batch))


def test_two_adapters_never_share_rows(tmp_path) -> None:
    clients = [new_client(tmp_path, rank=rank, seed=rank) for rank in (2, 3)]
    batch = data_of([[7] * 60 + [i] for i in range(3)], 0)
    alone = [gradient(client, batch, 512) for client in clients]
    futures = [client.forward_backward(batch, "cross_entropy") for client in clients]
    for client, future, expected in zip(clients, futures, alone, strict=True):
        found = [one["logprobs"] for one in future.result().loss_fn_outputs]
        assert_same((found, client.adapter.grad, future.result().metrics["loss:sum"]), expected)
    for client in clients:
        client.close()


def test_without_gradient_rows_are_shared_too(client: TrainingClient) -> None:
    copies, device = ComputeCopies(torch.float32), torch.device("cpu")
    group = items([60, 60])
    same = [type(item)(0, i, client.adapter, group[0].tokens, item.targets, None) for i, item in enumerate(group)]
    rows, _ = lay_out(same, copies, device, with_grad=False)
    assert len(rows.tokens) == 64  # 60 and padding to a multiple of 16
