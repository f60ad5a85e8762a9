"""Well-formed requests that ask for what cannot be: each is answered by name, and a neighbour's losses stay what they are."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import torch

from core import Datum
from tests.company import Company, company, settled
from tests.live_server import MODEL
from tests.tiny import VOCAB, data, tiny_model_dir
from tests.wire import Wire, gradient, request

pytestmark = pytest.mark.usefixtures("one_thread")
OTHER_MODEL = str(tiny_model_dir("qwen2"))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    with company(tmp_path_factory.mktemp("store"), [MODEL, OTHER_MODEL], training_clients=4) as found:
        yield found


@pytest.fixture(scope="module")
def wire(live: Company) -> Wire:
    return live.wire()


@pytest.fixture
def session(wire: Wire) -> Iterator[str]:
    made = wire.session()
    yield made
    wire.post(f"/sessions/{made}/finish", {})


@pytest.fixture
def model(wire: Wire, session: str) -> str:
    return wire.model(session)


def forward_backward(wire: Wire, model: str, seq_id: int, batch: list[Datum], loss_fn: str = "cross_entropy") -> dict:
    return wire.post("/forward_backward", request(model, seq_id, batch, loss_fn).SerializeToString())


def refused(wire: Wire, promise: dict) -> str:
    """The error of an operation that failed by its sender's fault."""
    found = settled(wire, promise)
    assert found.get("category") == "user", found
    return found["error"]


# ---- numbers of operations


def test_gaps_hold_nothing_up_and_numbers_may_come_in_any_order(wire: Wire, model: str) -> None:
    batch = data([12, 7])
    loss = wire.output(forward_backward(wire, model, 40, batch)).metrics["loss:sum"]
    for seq_id in (12, 11, 900, 13, 1):  # as the chunks of one call do, which the SDK may send concurrently, the first last
        assert wire.output(forward_backward(wire, model, seq_id, batch)).metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    sixfold = settled(wire, wire.step(model, 1000, learning_rate=0.0))["metrics"]["grad_norm:mean"]
    forward_backward(wire, model, 1001, batch)
    assert settled(wire, wire.step(model, 1002))["metrics"]["grad_norm:mean"] == pytest.approx(sixfold / 6, rel=1e-4)


def test_a_number_sent_again_runs_once_also_when_its_result_was_read(wire: Wire, model: str) -> None:
    first = wire.post("/forward_backward", gradient(model, 1))
    once = settled(wire, wire.step(model, 2, learning_rate=0.0))
    assert [wire.post("/forward_backward", gradient(model, 1)) for _ in range(3)] == [first] * 3
    assert "without a gradient" in refused(wire, wire.step(model, 3))
    assert settled(wire, wire.step(model, 2, learning_rate=0.0)) == once
    other = wire.post("/optim_step", {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 1.0}}, 400)
    assert f"{model}:2 was sent before with another content" in other["detail"]


def test_two_programs_with_one_client_id_are_told(live: Company, wire: Wire, model: str) -> None:
    """The second one repeats numbers: what is equal runs once, what differs is refused."""
    twin = live.wire()
    assert forward_backward(twin, model, 1, data([8])) == forward_backward(wire, model, 1, data([8]))
    body = request(model, 1, data([9])).SerializeToString()
    assert "was sent before with another content" in twin.post("/forward_backward", body, 400)["detail"]
    session = model.split(":", 1)[0]
    again = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 3}}
    assert "was sent before with another content" in twin.post("/create_model", again, 400)["detail"]
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    assert wire.post("/create_sampling_session", sampling) == twin.post("/create_sampling_session", sampling)
    assert "exists already, of" in twin.post("/create_sampling_session", {**sampling, "base_model": OTHER_MODEL}, 400)["detail"]


def test_a_number_below_0_is_refused(wire: Wire, model: str) -> None:
    assert wire.post("/forward_backward", gradient(model, -1), 400)["detail"] == "seq_id is -1, expected 0 or more"


# ---- clients that go away


def abandoned(live: Company, path: str, body: bytes, sent: int | None = None) -> None:
    """A request whose client hangs up before it is answered, or before its body is whole."""
    host, port = live.url.removeprefix("http://").split(":")
    head = f"POST /api/v1{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {live.keys['mallory']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + body[:sent])
        time.sleep(0.01)


def test_a_result_waits_for_a_client_that_left_while_polling(live: Company, wire: Wire, model: str) -> None:
    promises = [forward_backward(wire, model, seq_id, data([200] * 20)) for seq_id in range(1, 6)]
    for promise in promises * 4:
        abandoned(live, "/retrieve_future", json.dumps({"request_id": promise["request_id"]}).encode())
    losses = [wire.output(promise).metrics["loss:sum"] for promise in promises]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)


