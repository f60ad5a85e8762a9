"""This engine in a process of its own, stepping when told to: see bench/sft.py."""

from __future__ import annotations

import json
import sys
import time

from bench.channel import opened
from cookbook.memory import peak_memory_gb


def main() -> None:
    job, say = opened()

    from bench.machine import matmul_flops
    from core import AdamParams, EngineOptions, ServiceClient

    setting = job["setting"]
    options = EngineOptions(setting["dtype"], job["device"], setting.get("token_budget"))
    service = ServiceClient(job["scratch"], options)
    trainers = [
        service.create_lora_training_client(job["model"], rank=rank, seed=i, train_unembed=False).result()
        for i, rank in enumerate(job["ranks"])
    ]
    info = trainers[0].get_info()
    trained = sum(sum(row["mask"][1:]) for row in job["probe"])
    first = trainers[0].forward([datum(row, 1.0) for row in job["probe"]], "cross_entropy").result()
    say(
        ready=True,
        first_loss=first.metrics["loss:sum"] / trained,
        token_budget=info.token_budget,
        num_parameters=info.num_parameters,
    )
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "peak":
            say(flops=matmul_flops(trainers[0].engine.dtype, job["device"]))
            continue
        start = time.perf_counter()
        num_tokens = run(trainers, command, AdamParams(1e-4))
        say(seconds=time.perf_counter() - start, tokens=num_tokens, peak_gb=peak_memory_gb())


def run(trainers: list, command: dict, adam) -> int:
    """One optimizer step of every named tenant on its rows: all at once, or (`solo`) one after another."""
    num_tokens, updates = 0, []
    for tenant, rows in command["work"]:
        total = sum(sum(row["mask"][1:]) for row in rows)
        data = [datum(row, 1.0 / total) for row in rows]
        num_tokens += sum(d.model_input.length for d in data)
        trainers[tenant].forward_backward(data, "cross_entropy", logprobs="weighted")
        update = trainers[tenant].optim_step(adam)
        if command["do"] == "solo":
            update.result()
        updates.append(update)
    for update in updates:
        update.result()
    return num_tokens


def datum(row: dict, weight: float):
    import torch

    from core import Datum, ModelInput

    targets = torch.tensor(row["tokens"][1:])
    weights = torch.tensor(row["mask"][1:], dtype=torch.float32) * weight
    return Datum(ModelInput.from_ints(row["tokens"][:-1]), {"target_tokens": targets, "weights": weights})


if __name__ == "__main__":
    main()
