"""SFT tokens per second and peak memory of this engine and of TRL's SFTTrainer with PEFT, on one machine in one run.

    uv run --group bench python -m bench.sft                  # against TRL, alternating steps
    uv run python -m bench.sft --tenants 8                    # eight adapters mixed, against one and against one by one
    uv run --group bench python -m bench.sft --all-trl        # every TRL setting tried, to see which is its best
    uv run --group bench python -m bench.sft --shapes qwen3-8b --device cuda    # random weights of real shapes

Both sides live in processes of their own and take turns, so that a drifting machine speed hits both; ratios are medians over
rounds. On a GPU, whose memory is for one of them, they run one after another. Same model, same rows in the same order, rank 32
on attention and MLP (PEFT's all-linear), AdamW, the same tokens trained. TRL runs at COMPARED: its fastest of SETTINGS on a
CPU, and packed; with --shapes at those settings of FULL that fit.
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

RESULTS = Path(__file__).parent / "results"
TENANT_RANKS = [1, 2, 4, 8, 16, 32, 48, 64]
SETTINGS: dict[str, dict] = {
    "unpacked, 1 row": {"packing": None, "max_length": 512, "batch_size": 1, "accumulate": 16, "dtype": "bfloat16"},
    "unpacked, 4 rows": {"packing": None, "max_length": 512, "batch_size": 4, "accumulate": 4, "dtype": "bfloat16"},
    "wrapped 512": {"packing": "wrapped", "max_length": 512, "batch_size": 1, "accumulate": 6, "dtype": "bfloat16"},
    "wrapped 512 fp32": {"packing": "wrapped", "max_length": 512, "batch_size": 1, "accumulate": 6, "dtype": "float32"},
    "wrapped 1024": {"packing": "wrapped", "max_length": 1024, "batch_size": 1, "accumulate": 3, "dtype": "bfloat16"},
    "wrapped 2048": {"packing": "wrapped", "max_length": 2048, "batch_size": 1, "accumulate": 2, "dtype": "bfloat16"},
    "bfd 1024": {"packing": "bfd", "max_length": 1024, "batch_size": 1, "accumulate": 3, "dtype": "bfloat16"},
}
COMPARED = ("unpacked, 1 row", "wrapped 2048")  # its fastest here, and packed to 2,048 tokens
FULL: dict[str, dict] = {
    "1 row of 2048": {"packing": None, "max_length": 2048, "batch_size": 1, "accumulate": 8, "dtype": "bfloat16"},
    "2 rows of 2048": {"packing": None, "max_length": 2048, "batch_size": 2, "accumulate": 4, "dtype": "bfloat16"},
}  # with --shapes, whose rows fill a pack; four rows of an 8B model's shapes take more than 80 GB without checkpointing


class Worker:
    """A process that speaks JSON lines: a job first, then one reply per command."""

    def __init__(self, module: str, job: dict) -> None:
        self.errors = Path(job["scratch"]) / f"{module}.err"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.ready = self.ask(job)

    def ask(self, message: dict) -> dict:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            tail = self.errors.read_text()[-2000:]
            raise SystemExit(f"{self.process.args} ended with status {self.process.wait()}:\n{tail}")
        return json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1", help="a model name, directory or .gguf file")
    parser.add_argument("--shapes", help="qwen3-8b: random weights of that model's shapes (nothing is downloaded)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each side; the first is not counted")
    parser.add_argument("--batch", type=int, help="sequences per step; default 16, of full packs 8")
    parser.add_argument("--token-budget", type=int, help="tokens per micro-batch of this engine; default: by machine")
    parser.add_argument("--tenants", type=int, default=0)
    parser.add_argument("--all-trl", action="store_true")
    args = parser.parse_args()
    args.batch = args.batch or (8 if args.shapes else 16)
    if args.tenants:
        result = tenants(args)
    else:
        settings = FULL if args.shapes else {name: SETTINGS[name] for name in (SETTINGS if args.all_trl else COMPARED)}
        result = one_after_another(args, settings) if args.device != "cpu" else against_trl(args, settings)
    RESULTS.mkdir(exist_ok=True)
    name = "sft-tenants" if args.tenants else "sft"
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def one_after_another(args: argparse.Namespace, settings: dict[str, dict]) -> dict:
    model, rows, scratch = prepare(args)
    shared = {"model": model, "device": args.device, "rows": rows, "probe": rows[:2], "scratch": scratch}
    own = {"dtype": "auto", "token_budget": args.token_budget}
    ours = Worker("bench.cook_worker", {**shared, "rows": [], "ranks": [32], "setting": own})
    result = header(args, ours)
    batches = [[rows[(i * args.batch + j) % len(rows)] for j in range(args.batch)] for i in range(args.rounds)]
    mine = [ours.ask({"do": "step", "work": [[0, batch]]}) for batch in batches]
    flops = [ours.ask({"do": "peak"})["flops"] for _ in batches]
    ours.end()
    for name, setting in settings.items():
        job = {**shared, "setting": {**setting, "checkpointing": False}, "rank": 32, "steps": args.rounds}
        try:
            peer = Worker("bench.trl_worker", job)
            theirs = [peer.ask({"go": True}) for _ in batches]
        except SystemExit as error:
            if "OutOfMemory" not in str(error):
                raise
            print(f"TRL {name}: out of memory", flush=True)
            continue
        peer.end()
        result["against"].append(summary(name, list(zip(mine, theirs, strict=True))[1:], flops[1:], ours, peer))
        print(text(result["against"][-1]), flush=True)
    return result


def against_trl(args: argparse.Namespace, settings: dict[str, dict]) -> dict:
    from bench.machine import fast_dtype

    model, rows, scratch = prepare(args)
    shared = {"model": model, "device": args.device, "rows": rows, "probe": rows[:2], "scratch": scratch}
    own = {"dtype": "auto", "token_budget": args.token_budget}
    ours = Worker("bench.cook_worker", {**shared, "rows": [], "ranks": [32], "setting": own})
    result = header(args, ours)
    for name, given in settings.items():
        setting = {**given, "checkpointing": False}
        if fast_dtype(args.device) == "float32":
            setting["dtype"] = "float32"
        peer = Worker("bench.trl_worker", {**shared, "setting": setting, "rank": 32, "steps": args.rounds})
        pairs, flops = [], []
        for i in range(args.rounds):
            batch = [rows[(i * args.batch + j) % len(rows)] for j in range(args.batch)]
            mine = ours.ask({"do": "step", "work": [[0, batch]]})
            theirs = peer.ask({"go": True})
            pairs.append((mine, theirs))
            flops.append(ours.ask({"do": "peak"})["flops"])
        peer.end()
        result["against"].append(summary(name, pairs[1:], flops[1:], ours, peer))
        print(text(result["against"][-1]), flush=True)
    ours.end()
    return result


def summary(name: str, pairs: list[tuple[dict, dict]], flops: list[float], ours: Worker, peer: Worker) -> dict:
    mine = [a["tokens"] / a["seconds"] for a, _ in pairs]
    theirs = [b["tokens"] / b["seconds"] for _, b in pairs]
    work = 4 * ours.ready["num_parameters"]
    shares = [work * rate / peak for rate, peak in zip(mine, flops, strict=True)]
    return {
        "trl": name,
        "cook_tokens_per_second": round(statistics.median(mine), 1),
        "trl_tokens_per_second": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 2),
        "cook_peak_gb": round(pairs[-1][0]["peak_gb"], 2),
        "trl_peak_gb": round(pairs[-1][1]["peak_gb"], 2),
        "memory_ratio": round(pairs[-1][0]["peak_gb"] / pairs[-1][1]["peak_gb"], 2),
        "matmul_tflops": round(statistics.median(flops) / 1e12, 3),
        "matmul_share": round(statistics.median(shares), 2),
        "cook_first_loss": round(ours.ready["first_loss"], 4),
        "trl_first_loss": round(peer.ready["first_loss"], 4),
    }


def text(row: dict) -> str:
    return (
        f"TRL {row['trl']:18} {row['trl_tokens_per_second']:7.0f} tok/s {row['trl_peak_gb']:6.2f} GB | "
        f"cook {row['cook_tokens_per_second']:7.0f} tok/s {row['cook_peak_gb']:6.2f} GB | ratio {row['ratio']:.2f}, memory "
        f"{row['memory_ratio']:.2f}, {row['matmul_share']:.0%} of {row['matmul_tflops']} TFLOP/s (4 FLOP/parameter/token) | "
        f"first loss {row['cook_first_loss']} / {row['trl_first_loss']}"
    )


def tenants(args: argparse.Namespace) -> dict:
    """Eight adapters of ranks 1..64 with 128 tokens each per step, three ways, alternating.

    The ends of rows: one tenant would compute their common beginning (the system turn) once, and mixing alone is measured.
    """
    model, rows, scratch = prepare(args)
    short = [{"tokens": row["tokens"][-129:], "mask": row["mask"][-129:]} for row in rows]
    short = [row for row in short if sum(row["mask"][1:])]
    ranks = TENANT_RANKS[: args.tenants]
    single = len(ranks)  # one more client, of rank 32, does all the tokens alone
    worker = Worker(
        "bench.cook_worker",
        {
            "model": model,
            "device": args.device,
            "probe": rows[:2],
            "ranks": [*ranks, 32],
            "setting": {"dtype": "auto"},
            "scratch": scratch,
        },
    )
    result = header(args, worker)
    seconds: dict[str, list[float]] = {"mixed": [], "one tenant": [], "one by one": []}
    for i in range(args.rounds):
        work = [[t, [short[(i * len(ranks) + t) % len(short)]]] for t in range(len(ranks))]
        all_rows = [row for _, mine in work for row in mine]
        seconds["mixed"].append(worker.ask({"do": "step", "work": work})["seconds"])
        seconds["one tenant"].append(worker.ask({"do": "step", "work": [[single, all_rows]]})["seconds"])
        seconds["one by one"].append(worker.ask({"do": "solo", "work": work})["seconds"])
    worker.end()
    timed = {name: values[1:] for name, values in seconds.items()}
    result["ranks"] = ranks
    result["tokens_per_step"] = sum(len(row["tokens"]) - 1 for row in all_rows)
    result["seconds"] = {name: round(statistics.median(values), 3) for name, values in timed.items()}
    result["throughput_of_one_tenant"] = round(_ratio(timed["one tenant"], timed["mixed"]), 2)
    result["time_of_one_by_one"] = round(_ratio(timed["mixed"], timed["one by one"]), 2)
    print(json.dumps({k: result[k] for k in ("seconds", "throughput_of_one_tenant", "time_of_one_by_one")}))
    return result


def _ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def header(args: argparse.Namespace, worker: Worker) -> dict:
    from bench.machine import describe

    about = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python -m bench.sft", *sys.argv[1:]])}
    return {**about, "machine": describe(args.device), "token_budget": worker.ready["token_budget"], "against": []}


def prepare(args: argparse.Namespace) -> tuple[str, list[dict], str]:
    """(model directory, tokenised rows, scratch directory)."""
    scratch = tempfile.mkdtemp(prefix="bench-sft-")
    if args.shapes:
        from bench.shapes import random_model, random_rows

        return random_model(args.shapes), random_rows(args.shapes, args.rounds * args.batch), scratch
    from cookbook.config import DataConfig, ModelConfig
    from cookbook.data import load_supervised
    from cookbook.renderers import load_renderer
    from core.models import local_model

    renderer = load_renderer(ModelConfig(name=args.model))
    config = DataConfig(size=max(600, args.rounds * args.batch), eval_rows=0)
    data = load_supervised(config, renderer, seed=0, batch_size=args.batch, max_length=512)
    steps = range(min(args.rounds, data.epoch_steps or args.rounds))
    sequences = [sequence for step in steps for sequence in data.sequences(step)]
    rows = [{"tokens": s.tokens.tolist(), "mask": [int(w > 0) for w in s.weights]} for s in sequences]
    return local_model(args.model), rows, scratch


if __name__ == "__main__":
    main()
