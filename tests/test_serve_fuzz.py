"""Requests by chance: the server refuses them or runs them, without 5xx or hang, and stays small."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import zstandard

from core import Datum
from tests.company import ANSWER_SECONDS, Company, company, settled
from tests.live_server import MODEL
from tests.tiny import data
from tests.wire import Wire, gradient, request

pytestmark = pytest.mark.usefixtures("one_thread")
BODY_MB = 4
HUGE = 1 << 62
ZSTD = {"Content-Encoding": "zstd"}
KINDS = ["application/json", "text/plain", "multipart/form-data; boundary=x", "application/x-protobuf", ""]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    with company(tmp_path_factory.mktemp("store"), body_mb=BODY_MB, num_samples=4, samples=16, queued=1000) as found:
        yield found


@pytest.fixture(scope="module")
def wire(live: Company) -> Wire:
    return live.wire()


@pytest.fixture
def model(wire: Wire) -> Iterator[str]:
    session = wire.session()
    yield wire.model(session)
    wire.post(f"/sessions/{session}/finish", {})


def peak_mb() -> float:
    """The most memory that this process, the server in it, has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- bytes


def mutated(body: bytes, chance: random.Random) -> bytes:
    """`body` with a few bits flipped, bytes cut out, doubled or put in, or its end cut off."""
    changed = bytearray(body)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(changed) + 1), chance.randint(1, 8)
        match chance.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                changed[at:at] = chance.randbytes(length)
            case _:
                del changed[max(1, at) :]
    return bytes(changed)


def bent(message: Any, chance: random.Random) -> bytes:
    """A field of a well-formed message made nonsense."""
    datum = chance.choice(message.data)
    key = chance.choice(sorted(datum.loss_fn_inputs))
    tensor, text = datum.loss_fn_inputs[key], datum.model_input[0].encoded_text
    match chance.randrange(10):
        case 0:
            text.tokens = mutated(text.tokens, chance)
        case 1 | 2:
            tensor.dense = mutated(tensor.dense, chance)
        case 3:
            tensor.dtype = chance.randrange(-1, 7)
        case 4:
            tensor.shape[:] = [chance.choice([-1, 0, 1, 3, 6, HUGE]) for _ in range(chance.randrange(4))]
        case 5:
            datum.loss_fn_inputs["\N{SNOWMAN}"].CopyFrom(tensor)
            del datum.loss_fn_inputs[key]
        case 6:
            message.loss_fn_config_v2["beta"].number = chance.choice([float("nan"), float("inf"), -1.0])
        case 7:
            tensor.sparse_csr.values, tensor.sparse_csr.crow_indices = tensor.dense, mutated(bytes(56), chance)
        case 8:
            datum.model_input.add().image.data = b"GIF"
        case _:
            message.loss_fn = chance.choice(["", "crossentropy", "custom", "x" * 10_000])
    return message.SerializeToString()


def test_mutated_messages_are_refused_or_run(wire: Wire, model: str) -> None:
    chance, promises, refused = random.Random(0), [], 0
    for seq_id in range(1, 401):
        loss_fn = chance.choice(["cross_entropy", "ppo", "gspo"])
        message = request(model, seq_id, data([6, 3], seed=seq_id, loss_fn=loss_fn), loss_fn)
        body = bent(message, chance) if chance.random() < 0.6 else mutated(message.SerializeToString(), chance)
        packed = chance.random() < 0.3
        reply = wire.http.post(
            "/forward_backward", content=zstandard.compress(body) if packed else body, headers=ZSTD if packed else {}
        )
        assert reply.status_code in (200, 400, 404), reply.text
        if reply.status_code == 200:
            promises.append(reply.json())
        else:
            refused += 1
            assert reply.json()["detail"]
    failed = [found["error"] for promise in promises if "error" in (found := settled(wire, promise))]
    assert refused > 50 and len(failed) > 50 and len(promises) > len(failed)


def test_mutated_frames_are_refused(wire: Wire, model: str) -> None:
    chance = random.Random(1)
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(gradient(model, 1) * 50)
    for _ in range(200):
        changed = mutated(packed, chance)
        if changed != packed:
            reply = wire.http.post("/forward_backward", content=changed, headers=ZSTD)
            assert reply.status_code in (400, 413), reply.text


