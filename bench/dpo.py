"""DPO steps per second of this engine and of TRL's DPOTrainer with PEFT, on one machine in one run.

    uv run --group bench python -m bench.dpo                  # against TRL, alternating steps

The task of `cook dpo`: generated pairs of at most 256 tokens, 8 a step, SmolLM2-135M in the CPU's fast dtype, rank 32 on
attention and MLP (PEFT's all-linear), AdamW. The reference is computed on both sides: by TRL with the adapter off in each
step, by ours in a forward of its own for the next batch. Ours is recipes/dpo/pairs.py's loop, its log and metrics included.
Both live in processes of their own and take turns; ratios are medians over rounds, the first left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time

from bench.sft import RESULTS, Worker

SETTINGS = {"1 pair": 1, "2 pairs": 2, "8 pairs": 8}  # of a forward and backward of TRL's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1", help="a model name, directory or .gguf file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=4, help="steps of each side; the first is not counted")
    parser.add_argument("--trl", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING", help="of SETTINGS")
    args = parser.parse_args()
    result = compare(args)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "dpo.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def compare(args: argparse.Namespace) -> dict:
    from bench.machine import describe, fast_dtype
    from cookbook.generated_pairs import gsm_symbolic_pairs
    from core.models import local_model

    about = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python -m bench.dpo", *sys.argv[1:]])}
    result = {**about, "machine": describe(args.device), "dtype": fast_dtype(args.device), "pairs": 8, "against": []}
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in gsm_symbolic_pairs(500)]
    for name in args.trl:
        scratch = tempfile.mkdtemp(prefix="bench-dpo-")
        shared = {"device": args.device, "scratch": scratch, "pairs": 8, "steps": args.rounds}
        ours = Worker("bench.dpo_worker", {**shared, "model": args.model})
        setting = {"pairs": SETTINGS[name], "dtype": result["dtype"]}
        same = [rows[i] for i in ours.ready["rows"]]
        peer = Worker("bench.dpo_trl_worker", {**shared, "model": local_model(args.model), "setting": setting, "rows": same})
        pairs = [(ours.ask({"go": True}), peer.ask({"go": True})) for _ in range(args.rounds)]
        for worker in (ours, peer):
            worker.end()
        result["against"].append(summary(name, pairs))
        print(result["against"][-1], flush=True)
    return result


def summary(name: str, rounds: list[tuple[dict, dict]]) -> dict:
    (first_mine, first_theirs), *counted = rounds
    return {
        "trl": name,
        "cook_seconds": round(statistics.median(a["seconds"] for a, _ in counted), 2),
        "trl_seconds": round(statistics.median(b["seconds"] for _, b in counted), 2),
        "ratio": round(statistics.median(b["seconds"] / a["seconds"] for a, b in counted), 2),
        "cook_tokens_per_second": round(statistics.median(a["tokens"] / a["seconds"] for a, _ in counted), 1),
        "cook_peak_gb": round(rounds[-1][0]["peak_gb"], 2),
        "trl_peak_gb": round(rounds[-1][1]["peak_gb"], 2),
        "first_losses": [round(first_mine["loss"], 5), round(first_theirs["loss"], 5)],
    }


if __name__ == "__main__":
    main()
