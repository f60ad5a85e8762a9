"""A Tinker server under load for minutes, and killed and started again under load.

    uv run python -m bench.soak                             # 64 sampling and 16 training clients for 3 minutes, 10 restarts
    uv run python -m bench.soak --seconds 20 --restarts 2   # a short look

The server is `cook serve` in a process of its own over a tiny random model in fp32; every client is a ServiceClient of the
`tinker` SDK with a session of its own, several to a process. Each training client takes the same steps as a client of its
seed that trains alone, in this process, afterwards: a lost or doubled step, or another tenant's gradient, would show in the
losses. After `kill -9` each training client goes on from its last acknowledged save, or starts anew without one, and tries
that again until the server is back; in the end every save that was acknowledged must load.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.serve import free_port, percentile, start_server
from bench.sft import RESULTS
from bench.shapes import random_model

PROCESSES = 4
ROWS, ROW_TOKENS, RANK, SAVE_EVERY = 2, 48, 8, 5
AWAY_SECONDS = 120  # how long a training client tries to go on
RATE = 1e-3
CHECKPOINT = re.compile(r"tinker://\S+/weights/step-(\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--samplers", type=int, default=64)
    parser.add_argument("--trainers", type=int, default=16)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--work", help=argparse.SUPPRESS)  # the job of one client process, as JSON; its answer goes to a file
    args = parser.parse_args()
    if args.work:
        job = json.loads(args.work)
        Path(job["answer"]).write_text(json.dumps(client_process(job)))
        return
    model = random_model("tiny")
    result = {
        "date": time.strftime("%Y-%m-%d"), "command": " ".join(["python -m bench.soak", *sys.argv[1:]]),
        "machine": describe("cpu"), "dtype": "float32",
        "steady": steady(model, args.seconds, args.samplers, args.trainers),
        "restarts": restarts(model, args.restarts, args.trainers),
    }  # fmt: skip
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "soak.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


# ---- this process: the server, what the clients found, and what they should have found


def steady(model: str, seconds: float, samplers: int, trainers: int) -> dict[str, Any]:
    port, store = free_port(), tempfile.mkdtemp(prefix="bench-soak-")
    server = start_server(model, port, store, "cpu", "engine.dtype=float32")
    try:
        clients = start_clients(port, model, samplers, trainers, seconds)
        memory = []
        while any(process.poll() is None for process, _ in clients):
            memory.append(resident_mb(server.pid))
            time.sleep(0.5)
        found = collect(clients)
    finally:
        server.terminate()
        server.wait(60)
    thirds = [
        statistics.median(part) for part in (memory[len(memory) // 3 : 2 * len(memory) // 3], memory[2 * len(memory) // 3 :])
    ]
    return {
        "seconds": seconds, "sampling_clients": samplers, "training_clients": trainers,
        "samples": found["samples"], "steps": sum(len(losses) for losses in found["losses"].values()),
        "errors": found["errors"][:5], "num_errors": len(found["errors"]),
        "step_p50_ms": round(1000 * statistics.median(found["step_seconds"])),
        "step_p95_ms": round(1000 * percentile(found["step_seconds"], 0.95)),
        "sample_p50_ms": round(1000 * statistics.median(found["sample_seconds"])),
        "sample_p95_ms": round(1000 * percentile(found["sample_seconds"], 0.95)),
        "largest_loss_difference": difference(model, found["losses"]),
        "memory_mb_second_third": round(thirds[0]), "memory_mb_last_third": round(thirds[1]),
    }  # fmt: skip


def restarts(model: str, times: int, trainers: int) -> dict[str, Any]:
    """Kill and start again `times` times while clients train and save."""
    port, store = free_port(), tempfile.mkdtemp(prefix="bench-soak-")
    server = start_server(model, port, store, "cpu", "engine.dtype=float32")
    draw, down = random.Random(0), []
    try:
        clients = start_clients(port, model, 0, trainers, seconds=1e9)
        for _ in range(times):
            wait_for_trainers(port, trainers)
            time.sleep(draw.uniform(3, 9))
            server.send_signal(signal.SIGKILL)
            server.wait()
            start = time.monotonic()
            server = start_server(model, port, store, "cpu", "engine.dtype=float32")
            down.append(time.monotonic() - start)
        wait_for_trainers(port, trainers)
        time.sleep(10)
        for process, _ in clients:
            process.send_signal(signal.SIGTERM)
        found = collect(clients)
        lost = [uri for uri in found["saved"] if not loads(port, uri)]
    finally:
        server.kill()
        server.wait()
    return {
        "times": times, "training_clients": trainers, "start_seconds": round(statistics.median(down), 1) if down else None,
        "continued": found["continued"], "from_scratch": found["from_scratch"], "tried_again": found["tried_again"],
        "errors": found["errors"][:5],
        "num_errors": len(found["errors"]), "acknowledged_saves": len(found["saved"]), "lost_saves": len(lost),
        "steps": sum(len(losses) for losses in found["losses"].values()),
        "largest_loss_difference": difference(model, found["losses"]),
    }  # fmt: skip


def wait_for_trainers(port: int, count: int, most: float = 120) -> None:
    """Until all of them train: the SDK waits up to half a minute before it tries a server again that was away."""
    end = time.monotonic() + most
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            found = re.findall(r"^cook_training_clients\S* (\d+)", answer.read().decode(), re.M)
        if sum(map(int, found)) >= count:
            return
        time.sleep(0.5)


ClientProcess = tuple["subprocess.Popen[bytes]", Path]  # and where its answer will be


def start_clients(port: int, model: str, samplers: int, trainers: int, seconds: float) -> list[ClientProcess]:
    processes, folder = [], Path(tempfile.mkdtemp(prefix="bench-soak-clients-"))
    for n in range(PROCESSES):
        job = {
            "url": f"http://127.0.0.1:{port}", "model": model, "seconds": seconds, "answer": str(folder / f"{n}.json"),
            "samplers": list(range(n, samplers, PROCESSES)), "trainers": list(range(n, trainers, PROCESSES)),
        }  # fmt: skip
        command = [sys.executable, "-m", "bench.soak", "--work", json.dumps(job)]
        processes.append((subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), Path(job["answer"])))
    return processes


def collect(clients: list[ClientProcess]) -> dict[str, Any]:
    """The answers of all client processes together: lists joined, numbers added."""
    total: dict[str, Any] = {}
    for process, answer in clients:
        process.wait(300)
        for key, value in json.loads(answer.read_text()).items():
            known = total.get(key, type(value)())
            total[key] = {**known, **value} if isinstance(value, dict) else known + value
    return total


def difference(model: str, losses: dict[str, list[float]]) -> float:
    """Of any loss from that of a client with the same seed that trains alone."""
    from core import AdamParams, Datum, EngineOptions, ModelInput, ServiceClient

    service, worst = ServiceClient(tempfile.mkdtemp(prefix="bench-solo-"), EngineOptions("float32", "cpu")), 0.0
    for number, found in losses.items():
        trainer = service.create_lora_training_client(model, RANK, int(number)).result()
        for step, loss in enumerate(found):
            data = [
                Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": as_tensor(row[1:])}) for row in rows(int(number), step)
            ]
            expected = trainer.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
            trainer.optim_step(AdamParams(RATE)).result()
            worst = max(worst, abs(loss - expected) / expected)
        trainer.close()
    return float(f"{worst:.2g}")


def loads(port: int, uri: str) -> bool:
    import tinker

    with tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key="tml-bench") as service:
        try:
            service.create_training_client_from_state_with_optimizer(uri).result()
            return True
        except tinker.TinkerError:
            return False


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def rows(seed: int, step: int) -> list[list[int]]:
    draw = random.Random(1000 * seed + step % 7)
    return [[draw.randrange(3, 500) for _ in range(ROW_TOKENS + 1)] for _ in range(ROWS)]


def as_tensor(values: list[int]) -> Any:
    import torch

    return torch.tensor(values)


# ---- a client process


def client_process(job: dict[str, Any]) -> dict[str, Any]:
    """Its clients in a thread each, until the time is over or SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    trainers, samplers = [Trainer(job, n, stop) for n in job["trainers"]], [Sampler(job, n, stop) for n in job["samplers"]]
    threads = [threading.Thread(target=client.work, daemon=True) for client in (*trainers, *samplers)]
    for thread in threads:
        thread.start()
    stop.wait(job["seconds"])
    stop.set()
    for thread in threads:
        thread.join(120)
    clients = [*trainers, *samplers]
    return {
        "losses": {str(t.number): [t.losses[step] for step in sorted(t.losses)] for t in trainers},
        "samples": sum(s.count for s in samplers),
        "saved": [uri for t in trainers for uri in t.saved],
        **{name: sum(getattr(t, name) for t in trainers) for name in ("continued", "from_scratch", "tried_again")},
        "step_seconds": [s for t in trainers for s in t.seconds], "sample_seconds": [s for c in samplers for s in c.seconds],
        "errors": [error for client in clients for error in client.errors]
        + [f"client {n} hangs" for n, thread in enumerate(threads) if thread.is_alive()],
    }  # fmt: skip


