"""RL steps per second of this engine and of TRL's GRPOTrainer with PEFT (without vLLM), on one machine in one run.

    uv run --group bench python -m bench.rl                   # against TRL at its best on a CPU, alternating steps
    uv run --group bench python -m bench.rl --all-trl         # every TRL setting tried, to see which is its best
    uv run --group bench python -m bench.rl --quick           # two short rounds

The task of `cook rl`: sums, 16 problems with 8 attempts of at most 12 tokens a step, SmolLM2-135M in bf16 (fp32 on a CPU
without it), rank 32 on attention and MLP (PEFT's all-linear), AdamW at 2e-4, no clipping, no KL term, rewards from the same
env. Ours is recipes/rl/reinforce.py itself, stopped after each turn and resumed; opening it is not counted, nor is opening
TRL's trainer. Both sides live in processes of their own and take turns; ratios are medians over rounds, the first left out.

The split of ours: sample (what the sampler takes), score (all else of rollouts: envs, rendering, parsing; measured with a
sampler that answers at once), train (advantages, gradient, update, new sampler), other (logging).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time

from bench.sft import RESULTS, Worker

SETTINGS: dict[str, dict] = {
    "128 rows": {"rows": 128},
    "64 rows": {"rows": 64},
    "32 rows": {"rows": 32},
    "16 rows": {"rows": 16},
    "128 rows, continuous batching": {"rows": 128, "continuous": True},
    "128 rows, fp32": {"rows": 128, "dtype": "float32"},
}  # rows: of a forward and backward, 128 of which take more than 20 GB in fp32; all 128 attempts are generated at once
COMPARED = ("128 rows",)
LEARNING_RATE = 2e-4
Task = dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1", help="a model name, directory or .gguf file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, help="turns of each side; the first is not counted; default 5")
    parser.add_argument("--turn", type=int, default=2, help="steps of a turn")
    parser.add_argument("--trl", nargs="+", choices=SETTINGS, default=list(COMPARED), metavar="SETTING", help="of SETTINGS")
    parser.add_argument("--all-trl", action="store_true")
    parser.add_argument("--no-trl", action="store_true", help="only the split of ours")
    parser.add_argument("--quick", action="store_true", help="two rounds of one step, 4 problems with 4 attempts")
    args = parser.parse_args()
    args.rounds, args.turn = args.rounds or (2 if args.quick else 5), 1 if args.quick else args.turn
    task: Task = {"problems": 4, "attempts": 4} if args.quick else {"problems": 16, "attempts": 8}
    result = compare(args, task)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "rl.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def compare(args: argparse.Namespace, task: Task) -> dict:
    from bench.machine import describe

    about = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python -m bench.rl", *sys.argv[1:]])}
    result = {**about, "machine": describe(args.device), **task, "against": []}
    for name in [None] if args.no_trl else list(SETTINGS) if args.all_trl else args.trl:
        result["against"].append(summary(name, *take_turns(args, task, name)))
        print(text(result["against"][-1]), flush=True)
    return result


def take_turns(args: argparse.Namespace, task: Task, name: str | None) -> tuple[list[tuple[list, list]], float]:
    """(steps of ours and of TRL's, of each round but the first; seconds of a step's rollouts without sampling)."""
    from bench.machine import fast_dtype
    from core.models import local_model

    scratch = tempfile.mkdtemp(prefix="bench-rl-")
    shared = {"device": args.device, "scratch": scratch, "max_tokens": 12, "learning_rate": LEARNING_RATE, **task}
    num_steps = args.rounds * args.turn
    ours, peer = Worker("bench.reinforce_worker", {**shared, "model": args.model}), None
    if name is not None:
        setting = {"dtype": fast_dtype(args.device), "continuous": False, **SETTINGS[name]}
        setting["rows"] = min(setting["rows"], task["problems"] * task["attempts"])
        rows = ours.ask({"do": "problems", "count": num_steps})
        job = {**shared, "model": local_model(args.model), "setting": setting, "steps": num_steps, "problem_rows": rows}
        peer = Worker("bench.grpo_worker", job)
    rounds = []
    for _ in range(args.rounds):
        mine = ours.ask({"do": "steps", "count": args.turn})
        rounds.append((mine, [peer.ask({"go": True}) for _ in range(args.turn)] if peer else []))
    score = ours.ask({"do": "score"})["seconds"]
    for worker in (ours, peer):
        if worker is not None:
            worker.end()
    return rounds[1:], score


def summary(name: str | None, rounds: list[tuple[list, list]], score: float) -> dict:
    mine = [step for steps, _ in rounds for step in steps]
    seconds = statistics.median(step["step"] for step in mine)
    sample, train = (statistics.median(step[key] for step in mine) for key in ("sample", "train"))
    row: dict = {
        "trl": name,
        "cook_seconds": round(seconds, 3),
        "split": {
            "sample": round(sample - score, 3),
            "score": round(score, 3),
            "train": round(train, 3),
            "other": round(seconds - sample - train, 3),
        },
        "cook_reward": [round(step["reward"], 2) for step in mine],
        "cook_reply_tokens": round(statistics.fmean(step["reply_tokens"] for step in mine), 1),
    }
    theirs = [step for _, steps in rounds for step in steps]
    if theirs:
        pairs = [(_total(a, "step"), _total(b, "seconds")) for a, b in rounds]
        row |= {
            "trl_seconds": round(statistics.median(step["seconds"] for step in theirs), 3),
            "ratio": round(statistics.median(b / a for a, b in pairs), 2),
            "trl_reward": [round(step["reward"], 2) for step in theirs],
            "trl_reply_tokens": round(statistics.fmean(step["reply_tokens"] for step in theirs), 1),
            "trl_peak_gb": round(theirs[-1]["peak_gb"], 2),
        }
    return row | {"cook_peak_gb": round(mine[-1]["peak_gb"], 2)}


def text(row: dict) -> str:
    split = ", ".join(f"{name} {seconds}" for name, seconds in row["split"].items())
    ours = f"cook {row['cook_seconds']} s a step ({split}), {row['cook_peak_gb']} GB"
    if row["trl"] is None:
        return ours
    return f"TRL {row['trl']}: {row['trl_seconds']} s a step, {row['trl_peak_gb']} GB | {ours} | ratio {row['ratio']}"


def _total(steps: list[dict], key: str) -> float:
    return sum(step[key] for step in steps)


if __name__ == "__main__":
    main()
