"""Sessions over Tinker's REST calls, by the real SDK and its command: search, projects, traces; and the key that one has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

pytest.importorskip("tinker", reason="the tinker SDK is not installed (uv sync --group serving)")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import tinker
from tinker import types

from cookbook.serving import keys
from cookbook.serving.server import Server
from cookbook.serving.store import Store
from tests.live_server import MODEL, serving
from tests.wire import Wire, gradient

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:RestClient.search_sessions is experimental"),
]
KEY = "tml-anything"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TINKER_TELEMETRY", "0")
        with serving(tmp_path_factory.mktemp("store")) as found:
            yield found


@pytest.fixture(scope="module")
def url(live: tuple[str, Server]) -> str:
    return live[0]


@pytest.fixture(scope="module")
def rest(url: str) -> tinker.RestClient:
    return tinker.RestClient(base_url=url, api_key=KEY)


@pytest.fixture(scope="module")
def model(url: str) -> str:
    """A training run after two operations, a save and a sample."""
    wire = Wire(url)
    session = wire.session()
    model = wire.model(session)
    wire.output(wire.post("/forward_backward", gradient(model, 1)))
    wire.result(wire.step(model, 2))
    wire.result(wire.save(model, 3, "kept"))
    base = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = wire.post("/create_sampling_session", base)["sampling_session_id"]
    sample = {"sampling_session_id": sampler, "seq_id": 0, "num_samples": 1, "sampling_params": {"max_tokens": 2}}
    sample["prompt"] = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    promise = wire.post("/asample", sample)
    assert wire.http.post("/retrieve_future", json={"request_id": promise["request_id"]}).status_code == 200
    return model


# ---- traces


def test_a_trace_has_an_event_for_each_operation_and_needs_no_key(rest: tinker.RestClient, model: str) -> None:
    session = model.split(":")[0]
    link = rest.export_session_trace(session).result(20)
    with urllib.request.urlopen(link) as reply:
        assert int(reply.headers["Content-Length"]) > 0
        events = json.load(reply)["traceEvents"]
    done = [one for one in events if one["ph"] == "X"]
    assert [one["name"] for one in done] == ["forward_backward", "optim_step", "save", "sample"]
    assert [one["args"]["model_id"] for one in done] == [model] * 3 + [f"{session}:sample:0"]
    assert all(one["dur"] > 0 and one["args"]["waited_ms"] >= 0 for one in done)
    for earlier, later in pairwise(done):
        assert earlier["ts"] + earlier["dur"] <= later["ts"] + 1
    names = {one["tid"]: one["args"]["name"] for one in events if one["ph"] == "M"}
    assert [names[one["tid"]] for one in done] == [one["args"]["model_id"] for one in done]


def test_a_trace_is_for_whoever_has_its_link(live: tuple[str, Server], rest: tinker.RestClient, model: str) -> None:
    link = rest.export_session_trace(model.split(":")[0]).result(20)
    other = Wire(live[0]).session()
    for wrong in (link[:-1] + ("0" if link[-1] != "0" else "1"), link.replace("expires=1", "expires=2"),
                  link.replace(model.split(":")[0], other), link.split("?")[0]):  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(wrong)
        assert refused.value.code in (403, 422)


def test_a_session_in_which_nothing_ran_has_no_trace(rest: tinker.RestClient, url: str) -> None:
    session = Wire(url).session()
    with pytest.raises(RuntimeError, match=f"no operation of session {session} has ended"):
        rest.export_session_trace(session).result(20)
    with pytest.raises(tinker.NotFoundError):
        rest.export_session_trace("nothing").result(20)


def test_operations_at_the_same_time_lie_below_each_other(tmp_path: Path) -> None:
    from cookbook.serving.traces import Traces

    rows = [("a", 0.0, 2.0), ("a", 1.0, 2.0), ("b", 1.5, 1.0), ("a", 2.5, 1.0)]
    text = "".join(json.dumps({"kind": "sample", "of": of, "start": s, "waited": 0.0, "ran": r}) + "\n" for of, s, r in rows)
    (tmp_path / "s.jsonl").write_text(text + '{"kind": "sam')  # the end of a file that a crash has cut
    events = json.loads(Traces(tmp_path).chrome("s"))["traceEvents"]
    assert [one["tid"] for one in events if one["ph"] == "X"] == [1, 2, 3, 1]


@pytest.mark.slow  # a process of torch's size
def test_the_command_downloads_a_trace(url: str, model: str, tmp_path: Path) -> None:
    session = model.split(":")[0]
    theirs = {"TINKER_BASE_URL": url, "TINKER_API_KEY": KEY, "TINKER_TELEMETRY": "0"}
    words = [sys.executable, "-m", "tinker.cli", "session", "export-trace", session, "-o", str(tmp_path / "t.json")]
    done = subprocess.run(words, env={**os.environ, **theirs}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) > 4


# ---- projects


def test_a_session_is_put_into_a_project_and_its_runs_with_it(rest: tinker.RestClient, url: str, model: str) -> None:
    session = model.split(":")[0]

    def runs_of(project: str) -> list[str]:
        return [run.training_run_id for run in rest.list_training_runs(project_id=project).result().training_runs]

    assert runs_of("first") == []
    rest.assign_session_project(session, "first").result()
    assert runs_of("first") == [model]
    rest.assign_session_project(session, "second").result()
    assert (runs_of("first"), runs_of("second")) == ([], [model])
    copied = rest.copy_weights(f"tinker://{model}/weights/kept", destination_project_id="first").result()
    assert [f"tinker://{run}/weights/kept" for run in runs_of("first")] == [copied]
    with pytest.raises(tinker.NotFoundError):
        rest.assign_session_project("nothing", "first").result()
    assert Wire(url).http.put(f"/sessions/{session}/project", json={"project_id": ""}).status_code == 422


def test_a_service_client_names_its_project(rest: tinker.RestClient, url: str) -> None:
    with tinker.ServiceClient(base_url=url, api_key=KEY, project_id="named") as service:
        trainer = service.create_lora_training_client(MODEL, rank=2).result()
        (run,) = rest.list_training_runs(project_id="named").result().training_runs
        assert run.training_run_id == trainer.model_id


# ---- search


def test_sessions_are_found_by_what_they_are(rest: tinker.RestClient, url: str) -> None:
    wire = Wire(url)

    def new(name: str, project: str, **metadata: str) -> str:
        body = {"display_name": name, "project_id": project, "user_metadata": metadata}
        return wire.post("/create_session", body)["session_id"]

    one, two, three = new("Red apple", "fruit", a="1"), new("green Apple", "fruit", a="1", b="2"), new("pear", "pears", a="2")
    wire.post(f"/sessions/{two}/finish", {"reason": {"type": "errored"}})
    model = wire.model(one)
    wire.result(wire.save(model, 1, "kept"))

    def found(**filters: object) -> list[str]:
        page = rest.search_sessions(types.SessionSearchRequest(**filters)).result()  # type: ignore[arg-type]
        return [session.session_id for session in page.sessions if session.session_id in (one, two, three)]

    assert found() == [three, two, one]
    assert found(display_name="APPLE") == [two, one]
    assert found(display_name="apple red") == [one]
    assert found(display_name="apple red", session_id=three) == [three, one]
    assert found(session_id=two) == [two]
    assert found(project_ids=["fruit"]) == [two, one] and found(project_ids=[]) == []
    assert found(user_metadata={"a": "1"}) == [two, one] and found(user_metadata={"a": "1", "b": "2"}) == [two]
    assert found(statuses=[{"type": "active"}]) == [three, one]
    assert found(statuses=[{"type": "client_finished", "reasons": ["success"]}]) == []
    assert found(statuses=[{"type": "client_finished"}, {"type": "failed"}]) == [two]
    assert found(owner={"type": "accessible"}) == found(owner={"type": "user", "owner_urns": ["local"]}) == [three, two, one]
    assert found(owner={"type": "user", "owner_urns": ["somebody"]}) == []
    (session,) = rest.search_sessions(types.SessionSearchRequest(session_id=one)).result().sessions
    assert (session.project_id, session.owner, session.checkpoints_count) == ("fruit", "local", 1)
    assert session.checkpoint_storage_bytes and session.user_metadata == {"a": "1"}
    assert wire.http.post("/sessions/search", json={"name": "x"}).status_code == 422


def test_pages_of_a_search_meet_and_do_not_overlap(rest: tinker.RestClient, url: str) -> None:
    wire = Wire(url)
    made = [wire.post("/create_session", {"display_name": "paged"})["session_id"] for _ in range(5)]
    seen, cursor = [], None
    for size in (2, 2, 1):
        page = rest.search_sessions(types.SessionSearchRequest(display_name="paged", limit=2, cursor=cursor)).result()
        seen += [session.session_id for session in page.sessions]
        cursor = page.next_cursor
        assert len(page.sessions) == size and (cursor is None) == (size == 1)
    assert seen == made[::-1]


# ---- owners and keys


def test_others_sessions_are_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    alice, bob = keys.create(store, "alice"), keys.create(store, "bob")
    store.close()
    with serving(tmp_path) as (url, _):
        a, b = Wire(url, alice), Wire(url, bob)
        session = a.session()
        model = a.model(session)
        a.output(a.post("/forward_backward", gradient(model, 1)))
        assert b.http.get(f"/sessions/{session}/trace_export").status_code == 404
        assert b.http.put(f"/sessions/{session}/project", json={"project_id": "p"}).status_code == 404
        for whose in ({"type": "accessible"}, {"type": "user", "owner_urns": ["alice"]}):
            assert b.post("/sessions/search", {"owner": whose})["sessions"] == []
        link = a.http.get(f"/sessions/{session}/trace_export").json()["url"]
        assert httpx.get(link).status_code == 200  # without a key


def test_a_key_tells_whose_it_is_and_revokes_itself(tmp_path: Path) -> None:
    from tinker.cli.auth_api import AuthApiError, TinkerAuthApi

    store = Store(tmp_path)
    key, other = keys.create(store, "alice"), keys.create(store, "alice")
    store.close()
    with serving(tmp_path) as (url, _), httpx.Client() as http:
        api = TinkerAuthApi(http, base_url=url)
        found = api.get_self_api_key(key)
        assert found.name == key.split("-")[1] == f"{found.key_id:08x}" and found.details.user_details.email == "alice"
        api.delete_self_api_key(key)
        with pytest.raises(AuthApiError, match="no valid API key"):
            api.get_self_api_key(key)
        assert api.get_self_api_key(other).name == other.split("-")[1]


def test_a_server_without_keys_has_one_owner(url: str) -> None:
    from tinker.cli.auth_api import TinkerAuthApi

    with httpx.Client() as http:
        api = TinkerAuthApi(http, base_url=url)
        api.delete_self_api_key(KEY)
        assert api.get_self_api_key(KEY).name == "local"