class Client:
    def __init__(self, job: dict[str, Any], number: int, stop: threading.Event) -> None:
        self.job, self.number, self.stop = job, number, stop
        self.errors: list[str] = []
        self.seconds: list[float] = []
        self.service = self.connect()

    def connect(self) -> Any:
        import tinker

        return tinker.ServiceClient(base_url=self.job["url"], api_key="tml-bench")

    def work(self) -> None:
        try:
            self.run()
            self.service.close("success").result()
        except Exception as error:
            self.errors.append(f"{type(self).__name__} {self.number}: {type(error).__name__}: {error}"[:300])

    def run(self) -> None:
        raise NotImplementedError


class Sampler(Client):
    """Samples of the base model, of changing lengths."""

    count = 0

    def run(self) -> None:
        from tinker import types

        client, draw = self.service.create_sampling_client(base_model=self.job["model"]), random.Random(self.number)
        while not self.stop.is_set():
            prompt = types.ModelInput.from_ints([draw.randrange(3, 500) for _ in range(draw.randrange(4, 60))])
            params, start = types.SamplingParams(max_tokens=draw.randrange(1, 24), seed=self.count), time.monotonic()
            reply = client.sample(prompt, 2, params).result()
            self.seconds.append(time.monotonic() - start)
            assert len(reply.sequences) == 2 and all(s.tokens for s in reply.sequences)
            self.count += 1


