"""The run directory: what it holds, how it goes back to a checkpoint, how it ends."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from cookbook import records
from cookbook.checkpoints import CheckpointRow
from cookbook.config import LogConfig
from cookbook.errors import UsageError
from cookbook.run import Run
from cookbook.run_record import prepare

ROOT = Path(__file__).parent.parent
NLL = "eval/held_out/nll"


@dataclass
class Config:
    run_dir: str | None
    name: str | None = None
    keep_last: int = 2
    steps: int = 6
    learning_rate: float | None = None
    log: LogConfig = field(default_factory=LogConfig)


def start(directory: Path, *, keep_last: int = 2, screen: io.StringIO | None = None) -> Run:
    config = Config(str(directory), keep_last=keep_last)
    return Run(config, "sft/chat", best=NLL, console=Console(file=screen or io.StringIO(), width=160))


def save(run: Run, step: int) -> CheckpointRow:
    directory = run.store / "abc:train:0" / "weights" / f"{step:06d}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "state.json").write_text(json.dumps({"step": step}))
    return run.checkpoint(step, f"tinker://abc:train:0/weights/{step:06d}", loop={"cursor": 10 * step})


def load_from(run: Run):
    def load(row: CheckpointRow) -> int:
        directory = run.directory(row)
        assert directory is not None
        return json.loads((directory / "state.json").read_text())["step"]

    return load


def train(run: Run, first: int, last: int, *, save_every: int = 1, nll: Iterator[float] | None = None) -> None:
    for step in range(first, last + 1):
        if nll is not None:
            run.log_eval("during", {"held_out/nll": next(nll)})
        run.log(step, {"train/nll": 1 / step})
        if step % save_every == 0:
            save(run, step)


def steps_of(directory: Path, file: str = "metrics.jsonl", key: str = "progress/step") -> list[int]:
    return [row[key] for row in records.read_rows(directory / file)]


def directories(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*/weights/*"))


def result_of(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


# The record.


def test_a_run_that_nobody_prepared_records_itself(tmp_path: Path) -> None:
    with start(tmp_path / "r") as run:
        run.record("learning_rate", 0.5)
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["recipe"] == "sft/chat" and record["overrides"] == []
    assert {"python", "torch", "transformers"} <= set(record["versions"])
    assert "learning_rate: 0.5\n" in (tmp_path / "r" / "config.yaml").read_text()


def test_prepare_keeps_the_first_record_and_notes_each_resume(tmp_path: Path) -> None:
    prepare(tmp_path, recipe="sft/chat", config_yaml="steps: 2\n", overrides=["steps=2"])
    prepare(tmp_path, recipe="sft/chat", config_yaml="steps: 4\n", overrides=["steps=2", "steps=4"])
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["overrides"] == ["steps=2"]
    assert [session["overrides"] for session in record["resumed"]] == [["steps=2", "steps=4"]]
    assert (tmp_path / "overrides.yaml").read_text() == '- "steps=2"\n- "steps=4"\n'
    assert (tmp_path / "config.yaml").read_text() == "steps: 4\n"


def test_code_diff_holds_what_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repo"
    repository.mkdir()
    monkeypatch.chdir(repository)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    (repository / "a.txt").write_text("one\n")
    for command in (["init", "-q"], ["add", "a.txt"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    (repository / "a.txt").write_text("two\n")
    prepare(tmp_path / "r", recipe="sft/chat", config_yaml="", overrides=[])
    assert "+two" in (tmp_path / "r" / "code.diff").read_text()
    state = json.loads((tmp_path / "r" / "run.json").read_text())["git"]
    assert len(state["revision"]) == 40 and state["dirty"] is True


def test_without_run_dir_a_run_gets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Run(Config(None), "sft/chat", console=Console(file=io.StringIO())) as run:
        assert run.dir.parent == tmp_path / "runs" and run.dir.name.startswith("sft-chat-")
    with Run(Config(None, name="mine"), "sft/chat", console=Console(file=io.StringIO())):
        pass
    with pytest.raises(UsageError, match=r"runs/mine holds a run already: resume it .* or choose another name="):
        Run(Config(None, name="mine"), "sft/chat")


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    with start(tmp_path), pytest.raises(UsageError, match=rf"in use by another process \(pid {os.getpid()}\)"):
        start(tmp_path)
    with start(tmp_path):
        pass


def test_one_row_a_step_evaluations_included_and_always_json(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log_eval("before", {NLL: 3.0})
        run.log(1, {"train/nll": float("nan"), "optim/grad_norm": float("inf")})
        run.log_eval("during", {"held_out/nll": 2.0})
        run.log(2, {"train/nll": 1.5})
        run.log_eval("after", {"held_out/nll": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines] == [
        {"progress/step": 0, NLL: 3.0},
        {"progress/step": 1, "train/nll": "NaN", "optim/grad_norm": "Infinity"},
        {"progress/step": 2, "train/nll": 1.5, NLL: 1.0},
    ]


def test_steps_only_go_up_and_a_checkpoint_needs_its_row(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        train(run, 1, 2)
        with pytest.raises(ValueError, match="step 2 logged after step 2"):
            run.log(2, {})
        with pytest.raises(ValueError, match="checkpoint of step 3, but the last step logged is 2"):
            run.checkpoint(3, "tinker://a/weights/3", loop={})
        with pytest.raises(ValueError, match=r"after 2 steps: a resumed run has it in run\.evals"):
            run.log_eval("before", {NLL: 1.0})


# Checkpoints.


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    with start(tmp_path, keep_last=2) as run:
        train(run, 1, 6, nll=iter([5.0, 1.0, 4.0, 3.0, 6.0, 2.0]))
    assert steps_of(tmp_path, "checkpoints.jsonl", "step") == [2, 5, 6]
    assert directories(tmp_path) == ["000002", "000005", "000006"]
    best = {"step": 2, "held_out/nll": 1.0, "checkpoint": "tinker://abc:train:0/weights/000002"}
    assert result_of(tmp_path)["best"] == best
    assert result_of(tmp_path)["checkpoint"] == "tinker://abc:train:0/weights/000006"


def test_the_best_may_be_the_highest(tmp_path: Path) -> None:
    config = Config(str(tmp_path), keep_last=0)
    with Run(config, "rl/reinforce", best=NLL, best_is="max", console=Console(file=io.StringIO())) as run:
        train(run, 1, 3, nll=iter([1.0, 2.0, 0.5]))
    assert directories(tmp_path) == ["000002", "000003"]  # the final one stays even with keep_last=0


def test_checkpoint_rows_hold_the_loop_and_a_path_that_moves_with_the_run(tmp_path: Path) -> None:
    with start(tmp_path / "old") as run:
        train(run, 1, 1)
    (row,) = records.read_rows(tmp_path / "old" / "checkpoints.jsonl")
    assert row["path"] == "checkpoints/abc:train:0/weights/000001"
    assert row["loop"]["cursor"] == 10 and row["loop"]["wandb_id"] is None and row["loop"]["seconds"] >= 0
    (tmp_path / "old").rename(tmp_path / "new")
    with start(tmp_path / "new") as run:
        assert run.resume(load_from(run)) is not None


def test_strays_of_a_kill_are_swept_but_nothing_else(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        train(run, 1, 2)
    for name in ("000007", "final"):  # saved, and killed before the row was written; somebody's own
        (tmp_path / "checkpoints" / "xyz:train:0" / "weights" / name).mkdir(parents=True)
    with start(tmp_path) as run:
        run.resume(load_from(run))
    assert directories(tmp_path) == ["000001", "000002", "final"]


# Going back.


def test_resume_cuts_the_record_back_to_the_checkpoint(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log_eval("before", {NLL: 3.0})
        train(run, 1, 5, save_every=2)
        (tmp_path / "rollouts").mkdir()
        for step in (4, 5):
            (tmp_path / "rollouts" / f"{step:06d}.jsonl").touch()
    seconds = records.read_rows(tmp_path / "checkpoints.jsonl")[-1]["loop"]["seconds"]
    with start(tmp_path) as run:
        assert run.resume_row is not None and run.resume_row["step"] == 4
        found = run.resume(load_from(run))
        assert found is not None and found[0]["loop"]["cursor"] == 40 and found[1] == 4
        assert steps_of(tmp_path) == [0, 1, 2, 3, 4]
        assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["000004.jsonl"]
        assert run.evals == {"before": {"held_out/nll": 3.0}}
        assert run.step == 4 and run.seconds >= seconds
        assert (tmp_path / "result.json").exists()  # until the run goes on: it may still be refused
        run.begin(8)
        assert not (tmp_path / "result.json").exists()
        train(run, 5, 6)
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    assert result_of(tmp_path)["eval"]["before"] == {"held_out/nll": 3.0}


def test_without_a_checkpoint_the_record_starts_empty(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log_eval("before", {NLL: 3.0})
        run.log(1, {})
    with start(tmp_path) as run:
        assert run.resume_row is None and run.resume(load_from(run)) is None
        assert steps_of(tmp_path) == [] and run.evals == {} and run.step == 0


def test_torn_last_lines_are_nobodys_rows(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        train(run, 1, 3)
    for file in ("metrics.jsonl", "checkpoints.jsonl"):
        with (tmp_path / file).open("a") as torn:
            torn.write('{"progress/step": 4, "st')
    with start(tmp_path) as run:
        found = run.resume(load_from(run))
        assert found is not None and found[0]["step"] == 3
        train(run, 4, 4)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert steps_of(tmp_path, "checkpoints.jsonl", "step") == [3, 4]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"progress/step": 1}\nx\n{"progress/step": 3}\n')
    with pytest.raises(UsageError, match=r"metrics.jsonl:2 is not a JSON object"):
        start(tmp_path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        train(run, 1, 3)
    screen = io.StringIO()
    with start(tmp_path, screen=screen) as run:
        (tmp_path / "checkpoints/abc:train:0/weights/000003/state.json").write_text("{")
        found = run.resume(load_from(run))
        assert found is not None and found[0]["step"] == 2
    assert "checkpoint 000003 is damaged (JSONDecodeError: Expecting" in screen.getvalue()
    assert "falling back to 000002\n" in screen.getvalue()
    assert steps_of(tmp_path) == [1, 2]
    assert steps_of(tmp_path, "checkpoints.jsonl", "step") == [2]
    assert directories(tmp_path) == ["000002", "000003.damaged"]


def test_when_no_checkpoint_loads_the_run_is_left_as_it_was(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        train(run, 1, 2)

    def refuse(row: CheckpointRow) -> None:
        raise ValueError("rank 8, but the run has 32")

    none_loads = pytest.raises(UsageError, match=r"none of the 2 checkpoints of .* loads \(oldest: ValueError: rank 8")
    with none_loads, start(tmp_path) as run:
        run.resume(refuse)
    assert steps_of(tmp_path) == [1, 2] and directories(tmp_path) == ["000001", "000002"]


def test_rows_survive_a_kill_at_any_moment(tmp_path: Path) -> None:
    """Kill a process that logs, checkpoints and prunes as fast as it can: the next goes on without gap or repeat."""
    for delay in (0.0, 0.01, 0.03):
        child = spawn(tmp_path, "loop")
        time.sleep(delay)
        child.kill()
        child.wait()
        with start(tmp_path) as run:
            found = run.resume(load_from(run))
            step = found[0]["step"] if found else 0
            assert steps_of(tmp_path) == list(range(1, step + 1))
            assert found is None or found[1] == step
            rows = steps_of(tmp_path, "checkpoints.jsonl", "step")
            if found:  # before the first row a saved directory may lie there: the next checkpoint sweeps it
                assert directories(tmp_path) == [f"{row:06d}" for row in rows]


# The end.


def test_a_completed_run_says_so_to_files_and_people(tmp_path: Path) -> None:
    screen = io.StringIO()
    with start(tmp_path, screen=screen) as run:
        run.begin(2)
        run.log_eval("before", {"held_out/nll": 4.0})
        run.log(1, {"train/nll": 2.0})
        run.log_eval("after", {"held_out/nll": 1.0})
        run.log(2, {"train/nll": 1.0})
        save(run, 2)
        result = run.finish(steps=2, checkpoint="tinker://abc:train:0/weights/000002")
    assert result == result_of(tmp_path)
    assert result.pop("seconds") >= 0
    assert result == {
        "status": "completed",
        "steps": 2,
        "eval": {"before": {"held_out/nll": 4.0}, "after": {"held_out/nll": 1.0}},
        "best": {"step": 2, "held_out/nll": 1.0, "checkpoint": "tinker://abc:train:0/weights/000002"},
        "checkpoint": "tinker://abc:train:0/weights/000002",
    }
    text = screen.getvalue()
    assert "held_out/nll      4.0000      1.0000     -75%" in text
    assert (
        f"checkpoint  {tmp_path}/checkpoints/abc:train:0/weights/000002\n" in text
    )  # :train: is no emoji, no line breaks
    assert f"cook resume {tmp_path} steps=4" in text and f"cook rerun {tmp_path} " in text
    log = (tmp_path / "console.log").read_text()
    assert "step 1/2  nll 2.0000" in log and "completed: 2 steps in" in log


def test_a_stop_before_the_last_step_is_an_interrupted_run(tmp_path: Path) -> None:
    screen = io.StringIO()
    with start(tmp_path, screen=screen) as run:
        run.begin(9)
        run.stop()
        train(run, 1, 1)
        assert run.should_stop
    assert result_of(tmp_path)["status"] == "interrupted" and result_of(tmp_path)["steps"] == 1
    assert "# go on from the checkpoint" in screen.getvalue()


def test_a_crash_leaves_its_error_and_traceback_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), start(tmp_path) as run:
        train(run, 1, 1)
        run.log(2, {"train/nll": 1 / 0})
    result = result_of(tmp_path)
    assert (result["status"], result["steps"], result["error"]) == ("failed", 1, "ZeroDivisionError: division by zero")
    assert "Traceback (most recent call last)" in (tmp_path / "console.log").read_text()


@pytest.mark.parametrize(
    ("saved", "evaluated", "good"),
    [(3, None, 2), (3, 1.5, 3), (1, None, None)],
    ids=["no step trained on the newest one", "the newest one was evaluated", "there is only that one"],
)
def test_numbers_that_are_not_finite_lead_to_the_newest_checkpoint_known_to_be_good(
    tmp_path: Path, saved: int, evaluated: float | None, good: int | None
) -> None:
    with pytest.raises(UsageError) as raised, start(tmp_path, keep_last=1 if good is None else 2) as run:
        run.begin(9)
        train(run, 1, saved - 1)
        train(run, saved, saved, nll=iter([evaluated]) if evaluated else None)
        raise FloatingPointError(f"step {saved + 1}: loss nan")
    line = str(raised.value)
    assert line.startswith(f"step {saved + 1}: loss nan. ")
    assert (f"/{good:06d} is good: go on from it" if good else "No checkpoint is known to be good") in line
    assert f"{result_of(tmp_path)['go_on']})" in line and result_of(tmp_path)["error"] == line


def test_an_evaluation_that_is_no_number_is_logged_and_stops_the_run(tmp_path: Path) -> None:
    """The loss of its step was finite, so the checkpoint before it is good."""
    with pytest.raises(UsageError, match=r"^step 3: held_out/nll is nan\. .*/000002 is good"), start(tmp_path) as run:
        train(run, 1, 2)
        train(run, 3, 3, nll=iter([float("nan")]))
    assert steps_of(tmp_path) == [1, 2, 3] and steps_of(tmp_path, "checkpoints.jsonl", "step") == [1, 2]


def test_a_users_mistake_before_the_first_step_prints_nothing_here(tmp_path: Path) -> None:
    screen = io.StringIO()
    with pytest.raises(UsageError), start(tmp_path, screen=screen):
        raise UsageError("data.path=x.jsonl does not exist")
    assert screen.getvalue() == ""
    assert result_of(tmp_path)["error"] == "data.path=x.jsonl does not exist"
    assert not (tmp_path / "console.log").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), RuntimeError("io: No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_line_with_what_to_do(tmp_path: Path, error: Exception) -> None:
    one_line = pytest.raises(UsageError, match=r"the disk of .* is full \(\d+ MiB free\): make room, then `cook resume")
    with one_line, start(tmp_path):
        raise error


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    records.append_row(file, {"progress/step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (30, hard)
    )  # the second write comes back short, as on a disk that fills up
    try:
        with pytest.raises(OSError, match="No space left"):
            records.append_row(file, {"progress/step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == '{"progress/step": 1}\n'


# Signals.

CHILD = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from test_run import save, start
from pathlib import Path
mode = sys.argv[2]
with start(Path(sys.argv[1]), screen=sys.stdout) as run:
    print("ready", flush=True)
    if mode == "loop":
        from test_run import load_from
        found = run.resume(load_from(run))
        step = found[0]["step"] if found else 0
        while True:
            step += 1
            run.log(step, {{"train/nll": 1.0}})
            save(run, step)
    run.begin(1000)
    run.log(1, {{"train/nll": 1.0}})
    save(run, 1)
    step = 1
    while True:
        step += 1
        run.log(step, {{"train/nll": 1.0}})
        time.sleep(0.02)
        if run.should_stop and mode != "deaf":
            break
    save(run, step)
"""


