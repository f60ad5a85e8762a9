"""`cook rl --dry-run`: the first prompt, the size of the run and estimates, without weights or a run directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cookbook.cli import main
from cookbook.rl_dryrun import Workload
from recipes.rl.reinforce import Config
from tests.tiny import tiny_model_dir


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny model without its weights."""
    shutil.copytree(tiny_model_dir(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def said(capsys: pytest.CaptureFixture[str], model: Path, *words: str, status: int = 0) -> str:
    sizes = ["steps=6", "groups_per_batch=4", "group_size=8", "max_tokens=10", "eval_every=3"]
    here = [f"model.name={model}", "engine.dtype=float32", "engine.device=cpu"]
    capsys.readouterr()
    assert main(["rl", "--dry-run", *here, *sizes, *words]) == status
    screen = capsys.readouterr()
    return screen.err if status else screen.out


def test_it_shows_the_first_prompt_and_the_size_of_the_run(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lines = said(capsys, model, "eval.problems=7", "eval.samples=2", "eval.temperature=1").splitlines()
    assert any("What is 5 + 8? Reply with just the number." in line for line in lines)
    assert "steps    6 of 4 problems with 8 attempts each: up to 1,920 sampled tokens, 10 a reply and turn" in lines
    assert "evals    3 of 7 held-out problems, attempts at each: 2" in lines
    assert [line.split()[0] for line in lines if line[:1].isalpha()][-3:] == ["rate", "memory", "time"]
    assert list((tmp_path / "here").iterdir()) == []


def test_the_prompt_tells_of_the_tools(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert '"name": "calculate"' in said(capsys, model, "env=calculator")


def test_prompts_of_ones_own_are_read_and_counted(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "answer": "a"} for i in range(20)] + [{"answer": "a"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.py").write_text("def score(completions, **columns):\n    return [0.0] * len(completions)\n")
    own = [f"data={tmp_path / 'prompts.jsonl'}", f"reward={tmp_path / 'my.py'}:score", "data.max_bad=0.2"]
    told = said(capsys, model, *own)
    assert "16 prompts to train on, 4 held out" in told and "no prompt" in told
    assert "say " in told and "evals    3 of 4 held-out problems" in told


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("loss_fn=pp0",), "loss_fn=pp0: expected one of"),
        (("limits.context=20", "max_tokens=8"), "tokens, the context 20: there is no room for a reply"),
        (("max_tokens=100000",), "max_tokens=100000 leaves no room for a prompt"),
        (("optim.schedule=linaer",), "optim.schedule=linaer is unknown"),
        (("env=tictactoe", "group_size=5"), "group_size=5: tictactoe has 2 seats, each of them an attempt"),
        (("env=tictactoe", "eval.samples=3", "eval.temperature=1"), "eval.samples=3: tictactoe has 2 seats"),
        (("limits.tool_calls=-1",), "limits.tool_calls=-1: expected at least 0"),
        (("init_from=nowhere",), "init_from=nowhere: no such directory"),
    ],
)
def test_it_stops_where_a_run_would(
    model: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], error: str
) -> None:
    line = said(capsys, model, *words, status=2)
    assert error in line and line.count("\n") == 1


def test_what_a_group_shares_is_counted_once() -> None:
    config = Config(steps=10, groups_per_batch=2, group_size=4, max_tokens=5)
    plan = Workload(prompt=30, num_evaluated=3, num_evals=2).plan(config)
    assert plan.step_tokens == 2 * (30 + 4 * 5) and plan.eval_tokens == 3 * (30 + 5) and plan.longest == 35
