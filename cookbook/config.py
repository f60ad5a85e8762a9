"""The groups of keys that recipes share (`model.*`, `lora.*`, ...): types, defaults, meaning. conf/ holds values only."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cookbook.errors import UsageError

LEAST = {"keep_last": 0, "save_every": 0, "save_minutes": 0, "eval_every": 0, "log.every": 1, "data.max_bad": 0}


@dataclass
class ModelConfig:
    name: str = "smollm2-135m-instruct-q4_1"  # the embedded model's id, a hub id, a directory, or a .gguf file
    chat_template: str | None = None  # a built-in template (chatml, plain), a .jinja file, or null: the tokenizer's own
    thinking: bool | None = (
        None  # passed to templates that know `enable_thinking` (Qwen3); null: the template's default
    )


@dataclass
class LoraConfig:
    rank: int = 32
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass
class DataConfig:
    name: str = "gsm_symbolic"  # a generated set, `file`, `mixture`, or a label for the hub set in `path`
    path: str | None = None  # local file (json, jsonl, parquet, csv; with name=file) or hub data set
    config: str | None = None  # hub configuration (subset)
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)  # standard name -> name in the file
    train_on: str | None = None  # last | all (replies) | everything | flags (per-message `train` or `weight`); null: flags, all
    size: int = 2000  # rows of a generated set
    limit: int | None = None  # use the first N rows
    eval_rows: int = 100  # held out from the end of the (seed-)shuffled rows
    overlong: str = "drop"  # drop | truncate | error, for rows over max_length
    max_bad: float = 0.05  # share of unreadable rows above which the run refuses to start
    streaming: bool = False  # read a hub set or jsonl file as it goes (shuffled in a buffer)
    sources: dict[str, float] = field(default_factory=dict)  # name=mixture: preset or file path -> weight


@dataclass
class PromptsConfig:
    """Prompts of one's own for RL, in place of an env. Columns: prompt (text or messages), others go to the rewards."""

    name: str | None = None  # null: an env asks; else `file`, `mixture`, or a label for the hub set in `path`
    path: str | None = None  # local file (json, jsonl, parquet, csv; with name=file) or hub data set
    config: str | None = None  # hub configuration (subset)
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)  # standard name -> name in the file
    limit: int | None = None  # use the first N rows
    eval_rows: int = 100  # held out from the end of the (seed-)shuffled rows, at most a fifth
    max_bad: float = 0.05  # share of unreadable rows above which the run refuses to start
    sources: dict[str, float] = field(default_factory=dict)  # name=mixture: preset or file path -> weight


@dataclass
class SamplesConfig:
    """What is sampled at each evaluation of a recipe that trains without rollouts."""

    prompts: int = 2  # held-out ones, answered greedily and shown before and after; 0: none
    max_tokens: int = 96  # of an answer
    env: dict[str, Any] = field(default_factory=dict)  # scored too: eval.env.name=gsm8k and its keys
    problems: int = 32  # of that env, held-out ones
    samples: int = 1  # attempts at each; from 2 on pass@k is reported too
    temperature: float = 0.0  # of those; 0: the likeliest token


@dataclass
class JudgeConfig:
    """The reward called `judge`: a language model behind an OpenAI-compatible API says how good a reply is."""

    url: str | None = None  # such as http://localhost:8000/v1; null: nothing is sent anywhere
    model: str | None = None  # what that server calls it
    prompt: str | None = None  # text or file with {prompt}, {reply} and {<column>} in it; null: a plain one
    api_key_env: str | None = None  # the environment variable that holds the key
    max_tokens: int = 512  # of its answer
    timeout: float = 60.0  # seconds for one answer
    retries: int = 3  # after a failed connection, a time-out, 429 or 5xx
    in_flight: int = 16  # questions asked at the same time


@dataclass
class OptimConfig:
    schedule: str = "linear"  # constant | linear | cosine, after the warm-up
    warmup_steps: int = 5
    min_ratio: float = 0.0  # the schedule ends at learning_rate * min_ratio
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # 0: no clipping


@dataclass
class EngineConfig:
    dtype: str = "auto"  # auto | bfloat16 | float32
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    token_budget: int | None = None  # tokens per micro-batch; null: by machine, written to config.yaml
    kv_tokens: int | None = None  # room for keys and values of what is being sampled, in tokens; null: by machine
    train_share: float = 0.5  # of the time, for training while samples wait too
    cuda_graphs: bool = True  # capture decode steps on CUDA (off: to measure what it gains, or to debug)
    exact: bool = False  # numbers of a sequence do not depend on what runs beside it, in bf16 too; several times slower
    park_after: float | None = None  # s unused until an adapter waits in host memory; null: 600 on CUDA, else never


@dataclass
class LogConfig:
    wandb: str = "off"  # off | online | offline
    wandb_project: str = "cook"  # trackio's project too
    group: str | None = None  # of runs that belong together, on W&B and trackio; a sweep sets its name
    trackio: bool = False  # a local dashboard (extra `trackio`): trackio show --project cook
    every: int = 1  # console line every N steps (metrics.jsonl always has each step)
    report: bool = True  # report.html in the run directory, at checkpoints and at the end
    progress: bool = True  # live progress bar on a terminal


def check_values(config: object) -> None:
    """Refuse what no run can mean by keys that many recipes have; a recipe of somebody's own may lack any of them."""

    def value_of(key: str) -> Any:
        return functools.reduce(lambda node, name: getattr(node, name, None), key.split("."), config)

    for key, least in LEAST.items():
        if (value := value_of(key)) is not None and not value >= least:
            raise UsageError(f"{key}={value}: expected at least {least}")
    if (share := value_of("data.max_bad")) is not None and share > 1:
        raise UsageError(f"data.max_bad={share:g}: expected a share of the rows, from 0 to 1")
    name = value_of("name")
    if name and (".." in Path(name).parts or Path(name).is_absolute()):
        raise UsageError(f"name={name}: expected a name under runs/; run_dir= takes any directory")
