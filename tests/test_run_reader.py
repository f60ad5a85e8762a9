"""Runs read from disk: by name, in whatever state they were left; and `cook runs`."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from cookbook.cli import main
from cookbook.config import LogConfig
from cookbook.errors import UsageError
from cookbook.run import Run
from cookbook.run_reader import find_run, read_run, run_directories
from tests.past_runs import rl_run


@dataclass
class Config:
    run_dir: str
    name: str | None = None
    keep_last: int = 3
    log: LogConfig = field(default_factory=lambda: LogConfig(progress=False))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(directory: Path, steps: int = 4) -> Run:
    """A run under way: row 0 evaluated, a step a row, a checkpoint after steps 2 and 4 of which 2 is the better."""
    run = Run(Config(str(directory)), "sft/chat", best="eval/held_out/nll", console=Console(file=io.StringIO()))
    run.log_eval("before", {"held_out/nll": 3.0})
    for step in range(1, steps + 1):
        if step % 2 == 0:
            run.log_eval("during", {"held_out/nll": 1.0 + step / 10})
        run.log(step, {"train/nll": 2.0 / step, "time/step": 0.5})
        if step % 2 == 0:
            checkpoint = run.store / f"a/weights/{step:06d}"
            checkpoint.mkdir(parents=True)
            run.checkpoint(step, f"tinker://a/weights/{step:06d}", loop={})
    return run


def completed(directory: Path, steps: int = 4) -> None:
    with started(directory, steps):
        pass


def killed(directory: Path) -> None:
    """As `kill -9` leaves it: a child process that ends without a word, half a line behind it."""
    child = os.fork()
    if child == 0:
        started(directory)
        with (directory / "metrics.jsonl").open("a") as file:
            file.write('{"progress/step": 5, "train/n')
        os._exit(9)
    os.waitpid(child, 0)


def test_a_run_is_running_while_it_is_held_and_then_what_its_result_says(here: Path) -> None:
    with started(here / "runs/a"):
        run = read_run("a")
        assert (run.state, run.result) == ("running", None)
        assert read_run("a").state == "running"  # looking does not take the run away
    assert (run.state, run.name, run.recipe) == ("completed", "a", "sft/chat")
    with pytest.raises(RuntimeError), started(here / "runs/b"):
        raise RuntimeError("boom")
    assert read_run("b").state == "failed"


def test_a_killed_run_keeps_every_whole_line(here: Path) -> None:
    killed(here / "runs/a")
    run = read_run("a")
    assert (run.state, run.result, run.unreadable) == ("killed", None, [])
    assert [row["progress/step"] for row in run.metrics()] == [0, 1, 2, 3, 4]
    assert run.rows("metrics.jsonl")[1] == []  # a torn last line is no fault


def test_newest_best_and_a_step_are_found_where_they_lie_now(here: Path) -> None:
    completed(here / "runs/a")
    (here / "runs/a").rename(here / "moved")
    run = read_run(here / "moved")
    weights = here / "moved/checkpoints/a/weights"
    assert [run.adapter(), run.adapter("best"), run.adapter(2)] == [weights / "000004", weights / "000002", weights / "000002"]
    with pytest.raises(UsageError, match="has no checkpoint of step 3; there are those of steps 2, 4"):
        run.adapter(3)
    (weights / "000004").rename(here / "elsewhere")
    assert run.adapter() == weights / "000002"


def test_a_run_without_a_checkpoint_says_what_to_do(here: Path) -> None:
    with started(here / "runs/a", steps=1), pytest.raises(UsageError) as waits:
        read_run("a").adapter()
    assert str(waits.value) == "a has no checkpoint yet (running): wait for its first"
    with pytest.raises(UsageError, match=r"a has no checkpoint yet \(completed\): cook resume a"):
        read_run("a").adapter("best")


def test_jobs_of_a_sweep_are_runs_by_the_name_of_sweep_and_job(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in ("runs/a", "runs/grid/0", "runs/grid/10", "runs/grid/2"):
        completed(here / directory, steps=1)
    assert find_run("grid/2") == here / "runs/grid/2" == find_run("runs/grid/2")
    assert {read_run(path).name for path in run_directories()} == {"a", "grid/0", "grid/2", "grid/10"}
    with pytest.raises(UsageError, match="grid is a folder of runs: name one of grid/0, grid/2, grid/10"):
        find_run("grid")
    assert main(["resume", "grid/3"]) == 2
    assert "no run grid/3 (did you mean grid/" in capsys.readouterr().err


def test_what_cannot_be_read_is_named_and_the_rest_is_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completed(here / "runs/a")
    file = here / "runs/a/metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], "oops", *lines[2:4], '{"progress/step": 4, "train/nll": "NaN", "word": "x"}', ""]))
    (here / "runs/a/run.json").write_text('{"recipe": ')
    run = read_run("a")
    assert run.unreadable == ["run.json is missing or torn"]
    assert run.rows("metrics.jsonl")[1] == ["metrics.jsonl:3 is not a JSON object (b'oops'): left out"]
    *_, last = rows = run.metrics()
    assert len(rows) == 5 and math.isnan(last["train/nll"]) and "word" not in last
    assert run.best is not None and run.best["step"] == 2  # known from its result alone
    assert main(["resume", "a"]) == 2  # to look is one thing, to go on another
    assert capsys.readouterr().err.endswith("runs/a: its record cannot be used: run.json is missing or torn\n")


def test_cook_runs_lists_the_newest_first_with_state_metric_and_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completed(here / "runs/done")
    killed(here / "runs/grid/7")
    for age, name in enumerate(["done", "grid/7"]):
        os.utime(here / "runs" / name / "config.yaml", (1000 + age, 1000 + age))
    assert main(["runs", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["state"], first["steps"], first["seconds"]) == ("grid/7", "killed", 4, 2.0)
    assert (first["metric"], first["before"], first["value"]) == ("eval/held_out/nll", 3.0, 1.4)
    assert (second["name"], second["state"], second["value"]) == ("done", "completed", 1.4)
    assert main(["runs", "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert "grid/7" in shown and "held_out/nll" in shown and "1 older: cook runs -n 0" in shown


def test_no_runs_at_all_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 2
    assert capsys.readouterr().err.startswith("error: there are no runs in ")


def test_metrics_can_be_read_as_they_are_written(tmp_path: Path) -> None:
    run = read_run(rl_run(tmp_path / "run", 6))
    whole = (run.directory / "metrics.jsonl").read_bytes()
    found, offset = [], 0
    for end in (0, 10, len(whole) // 2, len(whole) - 1, len(whole), len(whole)):
        (run.directory / "metrics.jsonl").write_bytes(whole[:end])
        rows, offset = run.metrics_from(offset)
        found += rows
    assert found == run.metrics() and len(found) == 7 and offset == len(whole)