def test_half_a_body_is_no_operation(live: Company, wire: Wire, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole = request(model, 1, data([30] * 10)).SerializeToString()
    for _ in range(10):
        abandoned(live, "/forward_backward", whole, len(whole) // 2)
        abandoned(live, "/create_session", b'{"tags": ["a"]}', 5)
    time.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err
    assert "without a gradient" in refused(wire, wire.step(model, 2))
    assert wire.output(wire.post("/forward_backward", whole)).metrics["loss:sum"] > 0


def test_a_program_that_ended_without_a_word_makes_room(live: Company) -> None:
    wire = live.wire()
    sessions = [wire.session() for _ in range(5)]
    runs = [wire.model(session) for session in sessions[:4]]
    body = {"session_id": sessions[4], "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 2}}
    assert "limits.training_clients" in wire.post("/create_model", body, 429)["detail"]
    long_ago = time.time() - 3600
    for table, key, values in (("sessions", "id", sessions[:3]), ("runs", "session", sessions[:2])):
        for value in values:  # the third one's client sends no heartbeats, but operations
            live.server.store.run_sql(f"UPDATE {table} SET seen = ? WHERE {key} = ?", long_ago, value)
    wire.model(sessions[4])
    assert [run in live.server.runs for run in runs] == [False, False, True, True]
    assert "its session is over" in wire.post("/forward_backward", gradient(runs[0], 1), 404)["detail"]
    for session in sessions[2:]:
        wire.post(f"/sessions/{session}/finish", {})


# ---- numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("loss_fn", "key"), [("cross_entropy", "weights"), ("ppo", "advantages"), ("cispo", "logprobs")])
def test_inputs_that_are_not_finite_are_named(wire: Wire, model: str, loss_fn: str, key: str, value: float) -> None:
    bad = data([8, 6], loss_fn=loss_fn)
    torch.as_tensor(bad[1].loss_fn_inputs[key])[4] = value
    said = refused(wire, forward_backward(wire, model, 1, bad, loss_fn))
    assert said == f"data[1].loss_fn_inputs['{key}'] is not finite at position 4"
    assert "without a gradient" in refused(wire, wire.step(model, 2))


def test_steps_that_are_not_finite_are_named(wire: Wire, model: str) -> None:
    for text in ("NaN", "Infinity", "1e999"):
        body = f'{{"model_id": "{model}", "seq_id": 1, "adam_params": {{"learning_rate": {text}}}}}'
        reply = wire.http.post("/optim_step", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 422 and "adam_params.learning_rate" in reply.json()["detail"]


def test_steps_that_would_spoil_the_weights_are_their_owners_fault(wire: Wire, model: str) -> None:
    forward_backward(wire, model, 1, data([8]))
    assert refused(wire, wire.step(model, 2, eps=0)) == "eps is 0.0, expected a number above 0 (in fp32)"
    assert refused(wire, wire.step(model, 3, weight_decay=-0.1)) == "weight_decay is -0.1, expected a number from 0 on"
    assert wire.result(wire.step(model, 4))["metrics"]["grad_norm:mean"] > 0


def test_a_sum_that_is_not_finite_is_reported_and_never_taken_a_step_with(wire: Wire, model: str) -> None:
    large = data([8])
    torch.as_tensor(large[0].loss_fn_inputs["weights"])[:] = 1e38
    assert wire.output(forward_backward(wire, model, 1, large)).metrics["loss:sum"] == float("inf")
    assert "the gradient of optimizer step 1 is not finite" in refused(wire, wire.step(model, 2))
    forward_backward(wire, model, 3, data([8]))
    assert "error" not in settled(wire, wire.step(model, 4))


def test_weights_that_diverge_are_their_owners_fault(wire: Wire, session: str, model: str) -> None:
    forward_backward(wire, model, 1, data([8]))
    settled(wire, wire.step(model, 2, learning_rate=1e30))
    settled(wire, forward_backward(wire, model, 3, data([8])))
    assert "is not finite" in refused(wire, wire.step(model, 4))
    body = {"model_id": model, "seq_id": 5, "sampling_session_seq_id": 0}
    sampler = settled(wire, wire.post("/save_weights_for_sampler", body))["sampling_session_id"]
    assert "the adapter has diverged" in refused(wire, sample(wire, sampler))


# ---- tokens and samples


def sample(wire: Wire, sampler: str, tokens: list[Any] | None = None, seq_id: int = 0, **more: object) -> dict:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3] if tokens is None else tokens}]}
    body = {"sampling_session_id": sampler, "seq_id": seq_id, "prompt": prompt, "sampling_params": {"max_tokens": 2}}
    return wire.post("/asample", {**body, **more})


