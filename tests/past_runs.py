"""Run directories as long runs leave them, written in a second: for what reads runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from cookbook import records
from cookbook.run_record import prepare
from cookbook.token_texts import TokenTexts
from core import Datum, ForwardBackwardOutput

CONFIG = """\
name: {name}
run_dir: null
seed: {seed}
steps: {steps}
group_size: 8
learning_rate: {rate}
model:
  name: smollm2-135m-instruct-q4_1
env:
  name: arithmetic
  digits: 2
"""
WORDS = ["the", "sum", "of", "two", "numbers", "is", "what", "we", "want", "so", "add", "ones", "first", "then", "carry"]


def rl_run(directory: Path, steps: int, *, seed: int = 0, rate: float = 2e-4, file_every: int = 20) -> Path:
    """Metrics of every step, rollouts of some, evaluations every tenth of the way; completed."""
    draw = random.Random(seed)
    config = CONFIG.format(name=directory.name, seed=seed, steps=steps, rate=rate)
    prepare(directory, recipe="rl/reinforce", config_yaml=config, overrides=[f"seed={seed}", f"learning_rate={rate}"])
    rows = [{"progress/step": 0, "eval/arithmetic/reward": 0.21, "eval/arithmetic/correct": 0.2}]
    for step in range(1, steps + 1):
        rows.append(metrics(step, steps, draw))
        if step % max(1, steps // 10) == 0:
            rows[-1] |= {"eval/arithmetic/reward": 0.2 + 0.75 * step / steps, "eval/arithmetic/correct": 0.75 * step / steps}
        if step % file_every == 0 or step == 1:
            rollouts(directory, f"{step:06d}", 8, 8, step / steps, draw)
    for step in (0, steps):
        rollouts(directory, f"eval-{step:06d}", 8, 1, step / steps, draw)
    records.write_rows(directory / "metrics.jsonl", rows)
    result = {
        "status": "completed", "steps": steps, "seconds": 4.5 * steps, "best": {}, "checkpoint": None,
        "eval": {"before": {"arithmetic/reward": 0.21}, "after": {"arithmetic/reward": 0.95}},
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result))
    return directory


def metrics(step: int, steps: int, draw: random.Random) -> dict[str, float]:
    done = step / steps
    reward = min(1.0, max(0.0, 0.2 + 0.75 * (1 - math.exp(-4 * done)) + draw.gauss(0, 0.06)))
    noisy = {
        f"{group}/{name}": abs(draw.gauss(size, size / 10))
        for group, name, size in [
            ("env", "all/turns", 1), ("env", "all/format", 1), ("group", "frac_mixed", 0.5), ("group", "frac_all_good", 0.3),
            ("group", "frac_all_bad", 0.2), ("sampling", "tokens_per_turn", 40), ("sampling", "entropy", 1.1),
            ("sampling", "truncated_frac", 0.02), ("sampling", "extension_rate", 1), ("kl", "sample_train_v1", 1e-4),
            ("kl", "sample_train_v2", 2e-5), ("kl", "max_abs_dlogprob", 1e-3), ("ratio", "p99", 1),
            ("ratio", "clip_frac", 0.01), ("optim", "grad_norm", 0.8), ("perf", "sample_tokens_per_second", 5200),
            ("perf", "train_tokens_per_second", 9000), ("perf", "peak_memory_gb", 31),
            ("time", "step", 4.5), ("time", "sample", 3), ("time", "train", 1.5),
        ]
    }  # fmt: skip
    return {
        "progress/step": step, "env/all/reward": reward, "env/all/correct": reward**2, **noisy, "optim/lr": 2e-4,
        "progress/done_frac": done, "progress/tokens": 20_000 * step, "progress/episodes": 512 * step,
    }  # fmt: skip


def rollouts(directory: Path, stem: str, problems: int, attempts: int, skill: float, draw: random.Random) -> None:
    rows = []
    for problem in range(problems):
        a, b = draw.randrange(10, 99), draw.randrange(10, 99)
        rewards = [float(draw.random() < 0.1 + 0.8 * skill) for _ in range(attempts)]
        for attempt, reward in enumerate(rewards):
            said = [f" {word}" for word in draw.choices(WORDS, k=draw.randrange(20, 70))]
            said += [" ", str(a + b if reward else a + b + 10), ".", "<|im_end|>"]
            turn = {
                "prompt_tokens": 20, "tokens": list(range(len(said))), "ended": "stop", "reward": reward,
                "metrics": {}, "texts": said, "logprobs": [round(-draw.expovariate(1.2), 3) for _ in said],
            }  # fmt: skip
            mean = sum(rewards) / attempts
            asked = {"role": "user", "content": f"What is {a} + {b}? Reply with just the number."}
            rows.append({
                "problem": problem, "attempt": attempt, "tag": "", "reward": reward, "ended": "done", "error": None,
                "advantage": reward - mean if 0 < mean < 1 else None, "metrics": {"correct": reward},
                "messages": [asked, {"role": "assistant", "content": "".join(said[:-1])}], "turns": [turn],
            })  # fmt: skip
    (directory / "rollouts").mkdir(exist_ok=True)
    records.write_rows(directory / "rollouts" / f"{stem}.jsonl", rows)


def logprobs(data: list[Datum], mean: float) -> ForwardBackwardOutput:
    """What a forward pass says of `data`, each logprob around `mean`."""
    import torch

    def drawn(datum: Datum) -> torch.Tensor:
        return mean * torch.rand(datum.model_input.length, generator=torch.Generator().manual_seed(1)) * 2

    return ForwardBackwardOutput([{"logprobs": drawn(datum)} for datum in data])


def words_of(text: str) -> tuple[list[int], TokenTexts]:
    """Token i is the i-th word of `text`, for data that reads as text does."""
    pieces = [word if index == 0 else f" {word}" for index, word in enumerate(text.split(" "))]
    return list(range(len(pieces))), TokenTexts(lambda tokens: "".join(pieces[token] for token in tokens))
