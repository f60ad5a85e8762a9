"""Tinker's protocol below the SDK: repetitions, owners, caps, hostile paths, and what a killed server still knows."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import zstandard
from rich.console import Console

from cookbook.errors import UsageError
from cookbook.serving import keys, proto
from cookbook.serving.cli import main, model_names, parse
from cookbook.serving.store import Store
from tests.live_server import MODEL, serving
from tests.small_runs import ROOT
from tests.wire import Wire, gradient

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    store = tmp_path_factory.mktemp("open")
    with serving(store, body_mb=1, queued=3) as (url, _):
        yield url, store


@pytest.fixture(scope="module")
def wire(open_server: tuple[str, Path]) -> Wire:
    return Wire(open_server[0])


def test_an_operation_sent_twice_runs_once(wire: Wire) -> None:
    model = wire.model(wire.session())
    body = gradient(model, 1)
    one, two = wire.post("/forward_backward", body), wire.post("/forward_backward", body)
    assert one == two
    assert "was sent before with another content" in wire.post("/forward_backward", gradient(model, 1, token=6), 400)["detail"]
    step = {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 0.1}}
    first = wire.result(wire.post("/optim_step", step))
    assert wire.result(wire.post("/optim_step", step)) == first and first["metrics"]["grad_norm:mean"] > 0
    assert "without a gradient" in wire.result(wire.post("/optim_step", {**step, "seq_id": 9}))["error"]  # a gap is no wait


def test_a_session_asked_for_twice_is_one(wire: Wire) -> None:
    one, two = (wire.post("/create_session", {}, **{"X-Idempotency-Key": "k"})["session_id"] for _ in range(2))
    assert one == two != wire.session()
    wire.post(f"/sessions/{one}/finish", {"reason": {"type": "success"}})
    wire.post("/session_heartbeat", {"session_id": one}, 410)


def test_an_unknown_promise_is_lost_not_waited_for(wire: Wire) -> None:
    assert "nothing is gone: the server was restarted" in wire.result({"request_id": "nothing"}, 410)["detail"]


def test_bodies_have_a_cap_packed_and_unpacked(wire: Wire) -> None:
    wire.post("/forward_backward", bytes(2 << 20), 413)
    bomb = zstandard.compress(bytes(200 << 20))
    assert len(bomb) < 1 << 20
    wire.post("/forward_backward", bomb, 413, **{"Content-Encoding": "zstd"})
    wire.post("/forward_backward", b"\x00not zstd", 400, **{"Content-Encoding": "zstd"})
    wire.post("/forward_backward", b"\xff\xff\xff", 400)
    packed = zstandard.compress(gradient(wire.model(wire.session()), 1))
    assert "request_id" in wire.post("/forward_backward", packed, **{"Content-Encoding": "zstd"})


def test_json_has_a_smaller_cap_and_metadata_a_small_one(tmp_path: Path) -> None:
    with serving(tmp_path, json_mb=1) as (url, _):
        wire = Wire(url)
        assert "limits.json_mb" in wire.post("/create_session", {"user_metadata": {"a": "x" * (2 << 20)}}, 413)["detail"]
        session, long = wire.session(), "x" * (1 << 16)
        for about in ({"user_metadata": {"a": long}}, {"tags": [long]}, {"project_id": long}, {"display_name": long}):
            said = wire.post("/create_session", about, 422)["detail"]
            assert f"body.{next(iter(about))}: Value error, has 65,5" in said and "expected at most 65,536" in said
        lora = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 2}}
        assert "user_metadata" in wire.post("/create_model", {**lora, "user_metadata": {"a": long}}, 422)["detail"]
        model = wire.model(session)
        body = {"model_id": model, "path": "a", "seq_id": 1, "user_metadata": {"a": long}}
        assert "user_metadata" in wire.post("/save_weights", body, 422)["detail"]
        message = proto.parse("ForwardBackwardRequest", gradient(model, 1))
        message.data[0].loss_fn_inputs["weights"].dense = bytes(3 << 20)
        message.data[0].loss_fn_inputs["weights"].dtype = proto.FLOAT32
        assert "weights" in wire.result(wire.post("/forward_backward", message.SerializeToString()))["error"]  # no 413


def test_bodies_that_wait_have_a_budget(tmp_path: Path) -> None:
    with serving(tmp_path, queued_mb=1) as (url, server):
        wire = Wire(url)
        models = [wire.model(wire.session()) for _ in range(2)]
        message = proto.parse("ForwardBackwardRequest", gradient(models[0], 1))
        message.data.extend([message.data[0]] * 12_000)
        assert (400 << 10) < len(message.SerializeToString()) < 1 << 19
        packed = {"Content-Encoding": "zstd"}
        statuses, promises = [], []
        for number in range(6):
            message.model_id, message.seq_id = models[number % 2], 1 + number
            reply = wire.http.post("/forward_backward", content=zstandard.compress(message.SerializeToString()), headers=packed)
            statuses.append(reply.status_code)
            promises += [reply.json()] if reply.status_code == 200 else []
        assert statuses[:2] == [200, 200] and 429 in statuses and "limits.queued_mb" in reply.text
        message.model_id, message.seq_id = models[0], 1
        again = zstandard.compress(message.SerializeToString())
        assert wire.post("/forward_backward", again, **packed) == promises[0]  # a repetition takes no room
        for promise in promises:
            wire.post("/cancel_future", {"request_id": promise["request_id"]})
            wire.http.post("/retrieve_future", json={"request_id": promise["request_id"]})
        assert server.promises.waiting_bytes(server.runs[models[0]].owner) == 0
        message.seq_id, message.loss_fn_config["beta"] = 9, 1.0
        message.data.extend([message.data[0]] * 24_000)  # more than the budget, but alone
        assert "beta" in wire.result(wire.post("/forward_backward", message.SerializeToString()))["error"]


def test_operations_that_a_finished_session_had_not_begun_are_told_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path) as (url, _):
        wire = Wire(url)
        session = wire.session()
        model = wire.model(session)
        message = proto.parse("ForwardBackwardRequest", gradient(model, 1))
        message.data.extend([message.data[0]] * 2000)
        promises = []
        for seq_id in range(1, 13):
            message.seq_id = seq_id
            promises.append(wire.post("/forward_backward", message.SerializeToString()))
        wire.post(f"/sessions/{session}/finish", {"reason": {"type": "success"}})
        replies = [wire.http.post("/retrieve_future", json={"request_id": promise["request_id"]}) for promise in promises]
        failed = [reply.json() for reply in replies if reply.headers["content-type"] == "application/json"]
        line = f"training run {model} was closed before this operation began"
        assert failed and failed == [{"error": line, "category": "user"}] * len(failed)
        assert not [record for record in caplog.records if record.exc_info]


def test_old_sessions_of_which_nothing_is_left_are_forgotten(tmp_path: Path) -> None:
    with serving(tmp_path, sessions=3) as (url, server):
        wire = Wire(url)
        kept = wire.model(wire.session())
        path = wire.result(wire.save(kept, 1, "a"))["path"]
        gone = wire.model(wire.session())
        wire.result(wire.save(gone, 1, "a"))
        assert wire.http.delete(f"/training_runs/{gone}/checkpoints/weights/a").status_code == 200
        for model in (kept, gone):
            wire.post(f"/sessions/{model.partition(':')[0]}/finish", {})
        for number in range(6):
            made = wire.post("/create_session", {}, **{"X-Idempotency-Key": f"{number}"})["session_id"]
            wire.post(f"/sessions/{made}/finish", {})
        server.tidy_up()
        assert server.store.rows("SELECT count(*) FROM sessions")[0][0] == 3 + 1 and server.session_keys == {}
        assert [row["id"] for row in server.store.rows("SELECT id FROM runs")] == [kept]
        assert server.store.rows("SELECT count(*) FROM saves")[0][0] == 1
        body = {"session_id": wire.session(), "model_seq_id": 0, "path": path, "optimizer": True}
        assert "model_id" in wire.result(wire.post("/load_weights", body))


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", ".hidden", "a\x00b", "a\nb", "x" * 300])
def test_names_are_one_path_segment(wire: Wire, name: str, open_server: tuple[str, Path]) -> None:
    model = wire.model(wire.session())
    wire.post("/save_weights", {"model_id": model, "path": name, "seq_id": 1}, 400)
    assert {entry.name for entry in open_server[1].iterdir()} >= {"serve.db"}


@pytest.mark.parametrize(
    ("uri", "status"),
    [
        ("/etc/passwd", 400), ("tinker://../weights/x", 400), ("tinker://a/../x", 400), ("tinker://a/weights/..", 400),
        ("tinker://a/weights/b/c", 400), ("tinker://a/weights/b", 404), ("file://x", 400),
    ],
)  # fmt: skip
def test_only_checkpoints_of_the_index_can_be_loaded(wire: Wire, uri: str, status: int) -> None:
    session = wire.session()
    wire.post("/load_weights", {"session_id": session, "model_seq_id": 0, "path": uri, "optimizer": False}, status)
    wire.post("/create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "model_path": uri}, status)
    wire.post("/weights_info", {"tinker_path": uri}, status)


def test_graphs_of_losses_are_refused(wire: Wire) -> None:
    wire.post("/create_custom_loss", {"session_id": wire.session(), "graph": {"format": 1, "nodes": []}}, 400)
    message = proto.parse("ForwardBackwardRequest", gradient(wire.model(wire.session()), 1))
    message.loss_fn = "custom"
    wire.post("/forward_backward", message.SerializeToString(), 400)


def test_ttl_is_checked(wire: Wire) -> None:
    model = wire.model(wire.session())
    wire.post("/save_weights", {"model_id": model, "path": "a", "seq_id": 1, "ttl_seconds": 5}, 400)


def test_owners_do_not_see_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    alice, bob = keys.create(store, "alice"), keys.create(store, "bob")
    with serving(tmp_path) as (url, server):
        a, b = Wire(url, alice), Wire(url, bob)
        session = a.session()
        model = a.model(session)
        path = a.result(a.save(model, 1, "mine"))["path"]
        promise = a.save(model, 2, "second")
        hers = b.session()
        b.post("/forward_backward", gradient(model, 3), 404)
        b.post("/get_info", {"model_id": model}, 404)
        b.post("/load_weights", {"session_id": hers, "model_seq_id": 0, "path": path, "optimizer": True}, 404)
        b.post("/create_sampling_session", {"session_id": hers, "sampling_session_seq_id": 0, "model_path": path}, 404)
        b.post("/create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}, 404)
        b.result(promise, 410)
        place = f"/training_runs/{model}/checkpoints/weights/mine"
        assert b.http.delete(place).status_code == 404
        assert b.http.get(f"/training_runs/{model}").status_code == 404
        assert b.http.get("/training_runs").json()["training_runs"] == []
        assert b.http.get("/checkpoints").json()["checkpoints"] == []
        assert b.http.get(f"/sessions/{session}").status_code == 404
        assert a.http.post(f"{place}/publish").status_code == 200
        copied = b.post("/copy_weights", {"source_path": path, "destination_project_id": "p"})["tinker_path"]
        assert a.http.delete(place).status_code == 200
        body = {"session_id": hers, "sampling_session_seq_id": 1, "model_path": copied}
        assert b.post("/create_sampling_session", body)["sampling_session_id"]
        for wrong in ("tml-", "tml-x", bob[:-1], ""):
            Wire(url, wrong).post("/create_session", {}, 401)
        keys.revoke(server.store, bob.split("-")[1])
        b.post("/create_session", {}, 401)
    store.close()


def test_a_copy_is_what_the_index_says_and_not_what_lies_on_the_disk(tmp_path: Path) -> None:
    """A process may end, or the disk be full, once the files of a copy are there."""
    with serving(tmp_path) as (url, server):
        wire = Wire(url)
        path = wire.result(wire.save(wire.model(wire.session()), 1, "a"))["path"]
        asked, key = {"source_path": path, "destination_project_id": "p"}, {"X-Idempotency-Key": "k"}
        copied = wire.post("/copy_weights", asked, **key)["tinker_path"]
        run = copied.removeprefix("tinker://").split("/")[0]
        for tables in (["checkpoints"], ["checkpoints", "runs", "copies"]):
            for table in tables:
                server.store.run_sql(f"DELETE FROM {table} WHERE {'id' if table == 'runs' else 'run'} = ?", run)
            assert wire.post("/copy_weights", asked, **key)["tinker_path"] == copied
            wire.post("/weights_info", {"tinker_path": copied})
            assert wire.http.get(f"/training_runs/{run}").json()["last_checkpoint"]["tinker_path"] == copied
        server.store.run_sql("DELETE FROM checkpoints WHERE run = ?", run)
        server.store.recover()
        wire.post("/weights_info", {"tinker_path": copied})


def test_a_flooded_queue_asks_to_wait(wire: Wire) -> None:
    model = wire.model(wire.session())
    message = proto.parse("ForwardBackwardRequest", gradient(model, 1))
    message.data.extend([message.data[0]] * 2000)
    statuses = []
    for seq_id in range(1, 9):
        message.seq_id = seq_id
        statuses.append(wire.http.post("/forward_backward", content=message.SerializeToString()).status_code)
    assert set(statuses) == {200, 429}


def test_open_to_others_only_with_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"host=0\.0\.0\.0 is open to others and there is no key: make one"):
        main([f"store={tmp_path}", "host=0.0.0.0", f"model={MODEL}"], Console())
    main(["keys", "create", "carol", f"store={tmp_path}"], Console())
    key = capsys.readouterr().out.strip()
    store = Store(tmp_path)
    assert keys.owner_of(store, key) == "carol" and key.startswith("tml-")
    assert key.encode() not in (tmp_path / "serve.db").read_bytes() + (tmp_path / "serve.db-wal").read_bytes()
    main(["keys", "revoke", key.split("-")[1], f"store={tmp_path}"], Console())
    assert keys.owner_of(store, key) is None
    store.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prot=1"], r"unknown key 'prot'; did you mean 'port'\?"),
        (["port=x"], r"port=x: .*'x'"),
        (["limits.sample=1"], r"did you mean 'limits.samples'\?"),
        (["limits.body_mb=-1"], r"limits.body_mb is -1, expected more than 0"),
        (["limits.session_hours=nan"], r"limits.session_hours is nan, expected more than 0"),
        (["qwen3-8b"], r"'qwen3-8b': expected key=value"),
    ],
)
def test_settings_that_are_wrong_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(words)


def test_a_store_that_cannot_be_opened_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "serve.db").write_text("no index " * 100)
    for store in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x"), tmp_path / "other"):
        for words in ([], ["keys", "create", "alice"]):
            with pytest.raises(UsageError, match=f"^store={store} cannot be opened: ") as refused:
                main([*words, f"store={store}"], Console())
            assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="cannot be opened: file is not a database"):
        main(["keys", "list", f"store={tmp_path / 'other'}"], Console())


def test_to_look_at_keys_makes_no_store(tmp_path: Path) -> None:
    for words in (["keys", "list"], ["keys", "revoke", "1f3c09aa"]):
        with pytest.raises(UsageError, match=r"typo holds no serve\.db: name a server's store"):
            main([*words, f"store={tmp_path / 'typo'}"], Console())
    assert not (tmp_path / "typo").exists()


def test_a_store_has_one_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The start of a second one would remove what the first is writing."""
    first, second = Store(tmp_path), Store(tmp_path)
    first.run_sql("INSERT INTO runs VALUES ('r', '', 'local', 'm', '{}', NULL, 0, 0)")
    first.recover()
    half = first.directory_of("r", "weights", ".half.abc")
    half.mkdir(parents=True)
    with pytest.raises(UsageError, match=rf"{tmp_path} is in use by another process \(pid {os.getpid()}\)"):
        second.recover()
    assert half.exists()
    main(["keys", "create", "alice", f"store={tmp_path}"], Console())
    main(["keys", "list", f"store={tmp_path}"], Console())
    assert "alice" in capsys.readouterr().out
    first.close()
    second.recover()
    assert not half.exists()
    second.close()


