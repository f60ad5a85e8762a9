"""`--dry-run`: the data as a run would read it, one example and estimates, without weights or a run directory."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cookbook.cli import main
from cookbook.config import DataConfig, EngineConfig, LoraConfig, ModelConfig, OptimConfig
from cookbook.dryrun import (
    Plan,
    Shape,
    dry_run,
    memory_lines,
    model_without_weights,
    product_rate,
    read_shape,
    time_lines,
)
from cookbook.errors import UsageError
from core import ServiceClient
from recipes.sft.chat import Config
from tests.tiny import KINDS, tiny_model_dir

CPU = torch.device("cpu")
LLAMA_8B = Shape(
    num_parameters=8_000_000_000, num_multiplied=7_500_000_000, num_adapted=90_000_000, num_layers=32, hidden_size=4096,
    qkv_size=6144, q_size=4096, intermediate_size=14336,
)  # fmt: skip


def tiny_config(tmp_path: Path, **changes) -> Config:
    """40 rows of 29 tokens; 32 to train on make 4 steps of 8 per epoch."""
    rows = [{"question": f"{i:02d} + 1", "answer": f"{i + 1:02d}"} for i in range(40)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        model=ModelConfig(name=str(tiny_model_dir())),
        data=DataConfig(name="file", path=str(tmp_path / "my.jsonl"), eval_rows=8),
        lora=LoraConfig(rank=4),
        engine=EngineConfig(dtype="float32", device="cpu"),
        batch_size=8,
        epochs=2.0,
        eval_every=3,
        max_length=200,
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def said(config: Config) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    assert dry_run("sft", config, console) == 0
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def test_it_shows_the_data_one_example_and_what_a_run_would_do(tmp_path):
    lines = said(tiny_config(tmp_path))
    assert lines[:4] == [
        "my.jsonl, detected: question/answer -> messages",
        "40 rows: 40 usable",
        "tokens per sequence: min 29 p50 29 p90 29 p99 29 max 29; 10% of 1,160 tokens trained",
        "32 sequences to train on, 8 held out, 4 steps per epoch",
    ]
    assert lines[4].startswith("my.jsonl:") and ": 29 tokens, 3 trained (10%)" in lines[4]
    assert lines[7] == "<|im_start|>assistant"
    assert lines[8].startswith("[[") and lines[8].endswith("<|im_end|>]]")
    # 28 inputs a sequence, 8 sequences a step, 8 steps; evaluated before, after 3 and 6, and at the end
    assert "steps    8 of 8 sequences, 2 epochs: about 1,792 tokens (896 tokens per epoch, 10% trained)" in lines
    assert "evals    4 of 8 held-out sequences, 224 tokens each" in lines
    assert "rate     0.0126 at its peak, linear after 5 steps of warm-up" in lines
    assert [line.split()[0] for line in lines[-3:-1]] == ["memory", "time"]


def test_it_reads_no_weights_and_writes_nothing(tmp_path, monkeypatch):
    shutil.copytree(tiny_model_dir(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lines = said(tiny_config(tmp_path, model=ModelConfig(name=str(tmp_path / "model"))))
    assert any(line.startswith("memory") for line in lines)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_stream_has_no_epoch(tmp_path):
    config = tiny_config(tmp_path, steps=5)
    config.data.streaming = True
    assert "steps    5 of 8 sequences, of a stream: about 1,120 tokens (10% trained)" in said(config)


def test_without_the_models_configuration_there_is_no_estimate(tmp_path):
    shutil.copytree(tiny_model_dir(), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "nonesuch"}')
    lines = said(tiny_config(tmp_path, model=ModelConfig(name=str(tmp_path / "model"))))
    assert lines[-1].startswith("no estimate of memory and time: the configuration of ")
    assert lines[-2].startswith("evals")


def test_it_stops_where_a_run_would(tmp_path):
    def error(**changes) -> str:
        with pytest.raises(UsageError) as raised:
            dry_run("sft", tiny_config(tmp_path, **changes), Console(file=io.StringIO()))
        return str(raised.value)

    assert "32 training rows (8 more are held out) are fewer than batch_size=64" in error(batch_size=64)
    assert error(service="http://127.0.0.1:1").startswith("service=http://127.0.0.1:1: no server answers there")
    assert error(init_from="nowhere").startswith("init_from=nowhere: no such directory")
    assert error(optim=OptimConfig(schedule="linaer")).startswith("optim.schedule=linaer is unknown, did you mean lin")
    with pytest.raises(UsageError, match="recipes/sft, recipes/rl and recipes/dpo only"):
        dry_run("", tiny_config(tmp_path))


def test_a_sequence_over_the_models_context_is_refused(tmp_path):
    shutil.copytree(tiny_model_dir(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 20}))
    config = tiny_config(tmp_path, model=ModelConfig(name=str(tmp_path / "model")))
    with pytest.raises(UsageError, match=r"^max_length=200, but the context of .* is 20 tokens: set max_length=20 or less"):
        said(config)


def test_what_the_engine_would_refuse_is_refused(tmp_path):
    def error(**changes) -> str:
        with pytest.raises(UsageError) as raised:
            said(tiny_config(tmp_path, **changes))
        return str(raised.value)

    assert error(lora=LoraConfig(rank=0)) == "rank is 0, expected at least 1"
    assert error(lora=LoraConfig(rank=100_000)).startswith("rank is 100000, expected at most 512")
    assert error(lora=LoraConfig(4, False, False, False)).endswith("are all false: nothing to train")
    shutil.copytree(tiny_model_dir(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_types": ["sliding_attention"] * 2}))
    model = ModelConfig(name=str(tmp_path / "model"))
    assert "layers of type ['sliding_attention'] are not supported" in error(model=model)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("log.wandb=onlin", "log.wandb=onlin is unknown: it is one of off, online, offline"),
        ("run_dir=taken", "holds a run: cook resume {here}/taken, or choose another name= or run_dir="),
    ],
)
def test_where_a_run_would_lie_and_log_is_looked_at(tmp_path, monkeypatch, capsys, word, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").touch()
    assert main(["sft", word, "--dry-run"]) == 2
    assert line.format(here=tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_counted_parameters_are_those_of_the_engine(kind, tmp_path):
    name = str(tiny_model_dir(kind))
    trainer = ServiceClient(tmp_path).create_lora_training_client(name, rank=3, train_attn=False).result()
    shape = read_shape(model_without_weights(name), LoraConfig(rank=3, train_attn=False))
    assert shape.num_parameters == trainer.get_info().num_parameters
    assert shape.num_adapted == trainer.adapter.params.numel()
    assert shape.hidden_size == trainer.get_info().hidden_size
    trainer.close()


def test_memory_is_the_sum_of_its_parts(tmp_path):
    config = tiny_config(tmp_path, engine=EngineConfig(token_budget=1000))
    plan = Plan(num_steps=10, step_tokens=8000, eval_tokens=0, num_evals=0, longest=300)
    line, *more = memory_lines(LLAMA_8B, config, plan, torch.bfloat16, CPU)
    # 16 bytes a parameter and two bf16 copies; 32 layers of 8 bytes a residual value and 2 bytes a kept one
    activations = 1000 * 32 * (8 * 4096 + 2 * (2 * 6144 + 4096 + 2 * 14336 + 256)) / 1e9
    assert f"base 8,000M parameters {32:.2f}, adapter 90M parameters {1.8:.2f}" in line
    assert f"activations of 1,000 tokens {activations:.2f}, libraries and data" in line
    assert all("free now" in warning for warning in more)


def test_time_is_four_flop_per_weight_and_token_at_the_expected_share():
    plan = Plan(num_steps=100, step_tokens=1000, eval_tokens=5000, num_evals=2, longest=300)
    # (4 * 100,000 + 2 * 10,000) * 7.5e9 FLOP at 0.6 of 1e14 FLOP/s
    line, assumed = time_lines(LLAMA_8B, plan, 1e14, "bfloat16")
    assert line.startswith("time     about 0:52, once the model is loaded; assumes 60% of")
    assert "measured now, 100,000 GFLOP/s in bfloat16" in assumed


def test_the_product_rate_is_measured():
    assert 1e8 < product_rate(torch.float32, CPU) < 1e15
