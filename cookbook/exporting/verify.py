"""Whether an export computes what the engine computes with the adapter: logprobs of one prompt, compared."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.config import EngineConfig
from cookbook.errors import UsageError
from cookbook.exporting.subject import Subject
from cookbook.past_policy import opened_sampler
from cookbook.service import connect

if TYPE_CHECKING:
    import torch

    from cookbook.renderers import Renderer
    from core.merge import Merged

PROMPT = [{"role": "user", "content": "What is 12 times 3, and what is the capital of France?"}]
NUM_LIKELIEST = 32  # tokens compared at each position
# What rounding costs, as a mean over those tokens: a checked export may differ by no more.
ALLOWED = {"exact": 1e-3, "f16": 0.01, "bf16": 0.1, "q8_0": 0.1}


@dataclass(frozen=True)
class Reference:
    """The engine's answer: the likeliest tokens [T, K] after each prefix of `prompt`, their logprobs, and the base's."""

    prompt: list[int]
    likeliest: torch.Tensor
    logprobs: torch.Tensor
    base_logprobs: torch.Tensor


@dataclass(frozen=True)
class Difference:
    mean: float
    largest: float
    adapter_moves: float  # the same mean between base and adapter: what a lost adapter would show
    allowed: float

    @property
    def passed(self) -> bool:
        return self.mean <= self.allowed

    def __str__(self) -> str:
        return (
            f"logprobs of the reloaded export differ by {self.mean:.2g} on average, {self.largest:.2g} at most"
            f" (allowed {self.allowed:g} on average; the adapter itself moves them by {self.adapter_moves:.2g})"
        )


def check_memory(merged: Merged) -> None:
    """Refuse at the start what cannot be reloaded in fp32 at the end."""
    import os

    needed = 4 * sum(math.prod(info.shape) for info in merged.tensors)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise UsageError(
            f"checking the export needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free:"
            " --no-verify leaves the check out (writing needs a few GB)"
        )


def reference(subject: Subject, renderer: Renderer) -> Reference:
    """In fp32 on the CPU, so that only what the export rounds can differ; the engine is gone afterwards."""
    import torch

    from core import ModelInput

    service = connect("local", Path("checkpoints"), EngineConfig(dtype="float32", device="cpu"))
    prompt = renderer.build_generation_prompt(PROMPT)
    tuned = opened_sampler(service, subject.adapter, subject.model.name)
    base = opened_sampler(service, None, subject.model.name)
    try:
        rows = [row for row in tuned.top_logprobs(prompt, NUM_LIKELIEST).result() if row is not None]
        likeliest = torch.tensor([[token for token, _ in row] for row in rows])
        logprobs = torch.tensor([[logprob for _, logprob in row] for row in rows])
        base_logprobs = base.target_logprobs(ModelInput.from_ints(prompt.to_ints()), likeliest).result()
    finally:
        tuned.close()
        base.close()
    return Reference(prompt.to_ints(), likeliest, logprobs, base_logprobs)


def compare(found: Reference, load: Callable[[], tuple[Any, Any]], allowed: float) -> Difference:
    """`load` gives the exported model and tokenizer, as their user would load them. UsageError for other tokens."""
    import torch

    model, tokenizer = load()
    tokens = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=True, return_dict=False)
    if list(tokens) != found.prompt:
        raise UsageError(
            f"the exported tokenizer makes {len(tokens)} tokens of the prompt, not the {len(found.prompt)} trained on"
        )
    with torch.no_grad():
        logits = model(torch.tensor([found.prompt])).logits[0, :-1].float()
    theirs = torch.log_softmax(logits, -1).gather(1, found.likeliest)
    apart = (theirs - found.logprobs).abs()
    moved = (found.base_logprobs - found.logprobs).abs().mean()
    return Difference(float(apart.mean()), float(apart.max()), float(moved), allowed)


def load_peft(folder: Path, base: Path) -> tuple[Any, Any]:
    from peft import PeftModel
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights: nothing is merged here
        model = PeftModel.from_pretrained(_model(base), folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def load_merged(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    return _model(folder), AutoTokenizer.from_pretrained(folder)


def load_gguf(file: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """By transformers' GGUF reader; the plain fast class, since AutoTokenizer would pick another (see core/gguf.py).

    The reader takes heads of the Qwen3 kind for 128 wide whatever the file says, so `config` (the base's) tells it.
    """
    from transformers import GgufConfig, PreTrainedTokenizerFast

    size = {"head_dim": config["head_dim"]} if config["model_type"] == "qwen3" and config.get("head_dim") else {}
    with contextlib.redirect_stderr(io.StringIO()):  # the reader's own bar, which no setting silences
        model = _model(file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), **size)
    return model, PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)


def _model(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    finally:
        logging.enable_progress_bar()