@pytest.mark.parametrize("model", ["nope", f"{MODEL},nope"], ids=["first", "second"])
def test_a_model_that_is_not_there_ends_in_one_line(tmp_path: Path, model: str) -> None:
    with pytest.raises(UsageError, match="unknown model 'nope': give a hub id") as refused:
        main([f"model={model}", f"store={tmp_path}", "port=0", "engine.device=cpu"], Console())
    assert "\n" not in str(refused.value) and str(refused.value).startswith(f"model={model}: ")


def test_models_go_by_their_names() -> None:
    assert model_names("qwen3-8b,./here") == ["Qwen/Qwen3-8B", "./here"]
    assert parse(["model=./a", "engine.device=cpu", "limits.body_mb=3"]).limits.body_mb == 3


@contextlib.contextmanager
def process(store: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`cook serve` as people start it."""
    words = [f"model={MODEL}", f"store={store}", "port=0", "engine.device=cpu", "engine.dtype=float32"]
    command = [sys.executable, "-m", "cookbook.cli", "serve", *words]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            url = line.split(" at ")[1].split(",")[0]
            for _ in range(600):
                with contextlib.suppress(httpx.ConnectError, httpx.ReadTimeout):
                    if httpx.get(f"{url}/api/v1/healthz", timeout=1).status_code == 200:
                        break
                time.sleep(0.1)
            yield url, started
        finally:
            started.kill()


@pytest.mark.slow  # two starts of a process
def test_after_kill_9_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    with process(tmp_path) as (url, running):
        wire = Wire(url)
        session = wire.session()
        model = wire.model(session)
        wire.post("/forward_backward", gradient(model, 1))
        wire.post("/optim_step", {"model_id": model, "seq_id": 2, "adam_params": {}})
        promise = wire.save(model, 3, "kept")
        path = wire.result(promise)["path"]
        base = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
        sampler = wire.post("/create_sampling_session", base)["sampling_session_id"]
        lost = wire.post("/forward_backward", gradient(model, 4))
        running.send_signal(signal.SIGKILL)
        running.wait()
    half = tmp_path / model / "weights" / ".half.abc"
    half.mkdir()
    (half / "state.json").write_text("{")
    with process(tmp_path) as (url, running):
        wire = Wire(url)
        assert wire.result(promise)["path"] == path
        wire.result(lost, 410)
        detail = wire.post("/forward_backward", gradient(model, 5), 404)["detail"]
        assert f"go on from its last checkpoint, {path}" in detail
        assert not half.exists()
        body = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True}
        assert wire.result(wire.post("/load_weights", body))["model_id"] == f"{session}:train:1"
        sample = {"sampling_session_id": sampler, "seq_id": 0, "num_samples": 1, "sampling_params": {"max_tokens": 2}}
        sample["prompt"] = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
        assert len(wire.post("/asample", sample)["sample_sequence_ids"]) == 1
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) in (0, -signal.SIGTERM)
