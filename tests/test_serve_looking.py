"""What one sees of a running server: /healthz, /metrics, the index page; and a store whose checkpoints expire or do not fit."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from cookbook.serving import keys
from cookbook.serving.app import create_app
from cookbook.serving.futures import DISK_FULL
from cookbook.serving.server import Server
from cookbook.serving.settings import Limits
from cookbook.serving.store import Store
from core import Future, ModelInput
from core.request import Call
from tests.live_server import MODEL, serving
from tests.test_report import browser  # noqa: F401
from tests.test_serve_protocol import Wire, gradient
from tests.tiny import service_at, tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def figures(url: str, key: str = "tml-x") -> Figures:
    """What Prometheus reads."""
    reply = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(reply.text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def value(found: Figures, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def names(found: Figures) -> set[str]:
    return {name for name, _ in found}


def step(wire: Wire, model: str, seq_id: int) -> None:
    """forward_backward of one token and optim_step, numbered seq_id and seq_id + 1."""
    assert isinstance(wire.http.post("/forward_backward", content=gradient(model, seq_id)).json()["request_id"], str)
    moved = wire.result(wire.post("/optim_step", {"model_id": model, "seq_id": seq_id + 1, "adam_params": {}}))
    assert moved["metrics"]["grad_norm:mean"] > 0


def sampler_of(wire: Wire, session: str, **of: str) -> str:
    body = {"session_id": session, "sampling_session_seq_id": 0, **(of or {"base_model": MODEL})}
    return wire.post("/create_sampling_session", body)["sampling_session_id"]


def sample(wire: Wire, sampler: str, seq_id: int, max_tokens: int = 4, num_samples: int = 1) -> dict:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    params = {"max_tokens": max_tokens, "seed": 1, "stop": []}
    body = {"sampling_session_id": sampler, "seq_id": seq_id, "num_samples": num_samples, "prompt": prompt}
    return wire.post("/asample", {**body, "sampling_params": params})


def sampled(wire: Wire, promise: dict) -> bytes:
    """The protobuf of a sample that is done."""
    reply = wire.http.post("/retrieve_future", json={"request_id": promise["request_id"]})
    assert reply.headers["content-type"] == "application/x-protobuf", reply.text
    return reply.content


class Pair:
    """Two owners on one server with keys."""

    def __init__(self, store: Path) -> None:
        index = Store(store)
        self.keys = [keys.create(index, name) for name in ("alice", "<i>bob</i>")]
        index.close()

    def wires(self, url: str) -> list[Wire]:
        return [Wire(url, key) for key in self.keys]


# ---- /healthz


def test_a_server_whose_engine_has_ended_is_not_healthy(tmp_path: Path) -> None:
    server = Server(service_at(tmp_path), [str(tiny_model_dir("qwen2"))], Store(tmp_path), Limits())
    keys.create(server.store, "alice")
    server.open()
    with TestClient(create_app(server)) as web:
        asked = web.get("/healthz")
        assert (asked.status_code, asked.json()) == (200, {"status": "ok"})
        (engine,) = [client.engine for client in server.base.values()]
        engine.stop()
        engine._thread.join(10)
        asked = web.get("/healthz")
        assert (asked.status_code, asked.json()) == (503, {"status": "the engine has stopped"})
    server.store.close()


# ---- /metrics


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    with serving(tmp_path_factory.mktemp("open")) as (url, server):
        yield url, server


def test_a_future_tells_when_its_operation_began_and_ended(live: tuple[str, Server]) -> None:
    sampler = live[1].base[MODEL]
    gate, before = threading.Event(), time.monotonic()
    held: Future[bool] = Future()
    sampler.engine.submit(sampler.tenant, Call(lambda: gate.wait(30), held))
    waiting = sampler.compute_logprobs(ModelInput.from_ints([1, 2, 3]))
    time.sleep(0.05)
    assert held.begun is not None and held.ended is None and waiting.begun is None
    gate.set()
    waiting.result(30)
    assert held.ended is not None and waiting.begun is not None and waiting.ended is not None
    assert before <= held.begun <= held.begun + 0.04 < held.ended <= waiting.begun <= waiting.ended <= time.monotonic()


def test_figures_are_those_of_what_was_done(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, _):
        wire = Wire(url)
        session = wire.session()
        model = wire.model(session)
        for number in range(3):
            step(wire, model, 1 + 2 * number)
        wire.result(wire.save(model, 7, "kept"))
        sampled(wire, sample(wire, sampler_of(wire, session), 0, max_tokens=4, num_samples=2))
        completion = {"model": MODEL, "prompt": "hello", "max_tokens": 5, "seed": 1, "stop": None}
        spoken = httpx.post(f"{url}/v1/completions", json=completion, timeout=30).json()["usage"]
        httpx.get(f"{url}/nowhere")
        httpx.delete(f"{url}/healthz")
        found = figures(url)
        for kind, number in {"forward_backward": 3, "optim_step": 3, "save": 1, "sample": 2}.items():
            assert value(found, "cook_queue_seconds_count", kind=kind, owner="local") == number
            waited, took = (
                value(found, f"cook_{what}_seconds_sum", kind=kind, owner="local") for what in ("queue", "operation")
            )
            assert 0 < waited < took
        assert value(found, "cook_trained_tokens_total", owner="local") == 3
        assert value(found, "cook_prompt_tokens_total", owner="local", model=MODEL) == 3 + spoken["prompt_tokens"]
        assert value(found, "cook_sampled_tokens_total", owner="local", model=MODEL) == 8 + spoken["completion_tokens"]
        of_run = {"run": model, "model": MODEL, "owner": "local"}
        assert value(found, "cook_run_trained_tokens_total", **of_run) == 3
        assert value(found, "cook_run_steps", **of_run) == 3
        assert value(found, "cook_checkpoints", kind="weights", owner="local") == 1
        size = sum(file.stat().st_size for file in (tmp_path / model / "weights" / "kept").iterdir())
        assert value(found, "cook_checkpoint_bytes", kind="weights", owner="local") == size
        assert value(found, "cook_sessions", owner="local") == value(found, "cook_training_clients", owner="local") == 1
        requests = {"endpoint": "/api/v1/optim_step", "status": "200", "owner": "local"}
        assert value(found, "cook_request_seconds_count", **requests) == 3
        assert value(found, "cook_request_seconds_count", endpoint="other", status="404", owner="") == 1
        assert value(found, "cook_request_seconds_count", endpoint="/healthz", status="405", owner="") == 1
        assert not [name for name in names(found) if name.endswith("_created")]
        assert value(found, "cook_engine_up", model=MODEL) == 1


def test_series_of_a_training_client_go_with_it_and_the_owners_stay(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, _):
        wire = Wire(url)
        session = wire.session()
        model = wire.model(session)
        step(wire, model, 1)
        assert {"cook_run_steps", "cook_run_trained_tokens_total"} <= names(figures(url))
        wire.post(f"/sessions/{session}/finish", {"reason": {"type": "success"}})
        found = figures(url)
        assert not any(model in dict(labels).values() for _, labels in found)
        assert value(found, "cook_trained_tokens_total", owner="local") == 1
        assert value(found, "cook_training_clients", owner="local") == value(found, "cook_sessions", owner="local") == 0


def test_two_servers_of_a_process_count_apart(live: tuple[str, Server], tmp_path: Path) -> None:
    with serving(tmp_path) as (url, _):
        wire = Wire(url)
        step(wire, wire.model(wire.session()), 1)
        assert value(figures(url), "cook_trained_tokens_total", owner="local") == 1
        assert ("cook_trained_tokens_total", frozenset({("owner", "local")})) not in figures(live[0])


def test_what_waits_and_what_runs_is_told(live: tuple[str, Server]) -> None:
    url, server = live
    wire, base = Wire(url), server.base[MODEL]
    session = wire.session()
    model, sampler = wire.model(session), sampler_of(wire, session)
    gate = threading.Event()
    base.engine.submit(base.tenant, Call(lambda: gate.wait(30), Future()))
    try:
        promises = [wire.post("/forward_backward", gradient(model, seq_id)) for seq_id in (1, 2)]
        long = sample(wire, sampler, 0, max_tokens=900)
        time.sleep(0.1)
        found = figures(url)
        for name, labels in (("cook_queue_length", {}), ("cook_own_queue_length", {"owner": "local"})):
            assert value(found, name, kind="forward_backward", **labels) == 2
            assert value(found, name, kind="sample", **labels) == 1
        assert value(found, "cook_waiting_futures", owner="local") == 3
        assert value(found, "cook_kv_in_use_tokens", model=MODEL) == 0
    finally:
        gate.set()
    for _ in range(200):
        found = figures(url)
        if value(found, "cook_running_operations", kind="sample"):
            break
        time.sleep(0.01)
    assert value(found, "cook_running_operations", kind="sample") == 1
    assert value(found, "cook_kv_in_use_tokens", model=MODEL) == 1024 < value(found, "cook_kv_capacity_tokens", model=MODEL)
    for promise in promises:
        wire.http.post("/retrieve_future", json=promise)
    sampled(wire, long)
    found = figures(url)
    assert value(found, "cook_queue_length", kind="forward_backward") == value(found, "cook_queue_length", kind="sample") == 0
    assert value(found, "cook_queue_seconds_sum", kind="forward_backward", owner="local") > 0.2
    assert value(found, "cook_kv_in_use_tokens", model=MODEL) == 0
    assert value(found, "cook_kv_kept_tokens", model=MODEL) > 900


# ---- whose things


def test_with_keys_each_owner_sees_their_own(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with serving(tmp_path) as (url, _):
        models, paths = [], []
        for wire in pair.wires(url):
            models.append(model := wire.model(wire.session()))
            step(wire, model, 1)
            paths.append(wire.result(wire.save(model, 3, "mine"))["path"])
        for page in ("/metrics", "/"):
            for headers in ({}, {"Authorization": "Bearer tml-x"}, {"Authorization": "Basic !"}):
                refused = httpx.get(url + page, headers=headers)
                assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic ")
            for me, key in enumerate(pair.keys):
                for given in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}, basic("whoever", key), basic("", key)):
                    seen = httpx.get(url + page, headers=given).text
                    assert models[me] in seen and models[1 - me] not in seen
                    assert ("alice" in seen) is (me == 0) and ("bob" in seen) is (me == 1)
                    assert page == "/metrics" or "<i>" not in seen
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
        sent = httpx.post(f"{url}/api/v1/create_session", json={}, headers=basic("whoever", pair.keys[0]))
        assert sent.status_code == 401  # another site could make a browser send it
        assert paths[0] in httpx.get(url, headers=basic("", pair.keys[0])).text


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}


# ---- the page


def test_the_page_shows_what_there_is_and_runs_nothing(tmp_path: Path, browser: Any) -> None:  # noqa: F811
    evil = "<img src=x onerror=alert(1)>\"'&"
    with serving(tmp_path) as (url, _):
        asked = httpx.get(url)
        assert "None is loaded." in asked.text and "None yet." in asked.text and "base_model=" in asked.text
        assert asked.headers["content-security-policy"].startswith("default-src 'none'") and "<script" not in asked.text
        wire = Wire(url)
        model = wire.model(wire.session())
        step(wire, model, 1)
        state = wire.result(wire.save(model, 3, "state", ttl_seconds=7200))["path"]
        odd = wire.result(wire.post("/save_weights_for_sampler", {"model_id": model, "path": evil, "seq_id": 4}))["path"]
        for width in (1200, 400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            told: list[str] = []
            page.on("console", lambda message: told.append(message.text))  # noqa: B023
            page.on("request", lambda request: told.append(request.url))  # noqa: B023
            page.goto(url)
            text = page.locator("body").inner_text()
            for expected in (MODEL, model, state, odd, "forward_backward", f"model={json.dumps(odd)}"):
                assert expected in text
            assert page.locator(".tile", has_text="trained tokens").locator("b").inner_text().startswith("1\n")
            (saves,) = [row for row in page.locator("tr").all() if row.inner_text().startswith("save")]
            assert saves.locator("td.num").all_inner_texts()[:3] == ["0", "0", "2"]
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.locator("img, script").count() == 0 and told == [f"{url}/"]
            page.close()


# ---- checkpoints past their time, and a disk that is full


def listed(wire: Wire) -> set[str]:
    return {one["tinker_path"] for one in wire.http.get("/checkpoints").json()["checkpoints"]}


def test_a_checkpoint_past_its_time_is_gone(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, server):
        wire = Wire(url)
        session = wire.session()
        model = wire.model(session)
        stays = wire.result(wire.save(model, 1, "stays", ttl_seconds=3600))["path"]
        short = wire.result(wire.save(model, 2, "short", ttl_seconds=3600))["path"]
        body = {"model_id": model, "path": "sampler", "seq_id": 3, "ttl_seconds": 3600}
        sampler = wire.result(wire.post("/save_weights_for_sampler", body))["path"]
        assert listed(wire) == {stays, short, sampler}
        server.store.run_sql("UPDATE checkpoints SET expires = ? WHERE name <> 'stays'", time.time() - 1)
        assert listed(wire) == {stays}
        assert [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]] == [MODEL]
        run = wire.http.get(f"/training_runs/{model}").json()
        assert run["last_checkpoint"]["tinker_path"] == stays and run["last_sampler_checkpoint"] is None
        wire.post("/load_weights", {"session_id": session, "model_seq_id": 1, "path": short, "optimizer": True}, 404)
        wire.post("/load_weights", {"model_id": model, "seq_id": 4, "path": short, "optimizer": True}, 404)
        wire.post("/create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "model_path": sampler}, 404)
        wire.post("/weights_info", {"tinker_path": short}, 404)
        wire.post("/copy_weights", {"source_path": short}, 404)
        asked = {"model": sampler, "prompt": "x", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=asked).status_code == 404
        server.tidy_up()
        assert [entry.name for entry in (tmp_path / model / "weights").iterdir()] == ["stays"]
        assert list((tmp_path / model / "sampler_weights").iterdir()) == []
        assert value(figures(url), "cook_checkpoints", kind="weights", owner="local") == 1


def test_the_name_of_a_checkpoint_past_its_time_is_free(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, server):
        wire = Wire(url)
        model = wire.model(wire.session())
        path = wire.result(wire.save(model, 1, "a", ttl_seconds=3600))["path"]
        server.store.run_sql("UPDATE checkpoints SET expires = ?", time.time() - 1)
        assert wire.result(wire.save(model, 2, "a"))["path"] == path
        server.tidy_up()
        assert listed(wire) == {path} and (tmp_path / model / "weights" / "a" / "state.json").exists()
        server.store.run_sql("UPDATE checkpoints SET expires = ?", time.time() - 1)
    with serving(tmp_path) as (url, _):
        assert listed(Wire(url)) == set() and list((tmp_path / model / "weights").iterdir()) == []


def test_what_was_half_deleted_does_not_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.run_sql("INSERT INTO runs VALUES ('r', '', 'local', 'm', '{}', NULL, 0, 0)")
    for name in ("whole", "deleted"):
        store.directory_of("r", "weights", name).mkdir(parents=True)
        store.add_checkpoint("r", "weights", name, "local", None, None)
    store.directory_of("r", "weights", "deleted").rename(store.directory_of("r", "weights", ".deleted.1.deleted"))
    store.close()  # as if the process had ended in the middle of delete_checkpoint
    store = Store(tmp_path)
    store.recover()
    assert [one.name for one in store.checkpoints("owner = 'local'")] == ["whole"]
    assert [entry.name for entry in (tmp_path / "r" / "weights").iterdir()] == ["whole"]
    store.close()


def test_a_full_disk_fails_a_save_and_nothing_else(small_disk: Path) -> None:
    """At every point where it can fill up: no file fits, some do, all do but the index has no room."""
    store, ballast = small_disk / "store", small_disk / "ballast"
    pair = Pair(store)
    with serving(store) as (url, _):
        alice, bob = pair.wires(url)
        hers, sessions = alice.model(alice.session()), bob.session()
        his, sampler = bob.model(sessions), sampler_of(bob, sessions)
        free = shutil.disk_usage(small_disk).free
        kept = alice.result(alice.save(hers, 1, "kept"))["path"]
        pages = (free - shutil.disk_usage(small_disk).free) // 4096
        before = contents(store / hers / "weights" / "kept")
        outcomes = []
        for left in range(pages + 12):
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096 * left))
            name, seq_id = f"try-{left}", 10 + 2 * left
            found = alice.result(alice.save(hers, seq_id, name))
            if "error" in found:
                assert found == {"error": DISK_FULL, "category": "server"}
                assert not (store / hers / "weights" / name).exists()
                again = alice.result(alice.save(hers, seq_id + 1, "kept", overwrite=True))
                assert again == {"error": DISK_FULL, "category": "server"} or "path" in again
            outcomes.append("path" in found)
            step(bob, his, seq_id)
            sampled(bob, sample(bob, sampler, seq_id))
            bob.post("/session_heartbeat", {"session_id": sessions})
            saved = {f"tinker://{hers}/weights/try-{i}" for i, fits in enumerate(outcomes) if fits}
            assert listed(alice) == {kept, *saved}
            assert not [entry for entry in (store / hers / "weights").iterdir() if entry.name.startswith(".")]
            ballast.unlink()
        assert outcomes[0] is False and outcomes[-1] is True
        assert contents(store / hers / "weights" / "kept") == before
        assert alice.result(alice.save(hers, 999, "try-0"))["path"] in listed(alice)
        everything = listed(alice)
    with serving(store) as (url, _):
        assert listed(pair.wires(url)[0]) == everything


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}