def spawn(directory: Path, mode: str) -> subprocess.Popen[str]:
    code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", code, str(directory), mode]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while "ready" not in (line := child.stdout.readline()):
        assert line, child.stderr and child.stderr.read()
    return child


def wait_for_row(directory: Path) -> None:
    deadline = time.monotonic() + 10
    while not (directory / "checkpoints.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_sigterm_means_one_checkpoint_and_a_clean_exit(tmp_path: Path) -> None:
    child = spawn(tmp_path, "until-stopped")
    wait_for_row(tmp_path)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=10)
    assert child.returncode == 0, err
    result = result_of(tmp_path)
    assert result["status"] == "interrupted"
    assert steps_of(tmp_path, "checkpoints.jsonl", "step") == [1, result["steps"]]
    assert "SIGTERM: stopping after this step with a checkpoint" in err
    assert f"cook resume {tmp_path}" in out


def test_a_second_ctrl_c_exits_at_once(tmp_path: Path) -> None:
    child = spawn(tmp_path, "deaf")
    wait_for_row(tmp_path)
    child.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=5)
    assert child.returncode == 130 and "second interrupt: exiting at once" in err
    assert result_of(tmp_path)["status"] == "interrupted"
    assert result_of(tmp_path)["checkpoint"] == "tinker://abc:train:0/weights/000001"


