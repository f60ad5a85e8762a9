"""Weights & Biases: nothing unless asked, one log a step, the same run after a resume."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cookbook import records
from cookbook.config import LogConfig
from cookbook.errors import UsageError
from cookbook.run import Run
from cookbook.tracking import INCREMENT, TABLE_ROWS, Tables, connect_trackers

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    run_dir: str | None
    name: str | None = None
    keep_last: int = 2
    log: LogConfig = field(default_factory=LogConfig)


class Recorder:
    """A tracker that keeps what it is told; raises on request."""

    title = "W&B"
    id: str | None = "rec0rder"

    def __init__(self, broken: bool = False) -> None:
        self.rows: list[dict[str, float]] = []
        self.tables: list[Tables] = []
        self.exit_code: int | None = None
        self.broken = broken

    def log(self, row: Mapping[str, float], tables: Tables) -> None:
        if self.broken:
            raise ConnectionError("service is gone")
        self.rows.append(dict(row))
        self.tables.append(tables)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def start(directory: Path, tracker: Recorder | None = None, log: LogConfig | None = None) -> Run:
    config = Config(str(directory), log=log or LogConfig())
    return Run(config, "sft/chat", tracker=tracker, console=Console(file=io.StringIO()))


def test_each_step_is_one_log_that_holds_its_evaluation(tmp_path: Path) -> None:
    recorder = Recorder()
    with start(tmp_path, recorder) as run:
        run.log_eval("before", {"held_out/nll": 3.0})
        run.log(1, {"train/nll": 2.0})
        run.log_eval("during", {"held_out/nll": 1.0})
        run.log(2, {"train/nll": 1.0})
        assert run.checkpoint(2, "tinker://a/weights/000002", loop={})["loop"]["wandb_id"] == "rec0rder"
    assert recorder.rows == records.read_rows(tmp_path / "metrics.jsonl")
    assert recorder.exit_code == 0


def test_a_failed_run_is_failed_there_too(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(RuntimeError), start(tmp_path, recorder):
        raise RuntimeError("boom")
    assert recorder.exit_code == 1


def test_a_lost_tracker_does_not_cost_the_run(tmp_path: Path) -> None:
    with start(tmp_path, Recorder(broken=True)) as run:
        run.log(1, {"train/nll": 2.0})
        run.log(2, {"train/nll": 1.0})
    assert len(records.read_rows(tmp_path / "metrics.jsonl")) == 2
    log = (tmp_path / "console.log").read_text()
    assert log.count("W&B stopped (ConnectionError: service is gone); metrics.jsonl goes on") == 1


def test_off_means_no_import_and_no_file(tmp_path: Path) -> None:
    assert connect_trackers(LogConfig(), run_dir=tmp_path, name="x", config={}) == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_mode_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"log\.wandb=on is unknown: it is one of off, online, offline"):
        connect_trackers(LogConfig(wandb="on"), run_dir=tmp_path, name="x", config={})


ONLINE = """
import pathlib, sys
from cookbook.config import LogConfig
from cookbook.errors import UsageError
from cookbook.tracking import connect_trackers
try:
    connect_trackers(LogConfig(wandb="online"), run_dir=pathlib.Path(sys.argv[1]), name="x", config={})
except UsageError as error:
    print(error)
