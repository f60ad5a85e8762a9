"""Supervised fine-tuning: maximise the log-probability of the assistant's tokens.

    loss = - sum_t w_t log p(token_t | tokens before t) / sum_t w_t        over the batch; w is 1 on trained tokens, else 0

Left out: gradient accumulation (the engine cuts any batch into micro-batches; gradients add up exactly),
label smoothing, and example packing as an option (the engine always packs; sequences never see each other).

    uv run cook sft                                          # SmolLM2-135M on grade-school problems, minutes on a CPU
    uv run cook sft model=qwen3-8b data=no_robots            # a CUDA GPU
    uv run cook sft data=file data.path=my.jsonl epochs=3
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cookbook.config import DataConfig, EngineConfig, EvalConfig, LogConfig, LoraConfig, ModelConfig, OptimConfig
from cookbook.data import load_supervised
from cookbook.renderers import load_renderer
from cookbook.run import Run
from cookbook.schedule import default_learning_rate, learning_rate_at
from cookbook.service import connect, start_trainer
from core import AdamParams


@dataclass
class Config:
    name: str | None = None  # of the run; null: made from model, data and time
    run_dir: str | None = None  # null: runs/<name>
    seed: int = 0  # adapter init and data order
    steps: int | None = None  # optimizer steps; null: `epochs` passes over the rows
    epochs: float = 1.0
    batch_size: int = 32  # sequences per step
    learning_rate: float | None = None  # peak; null: the model's default (printed at the start)
    max_length: int = 2048  # tokens per sequence
    init_from: str | None = None  # a run, a tinker:// URI or an adapter directory to start from
    eval_every: int = 20  # steps; 0: only before and after
    save_every: int = 50  # steps; 0: only at the end
    save_minutes: float = 10.0  # also after so many minutes; 0: never
    keep_last: int = 3  # checkpoints kept, beside the best and the final one
    service: str = "local"  # local, or the URL of a server
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