@pytest.mark.parametrize("content_size", [True, False])
def test_a_frame_that_is_cut_off_is_not_half_a_request(content_size: bool, wire: Wire, model: str) -> None:
    whole = request(model, 1, data([30] * 40)).SerializeToString()
    packed = zstandard.ZstdCompressor(write_content_size=content_size).compress(whole)
    for kept in (0, 1, 4, len(packed) // 3, len(packed) // 2, len(packed) - 1):
        assert "zstd" in wire.post("/forward_backward", packed[:kept], 400, **ZSTD)["detail"]
    assert "zstd" in wire.post("/forward_backward", packed + b"more", 400, **ZSTD)["detail"]
    assert settled(wire, wire.post("/forward_backward", packed, **ZSTD)) == {}


def zeros(megabytes: int, **options: Any) -> bytes:
    packer = zstandard.ZstdCompressor(**options).compressobj()
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def test_frames_of_more_than_the_limit_take_no_room(wire: Wire) -> None:
    window = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    bomb = zeros(2000)
    assert len(bomb) < 1 << 20
    before = peak_mb()
    for frame in (bomb, bomb * 3, zeros(400, level=19)):
        assert "limits.body_mb" in wire.post("/forward_backward", frame, 413, **ZSTD)["detail"]
    for frame in (zeros(8, compression_params=window), zstandard.compress(bomb)):  # a frame in a frame is no message
        wire.post("/forward_backward", frame, 400, **ZSTD)
    assert peak_mb() - before < 250


def test_tensors_of_absurd_shapes_take_no_room(wire: Wire, model: str) -> None:
    messages = []
    for shape in ([HUGE], [HUGE, HUGE], [-1], [6, 0], [0], [2, 2, 2], [6, 1 << 26], [1 << 26, 6], [6, 1 << 23]):
        messages += [shaped(model, [6], shape, sparse) for sparse in (False, True)]
    messages.append(shaped(model, [6] * 200, [6, 1 << 20], sparse=True))  # 25 MB each once spread out: 5 GB
    before = peak_mb()
    for seq_id, message in enumerate(messages, start=1):
        message.seq_id = seq_id
        found = settled(wire, wire.post("/forward_backward", message.SerializeToString()))
        assert "loss_fn_inputs['weights']" in found["error"] or "(limits.body_mb)" in found["error"]
    assert peak_mb() - before < 700


def shaped(model: str, lengths: list[int], shape: list[int], sparse: bool) -> Any:
    """A request whose weights say that they have `shape`."""
    message = request(model, 0, data(lengths))
    for datum in message.data:
        weights = datum.loss_fn_inputs["weights"]
        if sparse:
            weights.sparse_csr.crow_indices = bytes(8 * 7)
        del weights.shape[:]
        weights.shape.extend(shape)
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_bodies_of_the_wrong_kind_are_refused(kind: str, wire: Wire) -> None:
    for path in ("/forward_backward", "/asample", "/optim_step", "/retrieve_future", "/sessions/x/finish"):
        for body in (b"", b"\xff\xfe", b"{", b"[]", b"null", b'"x"', b"--x--", b"1e999", b'{"a":' * 50_000, b'{"\\ud800": 1}'):
            reply = wire.http.post(path, content=body, headers={"Content-Type": kind})
            assert reply.status_code in (400, 404, 422), (path, body[:20], reply.status_code, reply.text)
            assert reply.json()
    assert wire.http.post("/forward_backward", content=b"x", headers={"Content-Encoding": "gzip"}).status_code == 415


def test_lone_surrogates_are_refused_in_every_json_body(live: Company, wire: Wire) -> None:
    """One that came in would stay: each search of its owner's sessions would meet it again."""
    paths = wire.http.get(f"{live.url}/openapi.json").json()["paths"]
    places = [(method, path) for path in paths for method, about in paths[path].items() if "requestBody" in about]
    for method, path in places:
        for body in (b'{"a": "\\ud800"}', b'{"\\ud800": 1}', b'{"a": "\xed\xa0\x80"}'):
            reply = wire.http.request(method, f"{live.url}{path}", content=body, headers={"Content-Type": "application/json"})
            assert reply.status_code == 400 and "without lone surrogates" in reply.text, (path, reply.text)
    assert len(places) > 20


# ---- connections


def raw(company: Company, path: str, headers: str, *pieces: bytes) -> bytes:
    """The answer to what no HTTP library would send; b"" if the connection is closed on us."""
    host, port = company.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {company.keys['mallory']}\r\n{headers}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS) as connection:
        connection.sendall(head.encode())
        try:
            for piece in pieces:
                connection.sendall(piece)
        except ConnectionError:
            pass  # the answer may have come before
        return connection.recv(1 << 16)


@pytest.mark.parametrize("path", ["/api/v1/forward_backward", "/api/v1/create_session", "/v1/completions"])
def test_a_body_that_is_too_long_is_refused_before_it_is_read(path: str, live: Company) -> None:
    announced = raw(live, path, f"Content-Type: application/json\r\nContent-Length: {1 << 40}")
    assert announced.startswith(b"HTTP/1.1 413") and b"limits.body_mb" in announced
    chunk = b"%x\r\n" % (1 << 16) + b" " * (1 << 16) + b"\r\n"
    chunks = [chunk] * (17 * BODY_MB)
    assert b"HTTP/1.1 413" in raw(live, path, "Content-Type: application/json\r\nTransfer-Encoding: chunked", *chunks)