def test_signal_handlers_are_given_back_and_threads_leave_them_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with start(tmp_path / "main"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before

    def job() -> None:
        with start(tmp_path / "thread") as run:
            run.log(1, {})

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert result_of(tmp_path / "thread")["status"] == "completed"


# The display.


def test_lines_come_every_n_steps_and_with_every_evaluation(tmp_path: Path) -> None:
    screen = io.StringIO()
    config = Config(str(tmp_path), log=LogConfig(every=2))
    with Run(config, "sft/chat", console=Console(file=screen, width=160)) as run:
        run.begin(5)
        for step in range(1, 6):
            if step == 3:
                run.log_eval("during", {"held_out/nll": 2.5})
            run.log(step, {"train/nll": 1.0, "perf/train_tokens_per_second": 1234.5})
    lines = [line.split("  ")[0] for line in screen.getvalue().splitlines() if line.startswith("step")]
    assert lines == ["step 2/5", "step 3/5", "step 4/5", "step 5/5"]
    assert "nll 1.0000  1,234 tok/s  eval held_out/nll 2.5000  eta 0:00" in screen.getvalue()


def test_a_terminal_gets_a_bar_and_the_log_its_lines(tmp_path: Path) -> None:
    screen = io.StringIO()
    with Run(Config(str(tmp_path)), "sft/chat", console=Console(file=screen, force_terminal=True, width=120)) as run:
        run.begin(3)
        for step in range(1, 4):
            run.log(step, {"train/nll": 1.0})
            time.sleep(0.15)
    assert "3/3" in screen.getvalue() and "━" in screen.getvalue()
    assert (tmp_path / "console.log").read_text().count("step ") >= 3


def test_neither_torch_nor_wandb_is_imported_with_the_run() -> None:
    heavy = {"torch", "transformers", "wandb", "datasets"}
    code = f"import sys, cookbook.run, cookbook.schedule; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
