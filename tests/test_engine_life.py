"""Order, futures, and an engine's life: who waits for whom, what a leaving client takes along, what cannot be had."""

from __future__ import annotations

import asyncio
import gc
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from core import AdamParams, EngineOptions, ModelInput, ModelNotFound, SamplingParams, ServiceClient, clients
from core.futures import Future
from core.request import Call
from tests.tiny import data, flat, held, new_client, service_at, tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (5, 17, 30)


def test_a_clients_operations_run_in_the_order_of_submission(tmp_path: Path) -> None:
    ahead, waiting = new_client(tmp_path), new_client(tmp_path)
    futures = []
    for number in range(5):
        futures += [ahead.forward_backward(data(LENGTHS, number), "cross_entropy"), ahead.optim_step(AdamParams(1e-2))]
        futures.append(ahead.forward(data(LENGTHS), "cross_entropy"))
        waiting.forward_backward(data(LENGTHS, number), "cross_entropy").result()
        waiting.optim_step(AdamParams(1e-2)).result()
        expected = waiting.forward(data(LENGTHS), "cross_entropy").result()
    assert futures[-1].result().metrics == expected.metrics
    assert torch.equal(flat(ahead)["params"], flat(waiting)["params"])
    for client in (ahead, waiting):
        client.close()


def test_the_same_requests_give_the_same_bits(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        client = new_client(tmp_path, rank=3)
        for number in range(3):
            client.forward_backward(data((40, 90, 7), number), "cross_entropy", logprobs="weighted")
            client.optim_step(AdamParams(1e-2)).result()
        results.append(flat(client)["params"])
        client.close()
    assert torch.equal(*results)


def test_every_verb_can_be_awaited(tmp_path: Path) -> None:
    async def steps() -> list[float]:
        client = await service_at(tmp_path).create_lora_training_client(str(tiny_model_dir()), 4)
        losses = []
        for _ in range(2):
            gradient = client.forward_backward(data(LENGTHS), "cross_entropy")
            update = client.optim_step(AdamParams(1e-2))
            output, _ = await asyncio.gather(gradient, update)
            losses.append(output.metrics["loss:sum"])
        with pytest.raises(ValueError, match="without a gradient"):
            await client.optim_step(AdamParams())
        assert (await client.save_state("a")).path.endswith("/weights/a")
        client.close()
        return losses

    first, second = asyncio.run(steps())
    assert second < first


def test_who_stops_waiting_cancels_nothing(tmp_path: Path) -> None:
    """An await that is cancelled, or a result() that times out, leaves the operation and all tenants as they are."""
    client, other = new_client(tmp_path, seed=1), new_client(tmp_path, seed=2)
    gate = threading.Event()
    client.engine.submit(client.tenant, Call(gate.wait, Future()))
    futures = [client.forward_backward(data(LENGTHS), "cross_entropy"), client.optim_step(AdamParams())]
    theirs = other.forward_backward(data(LENGTHS), "cross_entropy")

    async def impatient() -> None:
        for future in futures:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(future, 0.01)

    asyncio.run(impatient())
    with pytest.raises(TimeoutError):
        futures[0].result(0.01)
    gate.set()
    assert futures[1].result(60).metrics["grad_norm:mean"] > 0
    assert theirs.result(60).metrics["loss:sum"] > 0
    assert client.adapter.step == 1 and other.adapter.has_grad
    for one in (client, other):
        one.close()


def test_a_completed_future_is_done() -> None:
    future = Future.completed(3)
    assert future.done() and future.result() == 3

    async def awaited() -> int:
        return await future

    assert asyncio.run(awaited()) == 3


def test_the_last_client_frees_the_base_model(tmp_path: Path) -> None:
    first, second = new_client(tmp_path), new_client(tmp_path)
    other = new_client(tmp_path, "qwen2")
    engine = first.engine
    assert first.engine is second.engine and other.engine is not engine
    model = weakref.ref(engine.decoder.model)
    first.close()
    assert second.forward(data(LENGTHS), "cross_entropy").result().metrics["loss:sum"] > 0
    second.close()
    second.close()  # twice is once
    assert [engine for engine, _ in clients._engines.values()] == [other.engine]
    engine._thread.join(10)
    assert not engine._thread.is_alive()
    del engine, first, second
    gc.collect()
    assert model() is None
    other.close()
    assert not clients._engines


def test_who_asks_for_another_engine_gets_one(tmp_path: Path) -> None:
    """And not the values of whoever came first."""
    model = str(tiny_model_dir("llama"))
    asked = [{}, {"token_budget": 64}, {"token_budget": 64}]
    first, second, third = (service_at(tmp_path, **options).create_lora_training_client(model, 4).result() for options in asked)
    assert second.engine.token_budget == 64 != first.engine.token_budget
    assert third.engine is second.engine
    for one in (first, second, third):
        one.close()


def test_a_client_that_nobody_holds_leaves_by_itself_once_its_work_is_done(tmp_path: Path) -> None:
    futures = [new_client(tmp_path).forward(data(LENGTHS), "cross_entropy") for _ in range(3)]
    assert all(future.result(60).metrics["loss:sum"] > 0 for future in futures)
    gc.collect()
    assert not clients._engines


def test_closing_one_idle_client_does_not_close_another(tmp_path: Path) -> None:
    made = [new_client(tmp_path, seed=seed) for seed in range(3)]
    made[2].close()
    for client in made[:2]:
        assert client.forward(data(LENGTHS), "cross_entropy").result(60).metrics["loss:sum"] > 0
    for client in made[:2]:
        client.close()


def test_a_client_may_be_collected_while_its_thread_opens_another(tmp_path: Path) -> None:
    """Loading holds the table of engines for seconds; a finalizer that runs there must not wait for itself."""
    client = new_client(tmp_path)

    def collect() -> None:
        with clients._engines_lock:
            client.close()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert not clients._engines


def test_a_closed_client_says_so_and_its_adapter_is_freed(tmp_path: Path) -> None:
    client, other = new_client(tmp_path), new_client(tmp_path)
    client.forward(data(LENGTHS), "cross_entropy").result()
    client.close()
    with pytest.raises(RuntimeError, match=r"^this client is closed$"):
        client.forward(data(LENGTHS), "cross_entropy")
    adapter = weakref.ref(client.adapter)
    del client
    other.forward(data(LENGTHS), "cross_entropy").result()  # the engine has passed the other's leaving
    deadline = time.monotonic() + 5
    while adapter() is not None and time.monotonic() < deadline:
        gc.collect()
    assert adapter() is None
    other.close()


def test_a_closed_client_loads_no_base_to_say_so(tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model_dir(), tmp_path / "base")
    client = service_at(tmp_path).create_lora_training_client(str(base), 4).result()
    client.close()
    shutil.rmtree(base)
    with pytest.raises(RuntimeError, match=r"^this client is closed$"):
        client.save_weights_and_get_sampling_client()
    assert not clients._engines


def test_a_client_forgotten_with_work_in_the_queue_holds_nobody_up(tmp_path: Path) -> None:
    """The engine's thread drops the last reference to it, and its end asks for the lock of the table of engines."""
    keep, forgotten = new_client(tmp_path), new_client(tmp_path)
    asked: list[Future] = []
    with clients._engines_lock:
        with held(keep.engine):
            forgotten.save_state("x")
            del forgotten
        time.sleep(0.3)
        thread = threading.Thread(target=lambda: asked.append(keep.forward(data(LENGTHS), "cross_entropy")), daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
    asked[0].result(10)
    keep.close()


def test_an_adapter_that_cannot_come_back_fails_its_own_request_only(tmp_path: Path) -> None:
    service = ServiceClient(tmp_path, EngineOptions("float32", "cpu", park_after=0.1))
    lost, other = (service.create_lora_training_client(str(tiny_model_dir()), 4).result() for _ in range(2))
    deadline = time.monotonic() + 5
    while not lost.adapter.parked and time.monotonic() < deadline:
        time.sleep(0.02)
    lost.adapter._home = torch.device("cuda", 99)
    with pytest.raises((RuntimeError, AssertionError)):
        lost.forward(data(LENGTHS), "cross_entropy").result(10)
    other.forward(data(LENGTHS), "cross_entropy").result(10)
    for client in (lost, other):
        client.close()


def test_an_engine_that_ends_tells_all_who_wait_and_makes_room_for_another(tmp_path: Path) -> None:
    client = new_client(tmp_path)
    with held(client.engine):
        begun, waiting = (client.forward(data(LENGTHS), "cross_entropy") for _ in range(2))
        client.engine.submit(client.engine.join(), object())  # type: ignore[arg-type]
    for future in (begun, waiting):
        with pytest.raises(AttributeError):
            future.result(10)
    with pytest.raises(RuntimeError, match=r"^this client is closed$"):
        client.forward(data(LENGTHS), "cross_entropy")
    another = new_client(tmp_path)
    another.forward(data(LENGTHS), "cross_entropy").result(10)
    for one in (client, another):
        one.close()
    assert not clients._engines


def test_what_is_held_back_still_runs_after_its_client_has_left(tmp_path: Path) -> None:
    sampler = service_at(tmp_path).create_sampling_client(base_model=str(tiny_model_dir())).result()
    with sampler.together():
        future = sampler.sample(ModelInput.from_ints([5, 6, 7]), 1, SamplingParams(max_tokens=3))
        sampler.close()
        time.sleep(0.3)  # the engine has seen it go
    assert len(future.result(10).sequences[0].tokens) <= 3


def test_a_process_may_end_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    """A thread inside torch at interpreter exit would abort it."""
    program = f"""
from tests.tiny import *
torch.set_num_threads(1)
client = service_at({str(tmp_path)!r}).create_lora_training_client({str(tiny_model_dir())!r}).result()
futures = [client.forward_backward(data([900] * 6), "cross_entropy") for _ in range(20)]
futures[0].result()
"""
    root = Path(__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_engine_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^engine.dtype=float16, expected auto, bfloat16 or float32$"):
        EngineOptions("float16", "cpu").resolve()
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match=r"^engine.device=cuda, but this torch sees no CUDA device: use engine.device=cpu$"
        ):
            EngineOptions("auto", "cuda").resolve()
        assert EngineOptions().resolve()[1].type == "cpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instruct-q4_0",
         ("unknown model 'smollm2-135m-instruct-q4_0': give a hub id (organisation/name), a directory"
          " or a .gguf file; did you mean 'smollm2-135m-instruct-q4_1'?")),
        ("/no/such/place", "no model directory at /no/such/place"),
        ("/no/such/model.gguf", "no GGUF file at /no/such/model.gguf"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_here_is_refused_in_one_line(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as error:
        ServiceClient(tmp_path).create_lora_training_client(name).result()
    assert str(error.value) == message
    assert not clients._engines


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=f"^{tmp_path} holds no config.json: not a model directory$"):
        service_at(tmp_path).create_lora_training_client(str(tmp_path)).result()
    (tmp_path / "config.json").write_text((tiny_model_dir() / "config.json").read_text())
    with pytest.raises(ModelNotFound, match=f"^model '{tmp_path}' at {tmp_path} cannot be loaded: ") as error:
        service_at(tmp_path).create_lora_training_client(str(tmp_path)).result()
    assert "\n" not in str(error.value)
