"""At each evaluation of `cook sft` fixed prompts are answered and an env is scored, if asked for."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cookbook.cli import main
from cookbook.eval_samples import asked_of, before_and_after
from core import Datum, ModelInput
from tests.small_runs import checkpoint_rows, command, contents, metrics, newest, read_lines, result

pytestmark = pytest.mark.usefixtures("one_thread")
ENV = ("eval.env.name=arithmetic", "eval.problems=3", "eval.max_tokens=8", "eval.samples=2", "eval.temperature=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert main([*command(directory, rows), *ENV]) == 0
    return directory


def test_prompts_are_held_out_ones_and_their_answers_change_with_training(run: Path) -> None:
    files = sorted((run / "rollouts").glob("samples-*"))
    assert [file.stem for file in files] == [f"samples-{step:06d}" for step in (0, 4, 8, 12)]
    before, *_, after = map(read_lines, files)
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after] and len(before) == 2
    assert all("say " in row["prompt"] and row["prompt"].endswith("assistant\n") for row in after)
    assert all(set(row["expected"]) in ({"a"}, {"b"}) for row in after)
    assert [row["reply"] for row in before] != [row["reply"] for row in after]


def test_before_and_after_stand_side_by_side() -> None:
    console = Console(width=60, file=io.StringIO())
    console.print(before_and_after({"prompt": "2 + 2?", "reply": "[b]five"}, {"prompt": "2 + 2?", "reply": "four"}))
    asked, *_, said, _ = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "2 + 2?" in asked and "[b]five" in said and said.index("five") < said.index("four")


def test_the_env_is_scored_at_each_evaluation(run: Path) -> None:
    name = "eval/arithmetic/reward"
    assert [row["progress/step"] for row in metrics(run) if name in row] == [0, 4, 8, 12]
    assert {"arithmetic/reward", "arithmetic/correct", "arithmetic/pass@2"} <= result(run)["eval"]["after"].keys()
    assert len(read_lines(run / "rollouts/eval-000008.jsonl")) == 6


def test_sampling_beside_training_changes_no_weight(run: Path, rows: Path, tmp_path: Path) -> None:
    assert main([*command(tmp_path / "plain", rows), "eval.prompts=0"]) == 0
    assert not list((tmp_path / "plain/rollouts").glob("samples-*"))
    assert contents(newest(tmp_path / "plain")) == contents(newest(run)) and checkpoint_rows(run)


def test_a_prompt_ends_where_training_begins() -> None:
    targets, weights = torch.tensor([2, 3, 4, 5, 6]), torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    datum = Datum(ModelInput.from_ints([1, 2, 3, 4, 5]), {"target_tokens": targets, "weights": weights})
    asked = asked_of(datum)
    assert asked and asked.prompt == [1, 2, 3] and asked.expected == [4, 5]
    everything = Datum(datum.model_input, {"target_tokens": targets, "weights": torch.ones(5)})
    assert asked_of(everything) is None


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("eval.env.name=arithmetics", "no such env (did you mean arithmetic?)"),
        ("eval.max_tokens=0", "eval.max_tokens=0: expected at least 1"),
        ("eval.samples=4", "eval.samples=4 would all be the same at eval.temperature=0"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], word: str, said: str
) -> None:
    assert main([*command(tmp_path / "run", rows), word]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
