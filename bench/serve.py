"""A Tinker server as its clients see it: the time of each call over the wire and in process, throughput, fairness.

    uv run python -m bench.serve                        # a tiny random model: what the wire itself costs
    uv run python -m bench.serve --model smollm2-135m   # a real one

The server is `cook serve` in a process of its own, the client the `tinker` SDK here. Each primitive is called in turn over
the wire and on an engine in this process; the overhead of a call is its time less the median in process. Then eight clients
train at once against one client in process with the same tokens, and sample at once against one in process with all the
requests, and a small client's calls are timed beside one that keeps the queue full. Clients that vanish and servers that are
killed: bench/soak.py.
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
SAMPLES, SAMPLE_TOKENS = 8, 64  # a sampling client's requests at once, and the tokens of each
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

    import core
    from core import EngineOptions, ServiceClient

    remote = tinker.ServiceClient(base_url=url, api_key="tml-bench")
    model = str(remote.get_server_capabilities().supported_models[0].model_name)
    local = ServiceClient(tempfile.mkdtemp(prefix="bench-local-"), EngineOptions(device=device))
    there, here = wired(remote, model), Client(core, local.create_lora_training_client(model, rank=8).result())
    return {
        "calls_ms": {name: overhead(there, here, name, 10 if name == "save_state" else rounds) for name in PRIMITIVES},
        "throughput": [throughput(remote, here, model, *batch) for batch in BATCHES],
        "sampling": sampling(remote, here, model),
        "fairness": fairness(remote, there, model),
    }


PRIMITIVES = ("forward_backward", "forward", "optim_step", "train_step", "sample", "snapshot", "save_state")
BEFORE = {"optim_step": "forward_backward"}  # not timed


def rows(count: int, length: int = ROW_TOKENS) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 250) for _ in range(length + 1)] for _ in range(count)]


def wired(remote: Any, model: str) -> Client:
    """A new adapter on the server."""
    from tinker import types

    return Client(types, remote.create_lora_training_client(model, rank=8).result())


class Client:
    """The primitives, called alike through the SDK and in process; `types` is where Datum and the others come from."""

    def __init__(self, types: Any, trainer: Any) -> None:
        self.types, self.trainer = types, trainer
        self.saves = 0
        self.snapshot()

    def data(self, count: int, length: int = ROW_TOKENS) -> list[Any]:
        import torch

        def targets(row: list[int]) -> Any:
            tensor = torch.tensor(row[1:])
            return self.types.TensorData.from_torch(tensor) if hasattr(self.types, "TensorData") else tensor

        prompt, datum = self.types.ModelInput.from_ints, self.types.Datum
        return [
            datum(model_input=prompt(row[:-1]), loss_fn_inputs={"target_tokens": targets(row)}) for row in rows(count, length)
        ]

    def forward_backward(self) -> None:
        self.trainer.forward_backward(self.data(1), "cross_entropy").result()

    def forward(self) -> None:
        self.trainer.forward(self.data(1), "cross_entropy").result()

    def optim_step(self) -> None:
        self.trainer.optim_step(self.types.AdamParams(learning_rate=1e-5)).result()

    def train_step(self, data: list[Any] | None = None) -> None:
        """Gradient and update, both sent before the first is waited for."""
        gradient = self.trainer.forward_backward(data or self.data(1), "cross_entropy")
        update = self.trainer.optim_step(self.types.AdamParams(learning_rate=1e-5))
        gradient.result()
        update.result()

    def sample(self, num_samples: int = 1, max_tokens: int = 1) -> None:
        prompt = self.types.ModelInput.from_ints(rows(1)[0])
        self.sampler.sample(prompt, num_samples, self.types.SamplingParams(max_tokens=max_tokens)).result()

    def snapshot(self) -> None:
        self.sampler = self.trainer.save_weights_and_get_sampling_client().result()

    def save_state(self) -> None:
        self.saves += 1
        self.trainer.save_state(f"bench-{self.saves}").result()


def overhead(there: Client, here: Client, name: str, rounds: int) -> dict[str, float]:
    """In milliseconds; the two alternate."""

    def timed(client: Client) -> float:
        if name in BEFORE:
            getattr(client, BEFORE[name])()
        return 1000 * seconds(getattr(client, name))

    for _ in range(3):
        timed(there)
        timed(here)
    times = [(timed(there), timed(here)) for _ in range(rounds)]
    wire, inside = [wire for wire, _ in times], statistics.median(local for _, local in times)
    over = [took - inside for took in wire]
    return {
        "wire_p50": _round(statistics.median(wire)), "wire_p95": _round(percentile(wire, 0.95)),
        "in_process_p50": _round(inside),
        "overhead_p50": _round(statistics.median(over)), "overhead_p95": _round(percentile(over, 0.95)),
    }  # fmt: skip


def throughput(remote: Any, here: Client, model: str, count: int, length: int) -> dict[str, float]:
    """Trained tokens per second of CLIENTS clients over the wire, and of one in process with the same tokens."""
    clients = [wired(remote, model) for _ in range(CLIENTS)]

    def train(client: Client) -> None:
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


def sampling(remote: Any, here: Client, model: str) -> dict[str, float]:
    """Sampled tokens per second of CLIENTS clients, an adapter each, and of one in process with as many requests."""
    clients = [wired(remote, model) for _ in range(CLIENTS)]
    work = [lambda client=client: client.sample(SAMPLES, SAMPLE_TOKENS) for client in clients]

    def alone() -> None:
        here.sample(SAMPLES * CLIENTS, SAMPLE_TOKENS)

    rounds = [(seconds(lambda: _at_once(work)), seconds(alone)) for _ in range(6)]
    together, in_process = (statistics.median(times) for times in zip(*rounds[1:], strict=True))
    tokens = CLIENTS * SAMPLES * SAMPLE_TOKENS
    return {
        "clients": CLIENTS, "samples": SAMPLES, "sample_tokens": SAMPLE_TOKENS,
        "clients_tokens_per_second": _round(tokens / together), "in_process_tokens_per_second": _round(tokens / in_process),
        "clients_share": round(in_process / together, 3),
    }  # fmt: skip


def fairness(remote: Any, small: Client, model: str) -> dict[str, float]:
    """p95 of a small client's forward_backward, alone and beside one whose queue is never empty, in milliseconds."""
    alone = [seconds(small.forward_backward) for _ in range(SMALL_CALLS)]
    flooding, stop = wired(remote, model), threading.Event()

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