def test_memory_does_not_grow_with_what_is_refused(wire: Wire, model: str) -> None:
    bad = request(model, 0, [Datum(one.model_input, {}) for one in data([300] * 50)])
    wire.http.headers["Connection"] = "close"
    peaks = []
    for seq_id in range(1, 301):
        bad.seq_id = seq_id
        wire.post("/forward_backward", bad.SerializeToString())
        wire.http.post("/forward_backward", content=bytes(3 << 20))
        wire.http.post("/asample", json={"sampling_session_id": "x" * 100_000, "seq_id": seq_id, "prompt": {}})
        if seq_id % 100 == 0:
            time.sleep(0.2)
            peaks.append(peak_mb())
    del wire.http.headers["Connection"]
    assert peaks[2] - peaks[1] < 60


# ---- JSON after the schema


class Things:
    """What is really there, to put into bodies by chance: without it all ends at "no such session"."""

    def __init__(self, wire: Wire) -> None:
        session = wire.session()
        run = wire.model(session)
        saves = [wire.save(run, 1, "saved")]
        for seq_id, place in enumerate(("save_weights_for_sampler", "save_weights_external"), start=2):
            saves.append(wire.post(f"/{place}", {"model_id": run, "path": "saved", "seq_id": seq_id}))
        paths = [wire.result(save)["path"] for save in saves]
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
        sampler = wire.post("/create_sampling_session", body)["sampling_session_id"]
        sample = {"sampling_session_id": sampler, "seq_id": 0, "num_samples": 1, "sampling_params": {"max_tokens": 1}}
        settled(wire, wire.post("/asample", {**sample, "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}}))
        self.known: dict[str, list[Any]] = {
            "target": [{"sampling_session_id": sampler}],  # of which something has finished: no poll is held
            "session_id": [session], "model_id": [run], "sampling_session_id": [sampler], "sampler_id": [sampler],
            "run": [run], "name": ["saved"], "base_model": [MODEL],
            "model": [MODEL, paths[1]], "request_id": [saves[0]["request_id"]], "path": [*paths, "saved", "other"],
            "tinker_path": paths, "source_path": paths, "model_path": [*paths, None],
            "prompt": [{"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}, "abc", [1, 2, 3]],
            "messages": [[{"role": "user", "content": "abc"}]], "max_tokens": [3], "max_completion_tokens": [3],
            "sampling_params": [{"max_tokens": 3}, {"max_tokens": 3, "stop": ["a"], "top_k": 2, "seed": 1 << 63}],
            "ttl_seconds": [None, 3600], "age_encryption_recipients": [None], "adam_params": [{}], "num_samples": [2],
            "rank": [2], "lora_config": [{"rank": 2}],
        }  # fmt: skip

    def put_into(self, values: Any, chance: random.Random) -> None:
        """Replace most of the names that are known; the rest stays as it was made."""
        if isinstance(values, dict):
            for key in [*values] + [key for key in ("max_tokens",) if "prompt" in values or "messages" in values]:
                if key in self.known and chance.random() < 0.9:
                    values[key] = chance.choice(self.known[key])


def ask_by_chance(company: Company, things: Things, operation: Any, examples: int) -> tuple[list[int], list[dict]]:
    """Statuses and promises of requests that follow the operation's schema, or miss it, by chance."""
    import hypothesis
    import schemathesis
    from hypothesis import strategies

    statuses: list[int] = []
    promises: list[dict] = []
    ending = operation.method == "delete" or operation.path.endswith("/finish")

    def ask(case: Any, chance: random.Random) -> None:
        if not ending and chance.random() < 0.8:
            things.put_into(case.body, chance)
            things.put_into(case.path_parameters, chance)
        reply = case.call(headers={"X-API-Key": company.keys["mallory"]}, timeout=ANSWER_SECONDS)
        assert reply.status_code < 500, (case.as_curl_command(), reply.status_code, reply.text)
        statuses.append(reply.status_code)
        if reply.status_code == 200 and reply.content.startswith(b'{"request_id"'):  # not one that lists what has finished
            promises.append(reply.json())

    checks = list(hypothesis.HealthCheck)
    settings = hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=checks
    )
    for mode in schemathesis.GenerationMode:
        cases, chances = operation.as_strategy(generation_mode=mode), strategies.randoms(use_true_random=False)
        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # there is nothing in it to miss
            settings(hypothesis.given(cases, chances)(ask))()
    return statuses, promises


@pytest.mark.slow
def test_requests_after_the_schema_get_an_answer(live: Company, wire: Wire) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (uv sync --group serving)")
    things, statuses = Things(wire), []
    for found in schemathesis.openapi.from_url(f"{live.url}/openapi.json").get_all_operations():
        if (operation := found.ok()).path.endswith("/auth/apikey/me") and operation.method == "delete":
            continue  # the key would be revoked, and all that follows refused
        answered, promises = ask_by_chance(live, things, operation, examples=20)
        statuses += answered
        for promise in promises:
            settled(wire, promise)
    assert len(statuses) > 500 and statuses.count(200) > 100
