"""Wall time of a shared sweep of 8 SFT jobs against the same 8 as processes one at a time, start-up included.

    uv run python -m bench.sweep                  # SmolLM2-135M, 20 steps of 8 sequences of at most 128 tokens each
    uv run python -m bench.sweep --steps 4        # a short look

Jobs differ in learning rate and rank: 4 x 2. Both sides are `cook sft -m` as a person types it, one after the other, on the
rows of the default data that have at most 128 tokens. What a job alone takes by itself in steps is in its result.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.sft import RESULTS

RATES, RANKS = "1e-4,3e-4,6e-4,1e-3", "8,32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    result = compare(args.steps, args.device)
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "sweep.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def compare(steps: int, device: str) -> dict:
    from bench.machine import describe, fast_dtype
    from cookbook.generated import gsm_symbolic

    gsm_symbolic(400)  # made once, as on a machine that has trained before
    about = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python -m bench.sweep", *sys.argv[1:]])}
    sides = {how: run_side(how, steps, device) for how in ("shared", "process")}
    losses = [sides[how]["losses"] for how in ("shared", "process")]
    return {
        **about, "machine": describe(device), "dtype": fast_dtype(device), "jobs": 8, "steps": steps,
        "shared_seconds": sides["shared"]["seconds"], "process_seconds": sides["process"]["seconds"],
        "ratio": round(sides["shared"]["seconds"] / sides["process"]["seconds"], 3),
        "process_start_up_seconds": sides["process"]["start_up"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }  # fmt: skip


def run_side(how: str, steps: int, device: str) -> dict:
    directory = Path(tempfile.mkdtemp(prefix="bench-sweep-"), how)
    words = [
        "-m", f"hydra/launcher={how}", f"learning_rate={RATES}", f"lora.rank={RANKS}", f"run_dir={directory}", f"steps={steps}",
        "batch_size=8", "max_length=128", "data.size=400", "data.eval_rows=8", "eval_every=0", "save_every=0", "eval.prompts=0",
        f"engine.device={device}", "log.report=false",
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cookbook.cli", "sft", *words], check=True)
    seconds = time.perf_counter() - started
    jobs = json.loads((directory / "sweep.json").read_text())["jobs"]
    rows = {job["run"]: (directory / job["run"] / "metrics.jsonl").read_text().splitlines() for job in jobs}
    last = [json.loads(rows[name][-1])["train/nll"] for name in sorted(rows)]
    stepping = [sum(json.loads(line).get("time/step", 0.0) for line in lines) for lines in rows.values()]
    return {"seconds": round(seconds, 1), "losses": last, "start_up": round(seconds / len(jobs) - statistics.mean(stepping), 1)}


if __name__ == "__main__":
    main()
