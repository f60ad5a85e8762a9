"""Sampling tokens per second of this engine and of `transformers`' generate and continuous batching, on one machine in one run.

    uv run python -m bench.sample                                   # everything; half an hour on two cores
    uv run python -m bench.sample --quick                           # a look at each part, minutes
    uv run python -m bench.sample --only concurrency --peers generate --counts 1 64
    uv run python -m bench.sample --shapes qwen3-8b --device cuda   # random weights of real shapes

Each side lives in a process of its own and they take turns on the same requests, new ones each time (a prefix cache is of no
use); figures are medians over rounds, ratios medians of each round's ratio. Sampling at T = 1 from the whole distribution, no
reply stops early. `generate` gets one left-padded batch and runs to its longest reply; only tokens asked for are counted.

  concurrency  prompts of 40-160 tokens, replies of 16-128, so many requests at once
  decode       prompts of 16 tokens, replies of 16 and 128: a step's time is that of the difference; its share of what memory
               bandwidth allows (weights and past once a step); from the base model and from one adapter (its bytes not counted)
  adapters     the mixed requests from no, one and eight adapters of rank 32
  group        16 requests of one 512-token prompt and 16 new tokens, against 16 prompts that share nothing
  first        time to the first token, idle and with company
  snapshot     optim_step done -> sampling client there
  parity       sampled logprobs less the trainer's, fp32 and bf16
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from bench.sft import RESULTS, Worker, prepare

PARTS = ("concurrency", "decode", "adapters", "group", "first", "snapshot", "parity")
PEERS = ("generate", "generate_batch")
SKIPPED = 64  # first tokens of a row, which all rows may begin with
BASE = -1  # of the adapters: none


class Requests:
    """New requests on each call: [prompt, max_tokens, adapter], prompts cut one after another from real text."""

    def __init__(self, rows: list[dict], quick: bool) -> None:
        self.tokens = [token for row in rows for token in row["tokens"][SKIPPED:]]
        self.at, self.quick, self.lengths = 0, quick, random.Random(0)

    def prompt(self, num_tokens: int) -> list[int]:
        if self.at + num_tokens > len(self.tokens):
            self.at = (self.at + 7) % num_tokens  # another cut of the same text
        self.at += num_tokens
        return self.tokens[self.at - num_tokens : self.at]

    def mixed(self, count: int, adapters: list[int] | None = None) -> list[list]:
        most = 32 if self.quick else 128
        of = adapters or [BASE]
        draw = self.lengths.randint
        return [[self.prompt(draw(40, 160)), draw(16, most), of[i % len(of)]] for i in range(count)]

    def equal(self, count: int, num_prompt: int, max_tokens: int, adapter: int = BASE) -> list[list]:
        return [[self.prompt(num_prompt), max_tokens, adapter] for _ in range(count)]


class Bench:
    """The processes, the requests and what has been found."""

    def __init__(self, args: argparse.Namespace) -> None:
        from bench.machine import describe

        self.args = args
        self.model, rows, self.scratch = prepare(argparse.Namespace(**vars(args), batch=16) if args.shapes else _text(args))
        self.requests = Requests(rows, args.quick)
        self.row = rows[0]["tokens"][:129]
        self.ours = self._worker(
            "bench.sample_worker", "cook", adapters=args.adapters, dtype=args.dtype, cuda_graphs=not args.no_graphs
        )
        self.peers: dict[str, Worker] = {}
        about = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python -m bench.sample", *sys.argv[1:]])}
        model = {"model": args.shapes or args.model, "dtype": self.ours.ready["dtype"], "rounds": args.rounds}
        self.result = {**about, "machine": describe(args.device), **model}

    def _worker(self, module: str, name: str, **job: object) -> Worker:
        scratch = Path(self.scratch) / name
        scratch.mkdir(exist_ok=True)
        shared = {"model": self.model, "device": self.args.device, "row": self.row, "kv_tokens": self.args.kv_tokens}
        shared["cuda_graphs"] = True
        return Worker(module, {**shared, "scratch": str(scratch), **job})

    def tokens_per_second(self, side: str, requests: list[list]) -> float:
        if side == "cook":
            answer = self.ours.ask({"do": "sample", "requests": requests})
        else:
            if side not in self.peers:
                dtype = self.ours.ready["dtype"]
                self.peers[side] = self._worker("bench.generate_worker", side, side=side, dtype=dtype)
                self.peers[side].ask({"requests": self.requests.equal(2, 16, 4)})
            answer = self.peers[side].ask({"requests": requests})
        return answer["tokens"] / answer["seconds"]

    def add(self, part: str, found: dict) -> None:
        self.result.setdefault(part, []).append(found)
        print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)

    def end(self) -> None:
        for worker in (self.ours, *self.peers.values()):
            worker.end()
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / "sample.jsonl").open("a") as file:
            file.write(json.dumps(self.result) + "\n")


def concurrency(bench: Bench) -> None:
    for count in bench.args.counts:
        rates: dict[str, list[float]] = {side: [] for side in ("cook", *bench.args.peers)}
        for _ in range(bench.args.rounds):
            requests = bench.requests.mixed(count)
            for side, found in rates.items():
                if side == "generate_batch" and count > bench.args.most_batched:
                    continue
                found.append(bench.tokens_per_second(side, requests))
        row: dict[str, float] = {"requests": count}
        for side, found in rates.items():
            if found:
                row[side] = round(statistics.median(found), 1)
            if found and side != "cook":
                row[f"over_{side}"] = _ratio(rates["cook"], found)
        bench.add("concurrency", row)


def decode(bench: Bench) -> None:
    num_prompt, few, many = 16, 16, 32 if bench.args.quick else 128
    for count, adapter in [(count, of) for count in bench.args.counts for of in (BASE, 0)]:
        rates, steps, shares = [], [], []
        for number in range(bench.args.rounds + 1):
            whole = {
                new: count * new / bench.tokens_per_second("cook", bench.requests.equal(count, num_prompt, new, adapter))
                for new in (few, many)
            }
            if number == 0:  # puts the adapter beside the weights, captures graphs
                continue
            bandwidth = bench.ours.ask({"do": "bandwidth"})["bytes_per_second"]
            past = count * (num_prompt + (few + many) / 2) * bench.ours.ready["kv_bytes"]
            rates.append(count * many / whole[many])
            steps.append((whole[many] - whole[few]) / (many - few))
            shares.append((bench.ours.ready["weight_bytes"] + past) / bandwidth / steps[-1])
        found = {"tokens_per_second": round(statistics.median(rates), 1), "step_ms": round(1e3 * statistics.median(steps), 2)}
        found |= {"share": round(statistics.median(shares), 3), "gb_per_second": round(bandwidth / 1e9, 1)}
        bench.add("decode", {"requests": count, "adapters": int(adapter != BASE), **found})


def adapters(bench: Bench) -> None:
    count = 16 if bench.args.quick else 64
    choices = {"none": [BASE], "one": [0], "eight": list(range(8))}
    rates: dict[str, list[float]] = {name: [] for name in choices}
    for number in range(bench.args.rounds + 1):
        for name, of in choices.items():
            rate = bench.tokens_per_second("cook", bench.requests.mixed(count, of))
            if number:  # the first puts the adapters side by side
                rates[name].append(rate)
    row: dict[str, float] = {"requests": count} | {name: round(statistics.median(found), 1) for name, found in rates.items()}
    row |= {"one_to_none": _ratio(rates["one"], rates["none"]), "eight_to_one": _ratio(rates["eight"], rates["one"])}
    bench.add("adapters", row)


def group(bench: Bench) -> None:
    size, num_prompt, num_new = 16, 512, 16
    shared, apart = [], []
    for _ in range(bench.args.rounds):
        prompt = bench.requests.prompt(num_prompt)
        shared.append(bench.tokens_per_second("cook", [[prompt, num_new, 0] for _ in range(size)]))
        apart.append(bench.tokens_per_second("cook", bench.requests.equal(size, num_prompt, num_new, adapter=0)))
    ms = {name: round(1e3 * size * num_new / statistics.median(r)) for name, r in (("shared", shared), ("apart", apart))}
    bench.add("group", {"shared_ms": ms["shared"], "apart_ms": ms["apart"], "ratio": _ratio(shared, apart)})


def first(bench: Bench) -> None:
    """A prompt of 100 tokens, its first token's time on the caller's clock."""
    sides: dict[str, list[float]] = {"cook": [], "cook among 64": []}
    if "generate" in bench.args.peers:
        sides["generate"] = []
    for _ in range(max(5, bench.args.rounds)):
        (request,) = bench.requests.equal(1, 100, 1)
        sides["cook"].append(bench.ours.ask({"do": "first_token", "request": request, "company": []})["seconds"])
        (other,), company = bench.requests.equal(1, 100, 1), bench.requests.equal(64, 16, 64)
        answer = bench.ours.ask({"do": "first_token", "request": other, "company": company})
        if not answer["company_gone"]:
            sides["cook among 64"].append(answer["seconds"])
        if "generate" in sides:
            sides["generate"].append(1 / bench.tokens_per_second("generate", [request]))
    bench.add("first", {f"{side}_ms": round(1e3 * statistics.median(found), 1) for side, found in sides.items() if found})


def snapshot(bench: Bench) -> None:
    found = bench.ours.ask({"do": "snapshot", "row": bench.row, "times": 5 if bench.args.quick else 20})
    bench.add("snapshot", {key.replace("seconds", "ms"): round(1e3 * value, 2) for key, value in found.items()})


def parity(bench: Bench) -> None:
    """In a process of its own for each dtype; adapter 0, whose B is not zero."""
    count, num_new = (16, 16) if bench.args.quick else (64, 64)
    on_cpu = bench.args.device == "cpu"
    for dtype in dict.fromkeys(("float32", bench.ours.ready["dtype"]) if on_cpu else (bench.ours.ready["dtype"],)):
        same = dtype == bench.ours.ready["dtype"]
        worker = bench.ours if same else bench._worker("bench.sample_worker", dtype, adapters=1, dtype=dtype)
        found = []
        for _ in range(bench.args.rounds):
            lengths = [bench.requests.lengths.randint(40, 160) for _ in range(count)]
            requests = [[bench.requests.prompt(length), num_new, 0] for length in lengths]
            found.append(worker.ask({"do": "parity", "requests": requests}))
        if not same:
            worker.end()
        mean = {key: statistics.fmean(one[key] for one in found) for key in ("v1", "v2")}
        error = statistics.fmean(one["v1_standard_error"] for one in found) / len(found) ** 0.5
        row = {"dtype": dtype, **{key: float(f"{value:.3g}") for key, value in mean.items()}}
        row |= {"v1_in_standard_errors": round(abs(mean["v1"]) / error, 2) if error else 0.0}
        row |= {"max_abs": float(f"{max(one['max_abs'] for one in found):.3g}"), "tokens": sum(one["tokens"] for one in found)}
        bench.add("parity", row)


def _ratio(a: list[float], b: list[float]) -> float:
    return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 2)


def _text(args: argparse.Namespace) -> argparse.Namespace:
    """Rows of the generated set of `cook sft`."""
    return argparse.Namespace(model=args.model, shapes=None, rounds=60, batch=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1", help="a model name, directory or .gguf file")
    parser.add_argument("--shapes", help="qwen3-8b: random weights of that model's shapes (nothing is downloaded)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="auto | bfloat16 | float32, of all sides")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--counts", nargs="+", type=int, help="requests at once; default 1 16 64 256")
    parser.add_argument("--rounds", type=int, help="of everything; default 3")
    parser.add_argument("--most-batched", type=int, default=256, help="generate_batch is left out above so many requests")
    parser.add_argument("--kv-tokens", type=int, help="room for keys and values of this engine, in tokens; default: by machine")
    parser.add_argument("--no-graphs", action="store_true", help="start a decode step's kernels one by one")
    parser.add_argument("--adapters", type=int, default=8, help="that this engine holds")
    parser.add_argument("--quick", action="store_true", help="one round, 1 and 16 requests, replies of at most 32 tokens")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.counts = args.counts or ([1, 16] if args.quick else [1, 16, 64, 256])
    bench = Bench(args)
    measures = dict(zip(PARTS, (concurrency, decode, adapters, group, first, snapshot, parity), strict=True))
    for part in args.only:
        measures[part](bench)
    bench.end()


if __name__ == "__main__":
    main()