class Trainer(Client):
    """Steps of one adapter, saved now and then; after a restart it goes on from its last acknowledged save."""

    def __init__(self, job: dict[str, Any], number: int, stop: threading.Event) -> None:
        super().__init__(job, number, stop)
        self.losses: dict[int, float] = {}
        self.saved: list[str] = []
        self.continued = self.from_scratch = self.tried_again = 0

    def run(self) -> None:
        client, step = self.opened()
        while not self.stop.is_set():
            try:
                start = time.monotonic()
                self.step(client, step)
                self.seconds.append(time.monotonic() - start)
                step += 1
                if step % SAVE_EVERY == 0:
                    self.saved.append(client.save_state(f"step-{step}").result().path)
                    self.sample(client)
            except Exception as error:  # the SDK's own classes differ from call to call
                if not lost(error):
                    raise
                self.continued, self.from_scratch = self.continued + bool(self.saved), self.from_scratch + (not self.saved)
                client, step = self.opened()

    def sample(self, client: Any) -> None:
        """From a snapshot that is not saved, and that nobody uses again, as in RL: memory must not grow by it."""
        from tinker import types

        sampler = client.save_weights_and_get_sampling_client()
        sampler.sample(types.ModelInput.from_ints([3, 4]), 1, types.SamplingParams(max_tokens=1)).result()

    def start(self) -> tuple[Any, int]:
        """A training client and the number of its next step: after the last acknowledged save, else from the beginning.

        In a session of its own; the one before is ended.
        """
        self.service.close("success").result()
        self.service = self.connect()
        if not self.saved:
            return self.service.create_lora_training_client(self.job["model"], rank=RANK, seed=self.number).result(), 0
        uri = self.saved[-1]
        client = self.service.create_training_client_from_state_with_optimizer(uri).result()
        return client, int(CHECKPOINT.match(uri)[1])  # type: ignore[index]

    def opened(self) -> tuple[Any, int]:
        """`start`, once more where the server goes away in the middle of it."""
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                return self.start()
            except Exception as error:
                if not lost(error) or time.monotonic() > deadline:
                    raise
                self.tried_again += 1
                time.sleep(1)

    def step(self, client: Any, step: int) -> None:
        from tinker import types

        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(row[:-1]),
                loss_fn_inputs={"target_tokens": types.TensorData.from_torch(as_tensor(row[1:]))},
            )
            for row in rows(self.number, step)
        ]
        gradient = client.forward_backward(data, "cross_entropy")
        update = client.optim_step(types.AdamParams(learning_rate=RATE))
        loss = gradient.result().metrics["loss:sum"]
        update.result()
        if step in self.losses and abs(self.losses[step] - loss) > 1e-4 * loss:
            raise AssertionError(f"step {step} once more: {loss} after {self.losses[step]}")
        self.losses[step] = loss


def lost(error: Exception) -> bool:
    """What a server that goes away and comes back says: nothing, a promise of before (410), a training run not loaded (404)."""
    import tinker

    words = ("the server was restarted", "Promise expired/broken")
    return isinstance(error, tinker.APIConnectionError) or any(one in str(error) for one in words)


if __name__ == "__main__":
    main()
