"""A Tinker server as its clients see it: the time of each call over the wire and in process, throughput, fairness.

    uv run python -m bench.serve                        # a tiny random model: what the wire itself costs
    uv run python -m bench.serve --model smollm2-135m   # a real one

The server is `cook serve` in a process of its own, the client the `tinker` SDK here. Each primitive is called in turn over
the wire and on an engine in this process; the overhead of a call is its time less the median in process. Then eight clients
train at once against one client in process with the same tokens, and a small client's calls are timed beside one that keeps
the queue full.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.machine import describe, fast_dtype
from bench.sft import RESULTS
from bench.shapes import random_model

CLIENTS, STEPS, ROW_TOKENS = 8, 12, 64
BATCHES = ((4, 64), (16, 256), (32, 256))  # rows and tokens each of a training client's step
FLOOD_ROWS, SMALL_CALLS = 16, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or what model= of cook serve takes")
    parser.add_argument("--rounds", type=int, default=60, help="calls of each primitive")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = random_model("tiny") if args.model == "tiny" else args.model
    with served(model, args.device) as url:
        result = measure(url, args.rounds, args.device)
    result = {
        "date": time.strftime("%Y-%m-%d"), "command": " ".join(["python -m bench.serve", *sys.argv[1:]]),
        "machine": describe(args.device), "dtype": fast_dtype(args.device), "model": args.model, **result,
    }  # fmt: skip
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "serve.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


@contextmanager
def served(model: str, device: str) -> Iterator[str]:
    """The address of a server that is ready; it ends with the block."""
    port = free_port()
    process = start_server(model, port, tempfile.mkdtemp(prefix="bench-serve-"), device)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start_server(model: str, port: int, store: str, device: str, *words: str) -> subprocess.Popen[bytes]:
    """`cook serve`, once it answers."""
    words = (f"model={model}", f"port={port}", f"store={store}", f"engine.device={device}", *words)
    process = subprocess.Popen([sys.executable, "-m", "cookbook.cli", "serve", *words], stdout=sys.stderr)
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/healthz", timeout=1).close()
            return process
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"cook serve ended with status {process.returncode}") from None
            time.sleep(0.1)


def measure(url: str, rounds: int, device: str) -> dict[str, Any]:
    import tinker

    from core import EngineOptions, ServiceClient

    remote = tinker.ServiceClient(base_url=url, api_key="tml-bench")
    model = str(remote.get_server_capabilities().supported_models[0].model_name)
    local = ServiceClient(tempfile.mkdtemp(prefix="bench-local-"), EngineOptions(device=device))
    there = Wire(remote.create_lora_training_client(model, rank=8).result())
    here = Local(local.create_lora_training_client(model, rank=8).result())
    calls = {name: (getattr(there, name), getattr(here, name)) for name in PRIMITIVES}
    return {
        "calls_ms": {name: overhead(*pair, 10 if name == "save_state" else rounds) for name, pair in calls.items()},
        "throughput": [throughput(remote, here, model, *batch) for batch in BATCHES],
        "fairness": fairness(remote, there, model),
    }


PRIMITIVES = ("forward_backward", "train_step", "sample", "save_state")


def rows(count: int, length: int = ROW_TOKENS) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 250) for _ in range(length + 1)] for _ in range(count)]


class Wire:
    """The primitives through the SDK."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.sampler = trainer.save_weights_and_get_sampling_client().result()
        self.saves = 0

    def data(self, count: int, length: int = ROW_TOKENS) -> list[Any]:
        import torch
        from tinker import types

        def as_targets(row: list[int]) -> types.TensorData:
            return types.TensorData.from_torch(torch.tensor(row[1:]))

        return [
            types.Datum(model_input=types.ModelInput.from_ints(row[:-1]), loss_fn_inputs={"target_tokens": as_targets(row)})
            for row in rows(count, length)
        ]

    def forward_backward(self) -> None:
        self.trainer.forward_backward(self.data(1), "cross_entropy").result()

    def train_step(self, data: list[Any] | None = None) -> None:
        """Gradient and update, both sent before the first is waited for."""
        from tinker import types

        gradient = self.trainer.forward_backward(data or self.data(1), "cross_entropy")
        update = self.trainer.optim_step(types.AdamParams(learning_rate=1e-5))
        gradient.result()
        update.result()

    def sample(self) -> None:
        from tinker import types

        prompt = types.ModelInput.from_ints(rows(1)[0])
        self.sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1)).result()

    def save_state(self) -> None:
        self.saves += 1
        self.trainer.save_state(f"bench-{self.saves}").result()


