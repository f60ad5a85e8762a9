"""A run that was interrupted, killed or extended ends exactly where it would have ended anyway."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cookbook.cli import main
from tests.small_runs import (
    MOMENTS,
    WEIGHTS,
    Processes,
    chat,
    checkpoint_rows,
    command,
    contents,
    losses,
    newest,
    num_rows,
    repeatable,
    result,
    saved_steps,
    steps_in,
    train,
    wait_until,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 24


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """The uninterrupted run."""
    directory = tmp_path_factory.mktemp("runs") / "straight"
    assert train(directory, rows, steps=STEPS) == 0
    return directory


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    server = Processes(tmp_path_factory.mktemp("screen") / "screen.txt")
    yield server
    server.close()


def assert_same_end(run: Path, other: Path) -> None:
    """Weights and moments to the bit, metrics row by row, the same verdict, nothing left lying about."""
    assert contents(newest(run)) == contents(newest(other))
    assert repeatable(run) == repeatable(other)
    assert saved_steps(run) == saved_steps(other)
    ours, theirs = result(run), result(other)
    assert all(ours[key] == theirs[key] for key in ("status", "steps", "eval"))
    on_disk = {path.resolve() for path in (run / "checkpoints").glob("*/weights/*")}
    assert on_disk == {(run / row["path"]).resolve() for row in checkpoint_rows(run)}


def stop_midway(processes: Processes, run: Path, data: Path, number: int = signal.SIGTERM, **changes: object) -> None:
    """Start a run and send it a signal after the third step."""
    processes.start(command(run, data, **changes))
    wait_until(lambda: num_rows(run) >= 4)
    processes.signal(number)
    assert processes.wait() == 0, processes.screen.read_text()
    assert result(run)["status"] == "interrupted"


# ---- stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_means_a_checkpoint_and_the_resumed_run_ends_as_if_nothing_had_been(
    tmp_path: Path, rows: Path, straight: Path, processes: Processes, number: int
) -> None:
    run = tmp_path / "run"
    stop_midway(processes, run, rows, number, steps=STEPS, save_every=0)
    stopped = result(run)["steps"]
    assert 3 <= stopped < STEPS and "after" not in result(run)["eval"]
    assert saved_steps(run)[-1] == steps_in(run)[-1] == stopped
    said = processes.screen.read_text()
    assert f"{signal.Signals(number).name}: stopping after this step with a checkpoint (Ctrl-C exits at once)" in said
    assert f"next        cook resume {run}  # go on from the checkpoint" in said
    assert main(["resume", str(run), "save_every=2"]) == 0
    assert contents(newest(run)) == contents(newest(straight))
    assert repeatable(run) == repeatable(straight)
    assert result(run)["eval"] == result(straight)["eval"] and result(run)["status"] == "completed"


def test_a_second_ctrl_c_exits_at_once_and_loses_only_what_came_after_the_last_checkpoint(
    tmp_path: Path, processes: Processes
) -> None:
    """The held-out rows are long, so that both signals fall into one evaluation."""
    asked = {"role": "user", "content": "go on"}
    long = [{"messages": [asked, {"role": "assistant", "content": f"{i} " * 250}]} for i in range(100)]
    run, file = tmp_path / "run", write_rows(tmp_path / "long.jsonl", long)
    processes.start(command(run, file, eval_every=2, data_eval_rows=20, save_every=1, max_length=1024))
    wait_until((run / "checkpoints.jsonl").exists)  # the second step, with its evaluation, is next
    processes.signal(signal.SIGINT)
    wait_until(lambda: "stopping after this step" in processes.screen.read_text())
    processes.signal(signal.SIGINT)
    asked_at = time.monotonic()
    assert processes.wait() == 130
    assert time.monotonic() - asked_at < 1
    assert "second interrupt: exiting at once" in processes.screen.read_text()
    assert result(run)["status"] == "interrupted" and result(run)["steps"] == 1
    assert saved_steps(run) == [1]


def test_a_run_stopped_before_its_first_checkpoint_starts_over(tmp_path: Path, rows: Path, straight: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints")
    for file in ("checkpoints.jsonl", "result.json"):
        (run / file).unlink()
    assert main(["resume", str(run)]) == 0
    assert_same_end(run, straight)


# ---- extended, complete, moved, damaged


def test_more_steps_go_on_where_the_run_ended(tmp_path: Path, rows: Path) -> None:
    """With a constant rate the longer run is the shorter one and more; no batch comes twice, none is left out."""
    same = {"optim_schedule": "constant", "optim_warmup_steps": 0}
    assert train(tmp_path / "long", rows, steps=10, **same) == 0
    assert train(tmp_path / "short", rows, steps=5, **same) == 0
    assert main(["resume", str(tmp_path / "short"), "steps=10"]) == 0
    assert losses(tmp_path / "short") == losses(tmp_path / "long")
    assert steps_in(tmp_path / "short") == list(range(11))
    assert contents(newest(tmp_path / "short")) == contents(newest(tmp_path / "long"))
    assert len(set(losses(tmp_path / "long"))) == 10


def test_a_complete_run_resumed_says_the_same_again(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert main(["resume", str(run)]) == 0
    assert_same_end(run, straight)


def test_a_run_is_not_resumed_on_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = tmp_path / "run", write_rows(tmp_path / "my.jsonl", [chat(i) for i in range(40)])
    assert train(run, file, steps=3) == 0
    assert "40 rows: 40 usable" in (run / "console.log").read_text()
    write_rows(file, [chat(i + 40 * (i % 2)) for i in range(40)])
    capsys.readouterr()
    assert main(["resume", str(run), "steps=6"]) == 2
    assert capsys.readouterr().err == (
        "error: the data has changed since the run began (40 usable rows then, 40 with other tokens now), and a resumed run"
        f" keeps its batches: bring the old rows back, or train its weights on the new (cook rerun {run} init_from={run})\n"
    )
    write_rows(file, [chat(i) for i in range(40)])
    assert main(["resume", str(run), "steps=6"]) == 0
    record = json.loads((run / "run.json").read_text())
    write_rows(file, [chat(i) for i in range(50)])
    (run / "run.json").write_text(json.dumps({key: value for key, value in record.items() if key != "data"}))
    assert main(["resume", str(run), "steps=7"]) == 0  # of a run from before the hash


@pytest.mark.parametrize(("word", "line"), [
    ("steps=3", "steps=3, but 24 are done: give more, or train anew (cook rerun {run} steps=3)"),
    ("epochs=0.5", "4 steps in all, but 24 are done: give more, or a new run (cook rerun)"),
])  # fmt: skip
def test_fewer_steps_than_are_done_are_refused(
    tmp_path: Path, rows: Path, straight: Path, word: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config, ended = (run / "config.yaml").read_text(), (run / "result.json").read_text()
    capsys.readouterr()
    assert main(["resume", str(run), word]) == 2
    assert capsys.readouterr().err == f"error: {line.format(run=run)}\n"
    assert (run / "result.json").read_text() == ended
    assert (run / "config.yaml").read_text() == config or word.startswith("epochs")


def test_a_moved_run_goes_on(
    tmp_path: Path, rows: Path, straight: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_midway(processes, tmp_path / "run", rows, steps=STEPS)
    (tmp_path / "elsewhere" / "runs").mkdir(parents=True)
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "runs" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["resume", "moved"]) == 0
    assert_same_end(tmp_path / "elsewhere" / "runs" / "moved", straight)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", [WEIGHTS, MOMENTS, "state.json", "adapter_config.json"])
def test_a_damaged_checkpoint_costs_the_steps_after_the_one_before(
    tmp_path: Path, straight: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    whole = (newest(run) / file).read_bytes()
    (newest(run) / file).write_bytes(whole[: len(whole) // 2])
    damaged = newest(run)
    assert main(["resume", str(run)]) == 0
    assert "checkpoint 000024 is damaged" in capsys.readouterr().out
    shutil.rmtree(damaged.with_name("000024.damaged"))
    assert_same_end(run, straight)


def test_a_run_outlives_whoever_reads_its_output(tmp_path: Path, rows: Path, straight: Path) -> None:
    """As in cook sft | head -1."""
    run, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    processes = Processes(pipe)
    try:
        processes.start(command(run, rows, steps=STEPS))
        with pipe.open() as reader:
            assert reader.readline()
        assert processes.wait() == 0
    finally:
        processes.close()
    assert_same_end(run, straight)
    assert f"step {STEPS}/{STEPS}" in (run / "console.log").read_text()


def test_a_stream_resumes_at_its_row(tmp_path: Path, rows: Path, processes: Processes) -> None:
    same = {"data_streaming": True, "steps": STEPS}
    assert train(tmp_path / "straight", rows, **same) == 0
    stop_midway(processes, tmp_path / "run", rows, **same)
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert repeatable(tmp_path / "run") == repeatable(tmp_path / "straight")
    assert contents(newest(tmp_path / "run")) == contents(newest(tmp_path / "straight"))


# ---- killed


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path, rows: Path, processes: Processes) -> None:
    """At random moments: while it starts, evaluates, steps, saves. Resumed each time; after its end the next begins."""
    same = {"steps": 80, "eval_every": 7, "keep_last": 2}
    straight = tmp_path / "straight"
    assert processes.run(command(straight, rows, **same)) == 0
    rng, kills = random.Random(2), 0
    for attempt in itertools.count():
        run = tmp_path / f"run{attempt}"
        status, words = -9, command(run, rows, **same)
        while status == -9:
            processes.start(words)
            kill_at_random(processes, run, rng) if kills < 20 else None
            status = processes.wait()
            kills += status == -9
            words = ["resume", str(run)] if (run / "config.yaml").exists() else words
        assert status == 0, processes.screen.read_text()
        assert steps_in(run) == list(range(81))
        assert_same_end(run, straight)
        if kills >= 20:
            return


def kill_at_random(processes: Processes, run: Path, rng: random.Random) -> None:
    """Within the first second, or a moment after some more steps."""
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 1.0))
    else:
        enough = num_rows(run) + rng.randint(1, 5)
        wait_until(lambda: num_rows(run) >= enough or processes.has_ended)
        time.sleep(rng.uniform(0, 0.03))
    processes.signal(signal.SIGKILL)
