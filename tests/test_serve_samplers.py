"""How many samplers a server keeps in memory: the newest snapshots of a training client, and what can be loaded again."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from cookbook.serving.server import SILENT_SECONDS, Server
from tests.live_server import MODEL, serving
from tests.wire import Wire, gradient

pytestmark = pytest.mark.usefixtures("one_thread")


class Loop:
    """A client that takes a step and makes a sampler of the new weights, time after time."""

    def __init__(self, wire: Wire, model: str | None = None) -> None:
        self.wire = wire
        self.model = model or wire.model(wire.session())
        self.session, self.seq_id = self.model.partition(":")[0], 0

    def snapshot(self, number: int, **more: object) -> str:
        self.wire.output(self.wire.post("/forward_backward", gradient(self.model, self.seq_id + 1)))
        self.wire.result(self.wire.step(self.model, self.seq_id + 2))
        self.seq_id += 3
        body = {"model_id": self.model, "seq_id": self.seq_id, "sampling_session_seq_id": number, **more}
        return self.wire.result(self.wire.post("/save_weights_for_sampler", body))["sampling_session_id"]


def ask(wire: Wire, sampler: str, seq_id: int = 0, status: int = 200, max_tokens: int = 2) -> dict:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    body = {"sampling_session_id": sampler, "seq_id": seq_id, "prompt": prompt}
    return wire.post("/asample", {**body, "sampling_params": {"max_tokens": max_tokens, "stop": []}}, status)


def works(wire: Wire, sampler: str, seq_id: int = 0) -> bool:
    request_id = ask(wire, sampler, seq_id)["request_id"]
    reply = wire.http.post("/retrieve_future", json={"request_id": request_id})
    return reply.status_code == 200 and "protobuf" in reply.headers["content-type"]


def buffers(server: Server, model: str) -> int:
    """Tensors of the size of an adapter's parameters that this training client and its snapshots hold."""
    trainer = server.runs[model].trainer
    assert trainer is not None
    held = [trainer.adapter.params, *(buffer for _, buffer in trainer.adapter._lent)]
    held += [one.client.weights.params for _, one in server.samplers.values()]
    return len({one.data_ptr() for one in held})


def test_only_the_newest_snapshots_of_a_training_client_stay(tmp_path: Path) -> None:
    with serving(tmp_path, samplers=3) as (url, server):
        wire = Wire(url)
        loop, other = Loop(wire), Loop(wire)
        others, clients, most = other.snapshot(0), [], 0
        for number in range(20):
            newest = loop.snapshot(number)
            clients.append(weakref.ref(server.samplers[newest][1].client))
            assert works(wire, newest)
            most = max(most, buffers(server, loop.model))
        assert [*server.samplers] == [others, *(f"{loop.session}:sample:{number}" for number in (17, 18, 19))]
        rows = server.store.rows("SELECT 1 FROM samplers WHERE session = ?", loop.session)
        gc.collect()
        assert len(rows) == sum(one() is not None for one in clients) == 3 and most <= 15
        assert len(server.base[MODEL].engine._tenants) == 1 + 2 + 4  # of the base, of training clients, of samplers
        assert all(works(wire, f"{loop.session}:sample:{number}", 1) for number in (17, 18, 19)) and works(wire, others)
        said = ask(wire, f"{loop.session}:sample:0", 1, 404)["detail"]
        assert "is not there, or not any more: weights that were not saved go when 3 newer samplers" in said
        assert "(limits.samplers)" in said and "save the weights under a name and sample from that" in said
        assert ask(wire, "nobody:sample:0", 0, 404)["detail"] == "no sampling session nobody:sample:0"
        wire.post(f"/sessions/{loop.session}/finish", {})
        assert [*server.samplers] == [others]
        assert "is over (success)" in ask(wire, newest, 2, 410)["detail"]


def test_what_was_used_last_stays_and_nothing_with_requests_under_way_goes(tmp_path: Path) -> None:
    with serving(tmp_path, samplers=2) as (url, server):
        wire = Wire(url)
        loop = Loop(wire)
        first, second = loop.snapshot(0), loop.snapshot(1)
        assert works(wire, first)
        third = loop.snapshot(2)
        assert {*server.samplers} == {first, third} and second not in server.samplers
        under_way = ask(wire, first, 1, max_tokens=900)["request_id"]
        for number in (3, 4):
            loop.snapshot(number)
        assert first in server.samplers
        wire.post("/cancel_future", {"request_id": under_way})
        for number in (5, 6):
            loop.snapshot(number)
        assert [*server.samplers] == [f"{loop.session}:sample:{number}" for number in (5, 6)]


def test_samplers_in_flight_all_have_the_newest_weights(tmp_path: Path) -> None:
    with serving(tmp_path, samplers=2) as (url, server):
        loop = Loop(Wire(url))
        for number in range(5):
            loop.snapshot(number, kind="inflight")
        kept = [one.client for _, one in server.samplers.values()]
        assert len(kept) == 2 and kept[0] is kept[1]


def test_a_saved_sampler_is_loaded_again_when_it_is_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path, samplers=1) as (url, server):
        wire = Wire(url)
        model = wire.model(wire.session())
        session = model.partition(":")[0]
        saved = wire.post("/save_weights_for_sampler", {"model_id": model, "seq_id": 1, "path": "kept"})
        path = wire.result(saved)["path"]
        made = []
        for number, what in enumerate(({"model_path": path}, {"base_model": MODEL})):
            body = {"session_id": session, "sampling_session_seq_id": number, **what}
            made.append(wire.post("/create_sampling_session", body)["sampling_session_id"])
        assert [*server.samplers] == made[1:]
        assert wire.http.get(f"/samplers/{made[0]}").json()["model_path"] == path
        assert works(wire, made[0]) and works(wire, made[1]) and works(wire, made[0], 1)


def test_of_a_silent_client_one_sampler_stays(tmp_path: Path) -> None:
    with serving(tmp_path, samplers=4) as (url, server):
        loop, awake = Loop(Wire(url)), Loop(Wire(url))
        made = [loop.snapshot(number) for number in range(3)]
        kept = [awake.snapshot(number) for number in range(2)]
        long_ago = 2 * SILENT_SECONDS
        server.store.run_sql("UPDATE sessions SET seen = ? WHERE id = ?", time.time() - long_ago, loop.session)
        server.tidy_up()
        assert {*server.samplers} == {*made, *kept}  # they were used just now
        for _, sampler in server.samplers.values():
            sampler.used -= long_ago
        server.tidy_up()
        assert {*server.samplers} == {made[-1], *kept}


def test_a_sampler_of_a_session_that_ended_meanwhile_is_not_kept(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, server):
        wire = Wire(url)
        loop = Loop(wire)
        promises = [wire.post("/forward_backward", gradient(loop.model, seq_id)) for seq_id in range(1, 40)]
        save = {"model_id": loop.model, "seq_id": 40, "sampling_session_seq_id": 0}
        promises.append(wire.post("/save_weights_for_sampler", save))
        wire.post(f"/sessions/{loop.session}/finish", {})
        replies = [wire.http.post("/retrieve_future", json={"request_id": one["request_id"]}) for one in promises]
        assert all(reply.status_code == 200 for reply in replies)
        assert server.samplers == {} and isinstance(replies[-1].json()["error"], str)
