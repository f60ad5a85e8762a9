"""A server with two owners: mallory sends what no client should, alice trains meanwhile and must not notice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cookbook.serving import keys
from cookbook.serving.server import Server
from cookbook.serving.store import Store
from core import AdamParams
from tests.live_server import MODEL, serving
from tests.tiny import data, new_client
from tests.wire import Wire, request

LEARNING_RATE, LENGTHS, RANK = 0.002, (24, 9, 16), 4
ANSWER_SECONDS = 30.0  # no answer within it is a hang; a poll is held for 25


@dataclass(frozen=True)
class Company:
    url: str
    server: Server
    keys: dict[str, str]  # by owner

    def wire(self, owner: str = "mallory") -> Wire:
        return Wire(self.url, self.keys[owner], ANSWER_SECONDS)


class Trainer:
    """A training client that steps until it is stopped."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.model = wire.model(wire.session(), rank=RANK)
        self.losses: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def _train(self) -> None:
        while not self._over.wait(0.05):
            seq_id = 1 + 2 * len(self.losses)
            body = request(self.model, seq_id, data(LENGTHS)).SerializeToString()
            gradients = self.wire.post("/forward_backward", body)
            step = self.wire.step(self.model, seq_id + 1, learning_rate=LEARNING_RATE)
            loss = self.wire.output(gradients).metrics["loss:sum"]
            assert "grad_norm:mean" in self.wire.result(step)["metrics"]
            self.losses.append(loss)

    def stop(self) -> list[float]:
        """The losses of its steps; it has not ended before by an error."""
        assert self._thread.is_alive()
        self._over.set()
        self._thread.join(ANSWER_SECONDS)
        assert not self._thread.is_alive()
        return self.losses


def losses_alone(num_steps: int, store: Path) -> list[float]:
    """What a Trainer's losses are on an engine of its own."""
    client, losses = new_client(store, rank=RANK, noise=False), []
    for _ in range(num_steps):
        losses.append(client.forward_backward(data(LENGTHS), "cross_entropy").result(60).metrics["loss:sum"])
        client.optim_step(AdamParams(LEARNING_RATE)).result(60)
    client.close()
    return losses


@contextlib.contextmanager
def company(directory: Path, models: Sequence[str] = (MODEL,), **limits: int) -> Iterator[Company]:
    """Alice trains from the beginning to the end, where her losses are compared with those of a run alone."""
    store = Store(directory)
    made = {owner: keys.create(store, owner) for owner in ("alice", "mallory")}
    store.close()
    with serving(directory, models, **limits) as (url, server):
        found = Company(url, server, made)
        alice = Trainer(found.wire("alice"))
        yield found
        losses = alice.stop()
    assert len(losses) > 1
    # rounding depends on company (1e-6 of the first loss), steps add up; a step lost, doubled or spoilt shows in the third
    # digit. After some 200 steps the rows are known by heart, and the last digits decide when Adam overshoots.
    losses = losses[:100]
    assert losses == pytest.approx(losses_alone(len(losses), directory / "alone"), rel=1e-4, abs=1e-4 * losses[0])


def settled(wire: Wire, promise: dict) -> dict:
    """A result's JSON ({} for protobuf). What has failed has failed by its sender's fault."""
    reply = wire.http.post("/retrieve_future", json={"request_id": promise["request_id"]})
    assert reply.status_code == 200, (reply.status_code, reply.text)
    found = {} if "protobuf" in reply.headers["content-type"] else reply.json()
    assert found.get("category", "user") == "user", found
    return found