@pytest.mark.parametrize("token", [VOCAB, -1, 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_named(wire: Wire, model: str, token: int) -> None:
    message = request(model, 1, data([3]))
    message.data[0].model_input[0].encoded_text.tokens = torch.tensor([5, token, 5], dtype=torch.int32).numpy().tobytes()
    said = refused(wire, wire.post("/forward_backward", message.SerializeToString()))
    assert said == f"data[0].model_input has token {token}, outside the vocabulary of {VOCAB}"
    bad = data([3])
    torch.as_tensor(bad[0].loss_fn_inputs["target_tokens"])[1] = token
    said = refused(wire, forward_backward(wire, model, 2, bad))
    assert said == f"data[0].loss_fn_inputs['target_tokens'] has token {token}, outside the vocabulary of {VOCAB}"


SAMPLES: list[tuple[dict[str, Any], str]] = [
    ({"tokens": [1, VOCAB]}, f"the prompt has token {VOCAB}, outside the vocabulary"),
    ({"tokens": [1 << 80]}, "outside the vocabulary"),
    ({"tokens": ["a"]}, "are not a list of whole numbers"),
    ({"tokens": []}, "the prompt is empty"),
    ({"tokens": [1] * 2000}, "the prompt has 2000 tokens, the model's context is 1024"),
    ({"prompt": {}}, "the prompt has no list of chunks"),
    ({"prompt": {"chunks": 5}}, "the prompt has no list of chunks"),
    ({"prompt": {"chunks": [{"type": "image", "data": ""}]}}, "a chunk of type 'image'"),
    ({"sampling_params": {"max_tokens": 10**9}}, "the model's context is 1024"),
    ({"sampling_params": {"max_tokens": 0}}, "max_tokens=0"),
    ({"sampling_params": {"max_tokens": 2, "temperature": -1}}, "temperature is -1.0"),
    ({"sampling_params": {"max_tokens": 2, "top_p": 0}}, "top_p is 0.0"),
    ({"sampling_params": {"max_tokens": 2, "top_k": 0}}, "top_k is 0"),
    ({"sampling_params": {"max_tokens": 2, "stop": [""]}}, "none empty"),
    ({"topk_prompt_logprobs": 10**12}, "topk_prompt_logprobs asks for 3,000,000,000,000 numbers"),
    ({"topk_sample_logprobs": 10**12}, "topk_sample_logprobs asks for"),
    ({"target_prompt_logprobs": {"dtype": ["int64"], "data": [1, 2]}}, "target_prompt_logprobs has dtype"),
    ({"target_prompt_logprobs": {"dtype": "int64", "data": [1], "shape": [1 << 40]}}, "target_prompt_logprobs asks for"),
    ({"target_prompt_logprobs": {"dtype": "int64", "data": [[1], [2, 3]]}}, "target_prompt_logprobs is no tensor"),
    ({"target_prompt_logprobs": {"dtype": "int64", "data": [1, 1.5, 2]}}, "is no tensor: expected whole numbers"),
    ({"target_prompt_logprobs": {"dtype": "int64", "data": [1 << 70]}}, "target_prompt_logprobs is no tensor"),
    (
        {"target_prompt_logprobs": {"dtype": "int64", "data": [], "sparse_crow_indices": [0] * 3, "shape": [2, 1 << 30]}},
        "target_prompt_logprobs asks for",
    ),
]


@pytest.mark.parametrize(("asked", "message"), SAMPLES)
def test_samples_that_cannot_be_are_named(wire: Wire, session: str, asked: dict[str, Any], message: str) -> None:
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = wire.post("/create_sampling_session", body)["sampling_session_id"]
    assert message in refused(wire, sample(wire, sampler, **asked))
    assert settled(wire, sample(wire, sampler, seq_id=1, sampling_params={"max_tokens": 2, "top_k": 1 << 70, "seed": -1})) == {}


# ---- checkpoints of others


def test_a_checkpoint_of_another_model_or_rank_is_refused_by_its_name(live: Company, wire: Wire, session: str) -> None:
    ours, other = wire.model(session, 0), wire.model(session, 1, base_model=OTHER_MODEL)
    path = settled(wire, wire.save(other, 1, "theirs"))["path"]
    load = {"model_id": ours, "seq_id": 1, "path": path, "optimizer": True}
    said = refused(wire, wire.post("/load_weights", load))
    assert said.startswith(f"checkpoint {path} was trained on {OTHER_MODEL}") and f"this engine holds {MODEL}" in said
    larger = wire.model(session, 2, rank=8)
    said = refused(
        wire, wire.post("/load_weights", {**load, "model_id": larger, "path": settled(wire, wire.save(ours, 2, "a"))["path"]})
    )
    assert "holds LoraConfig(rank=2" in said and "this client has LoraConfig(rank=8" in said
    assert str(live.server.store.directory) not in said
    assert wire.output(wire.post("/forward_backward", gradient(ours, 3))).metrics["loss:sum"] > 0  # each goes on as it was
    named = settled(wire, wire.post("/save_weights_for_sampler", {"model_id": ours, "seq_id": 4, "path": "s"}))["path"]
    whole = {"session_id": session, "model_seq_id": 3, "path": named, "optimizer": True}
    said = refused(wire, wire.post("/load_weights", whole))
    assert f"checkpoint {named} is for sampling, without the optimizer's moments: load its weights alone" in said
    wire.model(session, 4)  # what failed holds no room: limits.training_clients is 4
