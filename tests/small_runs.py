"""`cook sft` on a tiny model and a small file, typed as a person would; and what its run directory holds afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from cookbook.cli import main
from tests.tiny import tiny_model_dir

WEIGHTS, MOMENTS = "adapter_model.safetensors", "optimizer.safetensors"
SAME = ("train/", "dpo/", "eval/", "optim/", "progress/")  # metrics that equal runs share; time and speed they do not


def chat(number: int) -> dict[str, object]:
    """A row that teaches to answer in a's or in b's."""
    letter = "ab"[number % 2]
    asked = {"role": "user", "content": f"say {letter}, {number}"}
    return {"messages": [asked, {"role": "assistant", "content": letter * (4 + number % 7)}]}


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    """A jsonl file; a row that is bytes is written as it is."""
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


def command(run_dir: Path, data: Path, kind: str = "sft", **changes: object) -> list[str]:
    """`cook sft` (or another kind) of half a second: data_eval_rows=4 in `changes` is data.eval_rows=4."""
    values: dict[str, object] = {
        "model_name": tiny_model_dir(), "engine_dtype": "float32", "engine_device": "cpu", "lora_rank": 4,
        "data_path": data, "data_eval_rows": 6, "steps": 12, "batch_size": 4, "max_length": 128, "learning_rate": 0.01,
        "eval_every": 4, "save_every": 2, "run_dir": run_dir, **changes,
    }  # fmt: skip
    return [kind, "data=file", *(f"{_dotted(key)}={_typed(value)}" for key, value in values.items())]


ROOT_KEYS = ("eval_every",)


def _dotted(key: str) -> str:
    group, _, rest = key.partition("_")
    is_grouped = group in ("model", "engine", "lora", "data", "eval", "optim", "log") and key not in ROOT_KEYS
    return f"{group}.{rest}" if is_grouped else key


def _typed(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def train(run_dir: Path, data: Path, kind: str = "sft", **changes: object) -> int:
    """The exit status of `cook sft`, or of another kind."""
    return main(command(run_dir, data, kind, **changes))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run_dir: Path) -> list[dict]:
    return read_lines(run_dir / "metrics.jsonl")


def repeatable(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl without what a clock measured."""
    return [{key: value for key, value in row.items() if key.startswith(SAME)} for row in metrics(run_dir)]


def steps_in(run_dir: Path) -> list[int]:
    return [row["progress/step"] for row in metrics(run_dir)]


def losses(run_dir: Path) -> list[float]:
    return [row["train/nll"] for row in metrics(run_dir) if "train/nll" in row]


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def checkpoint_rows(run_dir: Path) -> list[dict]:
    return read_lines(run_dir / "checkpoints.jsonl")


def saved_steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in checkpoint_rows(run_dir)]


def newest(run_dir: Path) -> Path:
    """The directory of the last checkpoint."""
    return run_dir / checkpoint_rows(run_dir)[-1]["path"]


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Weights and moments, to the bit."""
    return {name: (checkpoint / name).read_bytes() for name in (WEIGHTS, MOMENTS)}


def weights(checkpoint: Path) -> Mapping[str, torch.Tensor]:
    return load_file(checkpoint / WEIGHTS)


# ---- runs in processes of their own, for signals and kills

ROOT = Path(__file__).parent.parent
FORK_SERVER = """
import json, os, sys
import recipes.sft.chat, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from cookbook.cli import main
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        screen = os.open(job["screen"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(screen, 1), os.dup2(screen, 2), os.chdir(job["here"])
        sys.exit(main(job["words"]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Processes:
    """Each `start` is a process that runs `cook`, forked after the imports (most of the time that a start takes)."""

    def __init__(self, screen: Path) -> None:
        self.screen = screen  # what the last one printed
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == "ready"

    def start(self, words: list[str], here: Path = ROOT) -> None:
        assert self._server.stdin is not None
        job = {"words": words, "screen": str(self.screen), "here": str(here)}
        print(json.dumps(job), file=self._server.stdin, flush=True)
        self._process = int(self._answer())

    def signal(self, number: int) -> None:
        """Nothing happens to a process that has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, number)

    @property
    def has_ended(self) -> bool:
        return not Path(f"/proc/{self._process}").exists()

    def wait(self) -> int:
        """The exit status, -9 after a kill."""
        return int(self._answer())

    def run(self, words: list[str], here: Path = ROOT) -> int:
        self.start(words, here)
        return self.wait()

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().rstrip("\n")


def wait_until(fact: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def num_rows(run_dir: Path) -> int:
    """Whole lines of metrics.jsonl by now."""
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0