"""


def test_online_without_a_login_is_one_line(tmp_path: Path) -> None:
    bare = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", ONLINE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=60)
    assert done.stdout == (
        "log.wandb=online, but there is no W&B login: "
        "run `wandb login` (or set WANDB_API_KEY), or use log.wandb=offline\n"
    ), done.stderr


def test_an_offline_run_is_written_and_goes_on_under_its_id(tmp_path: Path) -> None:
    offline = LogConfig(wandb="offline")
    with start(tmp_path, log=offline) as run:
        for step in (1, 2, 3):
            run.log(step, {"train/nll": 1 / step})
        row = run.checkpoint(3, "tinker://a/weights/000003", loop={})
    time.sleep(1)  # W&B names the directory of a session by the second
    with start(tmp_path, log=offline) as run:
        run.resume(lambda row: None)
        run.log(4, {"train/nll": 0.25})
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{row['loop']['wandb_id']}"}
    assert [(item["progress/step"], item["_step"]) for item in history(files[0])] == [(1, 0), (2, 1), (3, 2)]


def test_table_rows_travel_with_the_next_step_and_only_once(tmp_path: Path) -> None:
    recorder = Recorder()
    with start(tmp_path, recorder) as run:
        run.add_rows("samples", [{"step": 0, "reply": "five"}])
        run.log_eval("before", {"held_out/nll": 3.0})
        run.add_rows("rollouts", [{"step": 1}])
        run.add_rows("rollouts", [{"step": 1}])
        run.log(1, {"train/nll": 2.0})
        run.log(2, {"train/nll": 1.0})
    assert recorder.tables == [{"samples": [{"step": 0, "reply": "five"}]}, {"rollouts": [{"step": 1}] * 2}, {}]


def test_tables_of_wandb_grow_by_their_new_rows_and_stop_at_their_cap(tmp_path: Path) -> None:
    """The first rows at once, later ones some at a time, the rest at the end."""
    sizes = (3, 2, INCREMENT, 2, 2 * TABLE_ROWS, 1)
    with start(tmp_path, log=LogConfig(wandb="offline")) as run:
        for step, size in enumerate(sizes, start=1):
            run.add_rows("rollouts", [{"step": step, "reply": f"{step}/{i}", "advantage": None} for i in range(size)])
            run.add_rows("samples", [{"step": step}])
            run.log(step, {"train/nll": 1 / step})
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    told = [(row["progress/step"], "rollouts" in row, "samples" in row) for row in history(file)]
    sent = [(1, True, True), (2, False, False), (3, True, False), (4, False, False), (5, True, False), (6, False, False)]
    assert told == [*sent, (6, False, True)], (tmp_path / "console.log").read_text()

    def parts(name: str) -> list[int]:
        files = sorted(tmp_path.glob(f"wandb/offline-run-*/files/media/table/{name}_*.json"))
        return [len(json.loads(part.read_text())["data"]) for part in files]

    assert parts("rollouts") == [3, INCREMENT + 2, TABLE_ROWS - INCREMENT - 5] and parts("samples") == [1, 5]


def test_trackio_has_the_same_names_by_the_same_steps_and_goes_on(tmp_path: Path) -> None:
    """In a process of its own, since trackio asks once, when it is imported, where its files are to go."""
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRACKIO, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[(1, 1.0), (2, 0.5), (3, 0.25)]\n", done.stderr


TRACKIO = """
import io, pathlib, sys
from rich.console import Console
from trackio.sqlite_storage import SQLiteStorage
from cookbook.config import LogConfig
from cookbook.run import Run
from tests.test_tracking import Config
config = Config(sys.argv[1], name="mine", log=LogConfig(trackio=True))
with Run(config, "sft/chat", console=Console(file=io.StringIO())) as run:
    run.log(1, {"train/nll": 1.0})
    run.log(2, {"train/nll": 0.5})
    run.checkpoint(2, "tinker://a/weights/000002", loop={})
with Run(config, "sft/chat", console=Console(file=io.StringIO())) as run:
    run.resume(lambda row: None)
    run.log(3, {"train/nll": 0.25})
print([(row["progress/step"], row["train/nll"]) for row in SQLiteStorage.get_logs("cook", "mine")])
"""


def test_trackio_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    bare = "import sys; sys.modules['trackio'] = None\nimport importlib.util\n"
    code = bare + ONLINE.replace('wandb="online"', "trackio=True").replace("LogConfig(", "LogConfig(")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == (
        "log.trackio=true, but trackio is not installed: uv sync --extra trackio (or pip install trackio)\n"
    ), done.stderr


def history(file: Path) -> list[dict[str, float]]:
    """The logged rows of a .wandb file. W&B's service writes its end after `finish` has returned: this waits for it."""
    deadline = time.monotonic() + 60
    while "exit" not in {record.WhichOneof("record_type") for record in wandb_records(file)}:
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.05)
    items = [list(r.history.item) for r in wandb_records(file) if r.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in items]


def wandb_records(file: Path) -> list[Any]:
    """Those that are there by now, of a LevelDB log: 32 KiB blocks, 7-byte headers, protobuf."""
    from wandb.proto import wandb_internal_pb2

    data, found, position, pending = file.read_bytes(), [], 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if kind == 0 or position + 7 + length > len(data):
            break  # still being written
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(pending))
            pending = b""
    return found
