"""`cook rl recipe=async_reinforce`: how stale it gets, what that changes, and that it is reinforce where nothing is stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cookbook.cli import main
from recipes.rl import async_reinforce, reinforce
from tests.small_runs import checkpoint_rows, contents, metrics, newest, result, write_rows
from tests.test_reinforce import REWARDS, repeatable, rl, rollouts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async")
    write_rows(folder / "prompts.jsonl", ({"prompt": f"say {i}", "prompt_number": i} for i in range(40)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def off_policy(run_dir: Path, task: Path, steps: int, *words: str, reward: str = "letters") -> int:
    """The exit status of a run that is at most so many steps off policy."""
    return rl(run_dir, task, "recipe=async_reinforce", f"max_steps_off_policy={steps}", *words, reward=reward)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, task: Path) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert off_policy(directory, task, 1, "steps=8", "eval_every=0") == 0
    return directory


def staleness(run_dir: Path) -> list[float]:
    return [row["async/staleness"] for row in metrics(run_dir)[1:]]


def test_it_is_reinforce_with_one_more_knob() -> None:
    assert set(vars(async_reinforce.Config())) - set(vars(reinforce.Config())) == {"max_steps_off_policy"}


def test_it_learns(run: Path) -> None:
    before, after = (result(run)["eval"][phase]["held_out/reward"] for phase in ("before", "after"))
    assert before < 0.3 and after > 0.8


def test_without_staleness_it_is_reinforce_to_the_bit(tmp_path: Path, task: Path) -> None:
    here, there = tmp_path / "async", tmp_path / "sync"
    assert off_policy(here, task, 0, "steps=4") == 0 and rl(there, task, "steps=4") == 0
    assert contents(newest(here)) == contents(newest(there)) and rollouts(here) == rollouts(there)
    assert staleness(here) == [0] * 4


def test_no_batch_is_staler_than_allowed(run: Path, tmp_path: Path, task: Path) -> None:
    assert staleness(run) == [0] + [1] * 7
    assert off_policy(tmp_path / "two", task, 2, "steps=5") == 0
    assert staleness(tmp_path / "two") == [0, 1, 2, 2, 2]


def test_the_ratio_is_to_the_policy_that_sampled(run: Path) -> None:
    first, *later = (row["kl/max_abs_dlogprob"] for row in metrics(run)[1:])
    assert first < 1e-4 < min(later)


def test_attempts_keep_the_policy_that_they_began_with(tmp_path: Path, task: Path) -> None:
    """Those of step 2 began before the first update, so its size is not seen in them."""
    sampled = {}
    for rate in (0.005, 0.02):
        assert off_policy(tmp_path / f"{rate}", task, 1, "steps=3", "eval.problems=0", f"learning_rate={rate}") == 0
        files = rollouts(tmp_path / f"{rate}")
        sampled[rate] = [[row["turns"][0]["tokens"] for row in files[f"{step:06d}"]] for step in (1, 2, 3)]
    assert sampled[0.005][:2] == sampled[0.02][:2] and sampled[0.005][2] != sampled[0.02][2]


def test_problems_come_in_their_order(run: Path) -> None:
    files = rollouts(run)
    for step in range(8):
        assert [row["problem"] for row in files[f"{step + 1:06d}"]] == [4 * step + i for i in range(4) for _ in range(8)]


def test_a_resumed_run_attempts_anew_what_was_under_way(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    rows = [row for row in checkpoint_rows(broken) if row["step"] == 4]
    (broken / "checkpoints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["resume", str(broken)]) == 0
    assert rows[0]["loop"]["problems"] == 16
    assert staleness(broken) == [0, 1, 1, 1, 0, 1, 1, 1]
    assert repeatable(broken)[:5] == repeatable(run)[:5]
    problems = [[row["problem"] for row in lines] for lines in rollouts(broken).values()]
    assert problems == [[row["problem"] for row in lines] for lines in rollouts(run).values()]
    assert result(broken)["status"] == "completed" and result(broken)["eval"]["after"]["held_out/reward"] > 0.8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("max_steps_off_policy=-1",), "max_steps_off_policy=-1: expected at least 0"),
        (("resample_constant=2",), "resample_constant=2 with max_steps_off_policy=1: the problems that come next"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert rl(tmp_path / "run", task, "recipe=async_reinforce", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_failing_rewards_end_it_as_they_end_reinforce(
    tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert off_policy(tmp_path / "run", task, 2, reward="never") == 2
    assert capsys.readouterr().err.startswith("error: all rollouts of 3 steps in a row failed")
