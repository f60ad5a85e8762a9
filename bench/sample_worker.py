"""This engine's sampler in a process of its own, answering requests when told to: see bench/sample.py."""

from __future__ import annotations

import json
import statistics
import sys
import time

from bench.channel import opened

LEARNING_RATE = 1e-4


def main() -> None:
    job, say = opened()
    bench = Bench(job)
    say(**bench.about())
    for line in sys.stdin:
        command = json.loads(line)
        say(getattr(bench, command.pop("do"))(**command))


class Bench:
    """Clients 0 ... are snapshots of adapters that have been trained a step, client -1 is the base model."""

    def __init__(self, job: dict) -> None:
        from core import EngineOptions, ServiceClient

        self.device = job["device"]
        options = EngineOptions(job["dtype"], self.device, kv_tokens=job["kv_tokens"], cuda_graphs=job["cuda_graphs"])
        service = ServiceClient(job["scratch"], options)
        opening = [service.create_lora_training_client(job["model"], rank=32, seed=i) for i in range(job["adapters"])]
        self.trainers = [future.result() for future in opening]
        for trainer in self.trainers:
            self._train(trainer, job["row"])
        self.clients = [trainer.save_weights_and_get_sampling_client().result() for trainer in self.trainers]
        self.clients.append(service.create_sampling_client(base_model=job["model"]).result())

    def about(self) -> dict:
        """dtype, bytes read for each decode step, and for each token of each sequence's past."""
        engine = self.trainers[0].engine
        decoder, heads = engine.decoder, engine.decoder.heads
        num_read = decoder.num_parameters
        if not decoder.model.config.tie_word_embeddings:
            num_read -= decoder.embedding.numel()  # a row for each token, no more
        size = decoder.dtype.itemsize
        return {
            "dtype": self.trainers[0].get_info().dtype,
            "weight_bytes": num_read * size,
            "kv_bytes": 2 * len(decoder.layers) * heads.kv * heads.size * size,
        }

    def sample(self, requests: list) -> dict:
        start = time.perf_counter()
        answers = self._submit(requests)
        found = [answer.result().sequences[0].tokens for answer in answers]
        seconds = time.perf_counter() - start
        assert [len(tokens) for tokens in found] == [max_tokens for _, max_tokens, _ in requests]
        return {"seconds": seconds, "tokens": sum(map(len, found))}

    def first_token(self, request: list, company: list) -> dict:
        """Of one request, with `company` already decoding."""
        answers = self._submit(company)
        if company:
            time.sleep(0.5)
        start = time.perf_counter()
        self._submit([request])[0].result()
        seconds, alone = time.perf_counter() - start, all(answer.done() for answer in answers)
        for answer in answers:
            answer.result()
        return {"seconds": seconds, "company_gone": alone and bool(company)}

    def snapshot(self, row: list, times: int) -> dict:
        """Seconds from the end of an optim_step to a sampling client, and of the optim_step that leaves it alone."""
        trainer, found, steps = self.trainers[0], [], []
        for _ in range(times):
            steps.append(self._train(trainer, row))
            start = time.perf_counter()
            client = trainer.save_weights_and_get_sampling_client().result()
            found.append(time.perf_counter() - start)
            self.clients[0] = client
        return {"seconds": statistics.median(found), "worst_seconds": max(found), "optim_seconds": statistics.median(steps)}

    def parity(self, requests: list) -> dict:
        """Logprobs of sampled tokens: the sampler's less the trainer's."""
        import torch

        from core import Datum, ModelInput

        answers = [answer.result().sequences[0] for answer in self._submit(requests)]
        gaps: list[torch.Tensor] = []
        for (prompt, _, adapter), answer in zip(requests, answers, strict=True):
            tokens, num_prompt = [*prompt, *answer.tokens], len(prompt)
            weights = torch.zeros(len(tokens) - 1)
            weights[num_prompt - 1 :] = 1
            inputs = {"target_tokens": torch.tensor(tokens[1:]), "weights": weights}
            datum = Datum(ModelInput.from_ints(tokens[:-1]), inputs)
            output = self.trainers[adapter].forward([datum], "cross_entropy", logprobs="weighted").result()
            gaps.append(torch.tensor(answer.logprobs) - output.loss_fn_outputs[0]["logprobs"][num_prompt - 1 :])
        gap = torch.cat(gaps).double()
        return {
            "v1": float(gap.mean()),
            "v1_standard_error": float(gap.std() / len(gap) ** 0.5),
            "v2": float(gap.square().mean() / 2),
            "max_abs": float(gap.abs().max()),
            "tokens": len(gap),
        }

    def bandwidth(self) -> dict:
        from bench.machine import memory_bandwidth

        return {"bytes_per_second": memory_bandwidth(self.device)}

    def _submit(self, requests: list) -> list:
        from core import ModelInput, SamplingParams

        return [
            self.clients[adapter].sample(ModelInput.from_ints(prompt), 1, SamplingParams(max_tokens))
            for prompt, max_tokens, adapter in requests
        ]

    def _train(self, trainer, row: list) -> float:
        """Seconds of the optim_step."""
        import torch

        from core import AdamParams, Datum, ModelInput

        inputs = {"target_tokens": torch.tensor(row[1:]), "weights": torch.full((len(row) - 1,), 1 / len(row))}
        trainer.forward_backward([Datum(ModelInput.from_ints(row[:-1]), inputs)], "cross_entropy").result()
        start = time.perf_counter()
        trainer.optim_step(AdamParams(LEARNING_RATE)).result()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