class Local:
    """The same in this process."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.sampler = trainer.save_weights_and_get_sampling_client().result()
        self.saves = 0

    def data(self, count: int, length: int = ROW_TOKENS) -> list[Any]:
        import torch

        from core import Datum, ModelInput

        return [Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": torch.tensor(row[1:])}) for row in rows(count, length)]

    def forward_backward(self) -> None:
        self.trainer.forward_backward(self.data(1), "cross_entropy").result()

    def train_step(self, data: list[Any] | None = None) -> None:
        from core import AdamParams

        gradient = self.trainer.forward_backward(data or self.data(1), "cross_entropy")
        update = self.trainer.optim_step(AdamParams(learning_rate=1e-5))
        gradient.result()
        update.result()

    def sample(self) -> None:
        from core import ModelInput, SamplingParams

        self.sampler.sample(ModelInput.from_ints(rows(1)[0]), 1, SamplingParams(max_tokens=1)).result()

    def save_state(self) -> None:
        self.saves += 1
        self.trainer.save_state(f"bench-{self.saves}").result()


def overhead(wire: Callable[[], None], local: Callable[[], None], rounds: int) -> dict[str, float]:
    """In milliseconds; the two alternate."""
    for _ in range(3):
        wire()
        local()
    times = [(seconds(wire), seconds(local)) for _ in range(rounds)]
    inside = statistics.median(local for _, local in times)
    over = [1000 * (wire - inside) for wire, _ in times]
    return {
        "wire_p50": _round(1000 * statistics.median(wire for wire, _ in times)), "in_process_p50": _round(1000 * inside),
        "overhead_p50": _round(statistics.median(over)), "overhead_p95": _round(percentile(over, 0.95)),
    }  # fmt: skip


def throughput(remote: Any, here: Local, model: str, count: int, length: int) -> dict[str, float]:
    """Trained tokens per second of CLIENTS clients over the wire, and of one in process with the same tokens."""
    clients = [Wire(remote.create_lora_training_client(model, rank=8).result()) for _ in range(CLIENTS)]

    def train(client: Wire) -> None:
        data = client.data(count, length)
        for _ in range(STEPS):
            client.train_step(data)

    together = seconds(lambda: _at_once([lambda client=client: train(client) for client in clients]))

    def alone() -> None:
        data = here.data(count * CLIENTS, length)
        for _ in range(STEPS):
            here.train_step(data)

    tokens = CLIENTS * STEPS * count * length
    in_process = seconds(alone)
    return {
        "clients": CLIENTS, "rows": count, "row_tokens": length, "clients_tokens_per_second": _round(tokens / together),
        "in_process_tokens_per_second": _round(tokens / in_process), "clients_share": round(in_process / together, 3),
    }  # fmt: skip


def fairness(remote: Any, small: Wire, model: str) -> dict[str, float]:
    """p95 of a small client's forward_backward, alone and beside one whose queue is never empty, in milliseconds."""
    alone = [seconds(small.forward_backward) for _ in range(SMALL_CALLS)]
    flooding, stop = Wire(remote.create_lora_training_client(model, rank=8).result()), threading.Event()

    def flood() -> None:
        data = flooding.data(FLOOD_ROWS)
        waiting = [flooding.trainer.forward_backward(data, "cross_entropy") for _ in range(4)]
        while not stop.is_set():
            waiting.pop(0).result()
            waiting.append(flooding.trainer.forward_backward(data, "cross_entropy"))
        for one in waiting:
            one.result()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        beside = [seconds(small.forward_backward) for _ in range(SMALL_CALLS)]
    finally:
        stop.set()
        thread.join()
    before, after = percentile(alone, 0.95), percentile(beside, 0.95)
    return {"alone_p95": _round(1000 * before), "flooded_p95": _round(1000 * after), "times": round(after / before, 2)}


def _at_once(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _round(value: float) -> float:
    return round(value, 1)


if __name__ == "__main__":
    main()
