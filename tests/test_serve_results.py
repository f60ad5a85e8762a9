"""Results that wait to be read: what is kept of them and for how long, and one poll for all samples of a client."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from cookbook.serving.futures import KEEP_READ_SECONDS
from cookbook.serving.results import Result, Results
from tests.live_server import MODEL, serving
from tests.wire import Wire, gradient, request

pytestmark = pytest.mark.usefixtures("one_thread")


def result(size: int) -> Result:
    return Result(bytes(size))


def kept(results: list[Result]) -> list[bool]:
    return [one.body is not None for one in results]


# ---- how much is kept


def test_what_was_read_goes_first_then_the_oldest() -> None:
    results, ours = Results(100), [result(30) for _ in range(5)]
    for one in ours[:3]:
        results.add("alice", one)
    results.note_read("alice", ours[1])
    results.add("alice", ours[3])
    assert kept(ours[:4]) == [True, False, True, True] and results.size == 90
    results.add("alice", ours[4])
    assert kept(ours) == [False, False, True, True, True]


def test_whoever_keeps_most_loses_first() -> None:
    results, hers, his = Results(100), [result(20) for _ in range(4)], result(20)
    results.add("bob", his)
    for one in hers[:4]:
        results.add("alice", one)
    results.add("bob", result(20))
    assert kept([his, *hers]) == [True, False, True, True, True]


def test_a_result_that_somebody_waits_for_stays_and_so_does_the_newest() -> None:
    results, awaited, newest = Results(100), result(80), result(300)
    awaited.waiting = 1
    results.add("alice", awaited)
    results.add("alice", newest)
    assert kept([awaited, newest]) == [True, True]
    awaited.waiting = 0
    results.note_read("alice", newest)  # alone it is too large: it goes as soon as it has gone out
    assert kept([awaited, newest]) == [True, False] and results.size == 80


def test_results_over_the_limit_are_gone_and_nothing_runs_twice(tmp_path: Path) -> None:
    from tests.tiny import data

    with serving(tmp_path, results_mb=1) as (url, server):
        wire = Wire(url)
        model = wire.model(wire.session())
        save = wire.save(model, 1, "kept")
        path = wire.result(save)["path"]
        batch = data([200] * 16, weights=False)  # 13 KB of logprobs
        promises, bodies = [], []
        for seq_id in range(2, 102):
            bodies.append(request(model, seq_id, batch))
            bodies[-1].forward_only = True
            promises.append(wire.post("/forward_backward", bodies[-1].SerializeToString()))
        wire.output(promises[-1])
        assert (900 << 10) < server.promises.results.size <= 1 << 20
        assert "limits.results_mb" in wire.result(promises[0], 410)["detail"]
        assert wire.post("/forward_backward", bodies[0].SerializeToString()) == promises[0]  # known, and not run again
        wire.output(promises[-2])
        assert wire.result(save)["path"] == path  # of saves the store knows


def test_memory_is_given_back_with_what_is_forgotten(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, server):
        wire = Wire(url)
        model = wire.model(wire.session())
        wire.output(wire.post("/forward_backward", gradient(model, 1)))
        assert server.promises.results.size > 0
        server.promises.forget_old(time.monotonic() + KEEP_READ_SECONDS + 1)
        assert server.promises.results.size == 0


def test_an_operation_whose_result_is_forgotten_does_not_run_again(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, server):
        wire = Wire(url)
        model = wire.model(wire.session())
        trainer = server.runs[model].trainer
        assert trainer is not None
        promises = [wire.post("/forward_backward", gradient(model, 1)), wire.step(model, 2)]
        wire.output(promises[0])
        wire.result(promises[1])
        server.promises.forget_old(time.monotonic() + KEEP_READ_SECONDS + 1)
        assert [wire.post("/forward_backward", gradient(model, 1)), wire.step(model, 2)] == promises
        for promise in promises:
            assert "it was kept long enough" in wire.result(promise, 410)["detail"]
        assert "sent before with another content" in wire.post("/forward_backward", gradient(model, 1, token=6), 400)["detail"]
        assert trainer.adapter.step == 1 and not trainer.adapter.has_grad
        wire.output(wire.post("/forward_backward", gradient(model, 3)))
        assert trainer.adapter.has_grad


# ---- one poll for all


class Samples:
    """Of one sampling session, by hand."""

    def __init__(self, url: str) -> None:
        self.wire = Wire(url)
        base = {"session_id": self.wire.session(), "sampling_session_seq_id": 0, "base_model": MODEL}
        self.id = self.wire.post("/create_sampling_session", base)["sampling_session_id"]

    def ask(self, seq_id: int, max_tokens: int = 2, **more: object) -> str:
        body = {"sampling_session_id": self.id, "seq_id": seq_id, "num_samples": 1, **more}
        body |= {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}}
        body |= {"sampling_params": {"max_tokens": max_tokens, "stop": []}}
        return self.wire.post("/asample", body)["request_id"]

    def poll(self, cursor: int, clone: int = 0, status: int = 200, **more: object) -> dict:
        target = {"type": "sampling_session", "sampling_session_id": self.id, "cloned_sampler_id": clone}
        return self.wire.post("/retrieve_futures", {"target": target, "prev_cursor": cursor, **more}, status)


def test_what_has_finished_is_told_once_and_in_order(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, server):
        samples = Samples(url)
        start = time.monotonic()
        empty = samples.poll(0, timeout=0)
        assert empty["completions"] == [] and time.monotonic() - start < 2
        first = samples.ask(0)
        reply = samples.poll(empty["cursor"])
        (one,) = reply["completions"]
        fetched = samples.wire.http.post("/retrieve_future", json={"request_id": first})
        assert one == {
            "state": "finished", "request_id": first, "response_payload_uncompressed_size": len(fetched.content)
        }  # fmt: skip
        assert samples.poll(empty["cursor"], timeout=0) == reply  # an answer that was lost
        wrong, clone = samples.ask(1, target_prompt_logprobs={"data": "x"}), samples.ask(7 * 10**9)
        reply = samples.poll(reply["cursor"], retrieved_request_ids=[first])
        assert reply["completions"] == [{"state": "failed", "request_id": wrong}]
        assert [one["request_id"] for one in samples.poll(0, clone=7)["completions"]] == [clone]
        samples.wire.result({"request_id": first}, 410)  # acknowledged
        before = samples.poll(1, status=410)["detail"]
        assert "the server was restarted" in before
        samples.wire.post("/cancel_future", {"request_id": samples.ask(2, max_tokens=400)})
        assert [one["state"] for one in samples.poll(reply["cursor"])["completions"]] == ["failed"]
        assert all(group.polls == 0 for group in server.promises.completions._groups.values())


def test_the_sdk_polls_once_for_all_of_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tinker", reason="the tinker SDK is not installed (uv sync --group serving)")
    import tinker
    from tinker import types

    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with serving(tmp_path) as (url, server):
        server.poll_together = True
        with tinker.ServiceClient(base_url=url, api_key="tml-x") as service:
            client = service.create_sampling_client(base_model=MODEL).result()
            prompt, params = types.ModelInput.from_ints([1, 2, 3]), types.SamplingParams(max_tokens=5, seed=1, stop=[])
            asked = [client.sample(prompt, 2, params) for _ in range(40)]
            replies = [one.result(60) for one in asked]
            assert {tuple(tuple(s.tokens) for s in reply.sequences) for reply in replies} == {
                tuple(tuple(s.tokens) for s in replies[0].sequences)
            }
            with pytest.raises(tinker.TinkerError, match="max_tokens"):
                client.sample(prompt, 1, types.SamplingParams(max_tokens=10**6)).result(60)
            assert len(client.sample(prompt, 1, params).result(60).sequences) == 1
            deadline = time.monotonic() + 20
            while server.promises.results.size > 3000 and time.monotonic() < deadline:
                time.sleep(0.1)  # they are acknowledged with the next poll
            assert server.promises.results.size <= 3000
        figures = server.meter.requests.collect()
        polls = {
            s.labels["endpoint"]: s.value for family in figures for s in family.samples
            if s.name == "cook_request_seconds_count" and s.labels["status"] == "200"
        }  # fmt: skip
        assert 1 <= polls["/api/v1/retrieve_futures"] < 60
        assert polls["/api/v1/retrieve_future"] <= 45  # each is fetched once
