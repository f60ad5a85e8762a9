"""The other end of bench/sft.py's Worker: jobs come and replies go as lines of JSON; and what the workers of TRL share."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from cookbook.memory import peak_memory_gb

Say = Callable[..., None]


def opened() -> tuple[dict[str, Any], Say]:
    """The job, and a function that sends a reply; whatever libraries print goes to stderr."""
    job = json.loads(sys.stdin.readline())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(reply: Any = None, /, **figures: Any) -> None:
        out.write(json.dumps(figures if reply is None else reply) + "\n")
        out.flush()

    return job, say


def without_hub() -> None:
    """For transformers on its own, before it is imported: models are local directories."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# ---- TRL's side


def base_model(job: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job["setting"]["dtype"])
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa").to(job["device"])


def trainer_options(job: dict[str, Any]) -> dict[str, Any]:
    """Of each trainer's config: plain steps, nothing logged or saved."""
    return {
        "output_dir": job["scratch"], "max_steps": job["steps"], "lr_scheduler_type": "constant", "report_to": [],
        "save_strategy": "no", "logging_steps": 1_000_000, "bf16": job["setting"]["dtype"] == "bfloat16",
        "use_cpu": job["device"] == "cpu", "dataloader_num_workers": 0, "disable_tqdm": True, "max_grad_norm": 0.0,
        "weight_decay": 0.0,
    }  # fmt: skip


def all_linear(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def stepping(job: dict[str, Any], say: Say, begin: Callable[[], None], figures: Callable[[], dict[str, Any]]) -> Any:
    """A callback that starts each step when told to and sends its time, its peak memory and `figures`."""
    import torch
    from transformers import TrainerCallback

    class Step(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            sys.stdin.readline()
            begin()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if job["device"] != "cpu":
                torch.cuda.synchronize()
            say(seconds=time.perf_counter() - self.start, peak_gb=peak_memory_gb(), **figures())

    return Step()
