"""`cook data check`: what a run would train on, and would it start; `cook data show`: the trained tokens marked."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from cookbook.config import DataConfig, ModelConfig
from cookbook.data_cli import check_rows, show_rows
from tests.test_data import ByteRenderer


@dataclass
class Config:
    data: DataConfig
    seed: int = 0
    batch_size: int = 4
    max_length: int = 60
    model: ModelConfig = field(default_factory=ModelConfig)


def rows_file(tmp_path: Path, lines: list[str]) -> DataConfig:
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    return DataConfig(name="file", path=str(tmp_path / "my.jsonl"), eval_rows=2, max_bad=0.2)


def row(question: str, answer: str = "ho") -> str:
    return json.dumps({"question": question, "answer": answer})


def checked(config: Config) -> tuple[int, list[str]]:
    console = Console(file=io.StringIO(), width=120)
    code = check_rows(config, ByteRenderer(), console)  # pyright: ignore[reportArgumentType]
    return code, [line.rstrip() for line in console.file.getvalue().splitlines()]  # pyright: ignore[reportAttributeAccessIssue]


def shown(config: Config, rows: int, colour: bool) -> str:
    system = "standard" if colour else None
    console = Console(file=io.StringIO(), width=60, color_system=system, no_color=False, force_terminal=True)
    show_rows(config, ByteRenderer(), rows, console)  # pyright: ignore[reportArgumentType]
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_check_prints_format_counts_reasons_lengths_and_duplicates(tmp_path):
    lines = [row(f"q{i}") for i in range(17)] + [row("q3"), "{", row(""), row("x" * 90)]
    code, said = checked(Config(rows_file(tmp_path, lines)))
    assert code == 0
    assert said[:4] == [
        "my.jsonl, detected: question/answer -> messages",
        "21 rows: 18 usable, 2 rejected, 1 overlong",
        "tokens per sequence: min 25 p50 25 p90 26 p99 26 max 26; 12% of 457 tokens trained",
        "duplicate prompts: 1 (what an earlier row asks already)",
    ]
    assert [" ".join(line.split()) for line in said[4:8]] == [
        "verdict reason rows first seen there",
        "rejected broken JSON 1 my.jsonl:19 Expecting property name enclosed in double quotes at column 2",
        "rejected empty turn 1 my.jsonl:20 question is empty",
        "overlong longer than max_length=60 1 my.jsonl:21 113 tokens",
    ]
    assert said[8] == "fine: 16 to train on, 2 held out, 4 steps of 4 per epoch"


def test_check_says_what_a_run_would_refuse(tmp_path):
    code, said = checked(Config(rows_file(tmp_path, [row(f"q{i}") for i in range(5)]), batch_size=8))
    assert code == 2
    assert " ".join(said).endswith(
        "a run would refuse: my.jsonl: 4 training rows (1 more are held out) are fewer than batch_size=8;"
        " lower batch_size, or bring more rows"
    )
    config = Config(rows_file(tmp_path, [row(f"q{i}") for i in range(20)] + [row("x" * 90)]))
    config.data.overlong = "error"
    code, said = checked(config)
    assert code == 2
    assert "a run would refuse: rows longer than max_length=60: 1, and data.overlong=error;" in " ".join(said)


def test_check_reads_only_the_beginning_of_a_stream(tmp_path):
    config = Config(rows_file(tmp_path, [row(f"q{i}") for i in range(1200)]))
    config.data.streaming = True
    _, said = checked(config)
    assert said[0] == "streaming: checking the first 1,000 usable rows"
    assert said[2] == "1,000 rows: 1,000 usable"


def test_show_brackets_trained_tokens_where_there_is_no_colour(tmp_path):
    said = shown(Config(rows_file(tmp_path, [row("[hi] é"), row("2")])), 1, colour=False).splitlines()
    assert said[0] == "my.jsonl, detected: question/answer -> messages"
    assert said[1].startswith("my.jsonl:1: 30 tokens, 3 trained (10%) ─")
    assert said[2:] == ["<|user", "[hi] é|>", "<|assistant", "[[ho|>]]", "", "trained tokens are [[in brackets]]"]


def test_show_colours_trained_tokens(tmp_path):
    said = shown(Config(rows_file(tmp_path, [row("hi")])), 1, colour=True)
    assert "<|assistant\n\x1b[1;32mho|>\x1b[0m" in said
    assert "[[" not in said
