"""`cook rl` in a process of its own, a few steps of one run when told to: see bench/rl.py."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench.channel import opened


def main() -> None:
    job, say = opened()
    turns = Turns(job)
    say(ready=True)
    for line in sys.stdin:
        command = json.loads(line)
        say(getattr(turns, command.pop("do"))(**command))


class Turns:
    """One run, resumed for each turn; a client of the base model keeps the engine between them."""

    def __init__(self, job: dict) -> None:
        from cookbook.compose import compose
        from core import EngineOptions, ServiceClient

        self.run_dir = Path(job["scratch"]) / f"run-{os.getpid()}"
        words = [
            f"model.name={job['model']}", f"engine.device={job['device']}", "lora.train_unembed=false", "steps=1",
            f"groups_per_batch={job['problems']}", f"group_size={job['attempts']}", f"max_tokens={job['max_tokens']}",
            f"learning_rate={job['learning_rate']}", "eval.problems=0", "eval_every=0", "save_every=0", "save_minutes=0",
            f"run_dir={self.run_dir}", "log.progress=false",
        ]  # fmt: skip
        self.config = compose("rl", words).config
        self.done = 0
        service = ServiceClient(job["scratch"], EngineOptions(device=job["device"]))
        self.base = service.create_sampling_client(base_model=job["model"]).result()

    def problems(self, count: int) -> list[dict]:
        """Prompts and answers of the first `count` steps, for the other side."""
        from cookbook.environments import problems_of
        from envs.arithmetic import Arithmetic

        rows = []
        for problem in itertools.islice(problems_of(self.config, "train"), count * self.config.groups_per_batch):
            (env,) = problem.make(1)
            assert isinstance(env, Arithmetic)
            rows.append({"prompt": env.reset(), "expression": env.expression, "answer": env.answer})
        return rows

    def steps(self, count: int) -> list[dict]:
        from recipes.rl.reinforce import main

        self.done += count
        main(replace(self.config, steps=self.done))
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()][-count:]
        names = {"time/step": "step", "time/sample": "sample", "time/train": "train", "env/all/reward": "reward"}
        names |= {"sampling/tokens_per_turn": "reply_tokens", "perf/peak_memory_gb": "peak_gb"}
        return [{name: row[key] for key, name in names.items()} for row in rows]

    def score(self) -> dict:
        """Seconds of a step's rollouts whose replies cost nothing."""
        from cookbook.environments import problems_of
        from cookbook.renderers import load_renderer
        from cookbook.rollouts import Rollouts
        from core import SamplingParams

        config, renderer = self.config, load_renderer(self.config.model)
        rollouts = Rollouts(renderer, SamplingParams(config.max_tokens, stop=renderer.stop), config.limits)
        problems = list(itertools.islice(problems_of(config, "train"), config.groups_per_batch))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            rollouts.run(problems, AtOnce(renderer.stop), config.group_size, (0,))
            times.append(time.perf_counter() - start)
        return {"seconds": sorted(times)[2]}


class AtOnce:
    """A sampler that is done when it is asked."""

    def __init__(self, stop) -> None:
        from core import SampledSequence

        self.reply = SampledSequence([*range(100, 108), stop[0]], [-1.0] * 9, "stop")

    def sample(self, prompt, num_samples: int = 1, sampling_params=None):
        from core import Future, SampleResponse

        return Future.completed(SampleResponse([self.reply] * num_samples))

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


if __name__ == "__main__":
    main()
