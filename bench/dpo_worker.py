"""recipes/dpo/pairs.py in a process of its own, stepping when told to: see bench/dpo.py."""

from __future__ import annotations

import sys
import time
from functools import partial

from bench.channel import opened
from cookbook.memory import peak_memory_gb


def main() -> None:
    job, say = opened()

    from cookbook.config import DataConfig, LoraConfig, ModelConfig, SamplesConfig
    from cookbook.dpo import Session, share_of_mean
    from cookbook.preferences import load_pairs
    from cookbook.run import Run
    from recipes.dpo.pairs import Config, score

    config = Config(
        run_dir=job["scratch"] + "/run", steps=job["steps"], batch_size=job["pairs"], max_length=256, eval_every=0,
        learning_rate=1e-5, save_every=0, save_minutes=0, model=ModelConfig(name=job["model"]),
        lora=LoraConfig(rank=32, train_unembed=False), eval=SamplesConfig(prompts=0),
        data=DataConfig(name="gsm_symbolic_pairs", size=500, eval_rows=0),
    )  # fmt: skip
    config.engine.device = job["device"]
    with Run(config, "dpo/pairs") as run:
        session = Session(run, config, load_pairs, partial(score, config))
        order = [[pair.label for pair in session.data.batch(step)] for step in range(job["steps"])]
        say(ready=True, rows=[int(label[label.index("[") + 1 : -1]) for labels in order for label in labels])
        for step in session.steps():  # the loop of the recipe
            sys.stdin.readline()
            started = time.perf_counter()
            parts = session.batch(step)
            num_pairs = sum(len(part.units) for part in parts)
            gradients = []
            for part in parts:
                loss = share_of_mean(session.score, part, num_pairs)
                gradients.append(session.trainer.forward_backward_custom(part.data, loss, logprobs="weighted"))
            update = session.optim_step(step)
            first = sum(gradient.result().metrics["loss:sum"] for gradient in gradients)
            session.finish(step, parts, gradients, update)
            tokens = sum(datum.model_input.length for part in parts for datum in part.data)
            say(seconds=time.perf_counter() - started, loss=first, tokens=tokens, peak_gb=peak_memory_gb())


if __name__ == "__main__":
    main()
