"""`-m`: jobs in processes of their own or as tenants of one engine; what one of them does is nothing to the others."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from cookbook.cli import main
from cookbook.run_reader import read_run, runs_in
from cookbook.sweep_summary import summarise
from tests.small_runs import (
    command,
    contents,
    losses,
    newest,
    num_rows,
    result,
    train,
    wait_until,
    weights,
    write_rows,
)
from tests.tiny import tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")


def sweep(directory: Path, rows: Path, *words: str, **changes: object) -> int:
    return main([*command(directory, rows, **changes), "-m", *words])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    directory = tmp_path_factory.mktemp("sweeps") / "shared"
    assert sweep(directory, rows, "hydra/launcher=shared", learning_rate="0.003,0.01", lora_rank="2,8") == 0
    return directory


def test_a_tenant_of_a_shared_sweep_ends_as_the_same_job_alone(shared: Path, rows: Path, tmp_path: Path) -> None:
    jobs = runs_in(shared)
    assert [job.name for job in jobs] == [
        f"{i}_lora.rank={rank}_learning_rate={rate}"
        for i, (rank, rate) in enumerate((rank, rate) for rank in (2, 8) for rate in (0.003, 0.01))
    ]
    for job in jobs[1:3]:
        config = yaml.safe_load((job / "config.yaml").read_text())
        alone = tmp_path / job.name
        assert train(alone, rows, learning_rate=config["learning_rate"], lora_rank=config["lora"]["rank"]) == 0
        assert losses(job) == pytest.approx(losses(alone), rel=1e-5)
        for name, tensor in weights(newest(alone)).items():
            torch.testing.assert_close(weights(newest(job))[name], tensor, rtol=1e-5, atol=1e-5)


def test_the_summary_has_the_best_job_first(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((shared / "sweep.json").read_text())
    values = [job["value"] for job in record["jobs"]]
    assert record["metric"] == "eval/held_out/nll" and values == sorted(values) and len(values) == 4
    assert {job["state"] for job in record["jobs"]} == {"completed"}
    page = (shared / "sweep.html").read_text()
    assert page.count("<svg") >= 3 and "lora.rank=2 learning_rate=0.003" in page and "src=" not in page
    for job in record["jobs"]:
        assert f'href="{job["run"].replace("=", "%3D")}/report.html"' in page and (shared / job["run"] / "report.html").exists()
    assert {read_run(job).config["log"]["group"] for job in runs_in(shared)} == {"shared"}


def test_each_job_is_a_process_by_default(rows: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path / "sweep", rows, seed="0,1", optim_weight_decay=0.5, steps=2) == 0
    jobs = runs_in(tmp_path / "sweep")
    assert len(jobs) == 2 and all(result(job)["status"] == "completed" for job in jobs)
    assert losses(jobs[0]) != losses(jobs[1])
    assert "completed: 2 steps" in (jobs[0].parent / f"{jobs[0].name}.out").read_text()


def test_one_that_fails_and_one_that_diverges_leave_the_others_alone(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = "0.01,1e30,3.0"
    assert sweep(tmp_path / "sweep", rows, "hydra/launcher=shared", learning_rate=rates, steps=30, batch_size=8) == 1
    shown = capsys.readouterr().out
    fine, overflowing, wild = runs_in(tmp_path / "sweep")
    assert result(fine)["status"] == "completed" and losses(fine)[-1] < losses(fine)[0]
    assert result(overflowing)["status"] == "failed"
    assert result(wild)["status"] == "interrupted" and result(wild)["steps"] < 30
    states = {job["run"][0]: job["state"] for job in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]}
    assert states["0"] == "completed" and states["2"] == "diverged" and states["1"] in ("failed", "diverged")
    assert "diverged" in shown
    assert main(["resume", str(fine), "steps=32"]) == 0 and result(fine)["steps"] == 32


def test_an_rl_job_whose_policy_collapses_is_stopped_and_the_noisy_one_is_not(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", ({"prompt": f"say {i}"} for i in range(40)))
    (tmp_path / "variety.py").write_text("def score(completions): return [max(0, len(set(text)) - 5) for text in completions]")
    words = ["rl", "-m", "hydra/launcher=shared", "learning_rate=0.01,5", "data=file", f"data.path={prompts}", "seed=1"]
    words += [f"reward={tmp_path}/variety.py:score", f"model.name={tiny_model_dir()}", "engine.dtype=float32", "steps=40"]
    words += ["engine.device=cpu", "lora.rank=4", "groups_per_batch=2", "group_size=4", "max_tokens=8"]
    words += ["eval_every=0", "eval.problems=0", "save_every=0", f"run_dir={tmp_path / 'sweep'}"]
    assert main(words) == 0
    fine, wild = runs_in(tmp_path / "sweep")
    assert result(fine)["status"] == "completed"
    assert result(wild)["status"] == "interrupted" and result(wild)["steps"] < 40 and newest(wild).is_dir()
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [job["state"] for job in jobs] == ["completed", "diverged"]


def test_ctrl_c_stops_every_job_with_a_checkpoint(rows: Path, tmp_path: Path) -> None:
    with endless(tmp_path / "sweep", rows, "hydra/launcher=shared", seed="0,1,2") as process:
        wait_for_rows(tmp_path / "sweep", jobs=3, rows=4)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    for job in runs_in(tmp_path / "sweep"):
        assert result(job)["status"] == "interrupted" and newest(job).is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lerning_rate=1,2"], "unknown key lerning_rate (did you mean learning_rate?)"),
        (["learning_rate=1e-3,often"], "learning_rate=often: expected float or null, got often"),
        (["learning_rate=1e-3"], "-m without a key that has several values"),
        (["model=glob(qwen9*)"], "model=glob(qwen9*): matches nothing; there are llama"),
        (["seed=0,1", "hydra/launcher=shard"], "shard"),
        (["seed=0,1", "hydra.launcher.jobs=-1"], "hydra.launcher.jobs=-1: expected null or a whole number of at least 1"),
        (["seed=0,1", "hydra/launcher=shared", "hydra.launcher.jobs=zero"], "hydra.launcher.jobs=zero: expected null or"),
        (["seed=0,1", "hydra.launcher.jobs=true"], "hydra.launcher.jobs=true: expected null or a whole number"),
        (["seed=0,1", "hydra.launcher.jobs=1.5"], "hydra.launcher.jobs=1.5: expected null or a whole number"),
        (["name=a,b"], "name=a,b: jobs are named after what differs; name= and run_dir= name the sweep, with one value"),
        (["seed=0,1", "run_dir=a,b"], "run_dir=a,b: jobs are named after what differs"),
        (["seed=0,1", "--dry-run"], "-m with --dry-run: look at one job"),
    ],
)
def test_a_mistake_is_told_before_any_job_starts(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", "-m", f"run_dir={tmp_path / 'sweep'}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not runs_in(tmp_path / "sweep")


def test_a_metric_without_m_is_told_before_the_run_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", f"run_dir={tmp_path / 'run'}", "--metric", "eval/held_out/nll"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --metric is what a sweep compares jobs by: give -m too, and a key with several values"
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_not_written_over_another(shared: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(shared, rows, seed="0,1") == 2
    assert f"{shared} is not empty: choose another name= or run_dir=" in capsys.readouterr().err


def test_wandbs_file_has_the_axes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "wandb", "sft", "learning_rate=1e-4,3e-4", "model=glob(qwen3-?b)", "steps=5"]) == 0
    file = yaml.safe_load(capsys.readouterr().out)
    assert file["parameters"]["learning_rate"] == {"values": [1e-4, 3e-4]}
    assert file["parameters"]["model"] == {"values": ["qwen3-4b", "qwen3-8b"]}
    assert file["command"] == ["${env}", "cook", "sft", "steps=5", "log.wandb=online", "${args_no_hyphens}"]
    assert file["metric"] == {"name": "eval/held_out/nll", "goal": "minimize"}


@pytest.mark.parametrize(
    ("word", "parameter"),
    [
        ("learning_rate=interval(1e-5,1e-3)", {"distribution": "uniform", "min": 1e-5, "max": 1e-3}),
        ("learning_rate=tag(log,interval(1e-5,1e-3))", {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}),
        ("lora.rank=int(interval(2,32))", {"distribution": "int_uniform", "min": 2, "max": 32}),
    ],
)
def test_an_interval_is_one_in_wandbs_file_too(
    word: str, parameter: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "wandb", "sft", word, "seed=0,1"]) == 0
    file = yaml.safe_load(capsys.readouterr().out)
    assert file["method"] == "random"  # a grid has no steps in it
    assert file["parameters"] == {word.partition("=")[0]: parameter, "seed": {"values": [0, 1]}}


def test_wandb_is_given_no_interval_that_may_yield_fractions_for_whole_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "wandb", "sft", "lora.rank=tag(log,int(interval(2,32)))"]) == 2
    assert capsys.readouterr().err == (
        "error: lora.rank: whole numbers on a logarithmic scale are best listed, as in lora.rank=2,8,32\n"
    )


def test_wandbs_jobs_have_no_name_in_common_and_log_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "wandb", "rl", "seed=range(0,3)", "log.wandb=offline"]) == 0
    file = yaml.safe_load(capsys.readouterr().out)
    assert file["command"] == ["${env}", "cook", "rl", "log.wandb=online", "${args_no_hyphens}"]
    for word in ("name=hello", "run_dir=here", "name=a,b"):
        assert main(["sweep", "wandb", "rl", "seed=range(0,3)", word]) == 2
        assert f"error: {word}: each job of W&B's agents makes a name of its own" in capsys.readouterr().err


def test_ranges_and_choices_are_hydras(rows: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path / "s", rows, "hydra/launcher=shared", seed="range(0,3)", steps=1, save_every=0, eval_every=0) == 0
    assert len(runs_in(tmp_path / "s")) == 3


# ---- what is not ours: other sweepers and launchers, where they are installed


def test_a_search_goes_on_after_a_job_that_failed(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="uv pip install hydra-optuna-sweeper")
    words = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_trials=4"]
    words += ["hydra/launcher=shared", "hydra.sweeper.n_jobs=2"]
    assert sweep(tmp_path / "sweep", rows, *words, learning_rate="1e30,0.01", steps=2) == 1
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert len(jobs) == 4 and {(job["varied"], job["state"]) for job in jobs} == {
        ("learning_rate=0.01", "completed"),
        ("learning_rate=1e+30", "failed"),
    }
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert found["best_params"] == {"learning_rate": 0.01}
    assert sweep(tmp_path / "lost", rows, *words, learning_rate="1e30,2e30", steps=2) == 1
    assert "the search broke off: " in capsys.readouterr().out


def test_a_search_asks_which_way_where_nothing_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="uv pip install hydra-optuna-sweeper")
    recipe = Path(__file__).parent.parent / "recipes" / "sft" / "chat.py"
    words = ["run", str(recipe), "-m", "seed=0,1", "hydra/sweeper=optuna", f"run_dir={tmp_path / 'sweep'}"]
    assert main(words) == 2 and "which way?" in capsys.readouterr().err


@pytest.mark.slow
def test_joblibs_jobs_are_watched_and_named_as_ours(rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="uv pip install hydra-joblib-launcher")
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert sweep(tmp_path / "sweep", rows, *words, learning_rate="0.01,1e30", steps=2) == 1
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [(job["varied"], job["state"]) for job in jobs] == [
        ("learning_rate=0.01", "completed"),
        ("learning_rate=1e+30", "failed"),
    ]
    assert "completed: 2 steps" in (tmp_path / "sweep" / "0_learning_rate=0.01.out").read_text()


def test_ctrl_c_begins_no_further_batch(rows: Path, tmp_path: Path) -> None:
    words = ["hydra/launcher=shared", "hydra.sweeper.max_batch_size=1"]
    with endless(tmp_path / "sweep", rows, *words, seed="0,1") as process:
        wait_for_rows(tmp_path / "sweep", jobs=1, rows=2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    (job,) = runs_in(tmp_path / "sweep")
    assert result(job)["status"] == "interrupted" and (tmp_path / "sweep" / "sweep.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to_group", [True, False], ids=["at a terminal", "to the sweep alone"])
def test_ctrl_c_stops_joblibs_jobs_with_a_checkpoint_too(to_group: bool, rows: Path, tmp_path: Path) -> None:
    """At a terminal the pool's processes get the signal as well; they leave the answer to the sweep."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="uv pip install hydra-joblib-launcher")
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    with endless(tmp_path / "sweep", rows, *words, seed="0,1,2") as process:
        wait_for_rows(tmp_path / "sweep", jobs=2, rows=3)
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1  # one was not begun
    assert said.strip() == "stopping all jobs with a checkpoint each (Ctrl-C exits at once)"
    jobs = {job["varied"]: job["state"] for job in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]}
    assert jobs == {"seed=0": "interrupted", "seed=1": "interrupted", "seed=2": "not begun"}
    first, second = runs_in(tmp_path / "sweep")
    done, untouched = result(first)["steps"], contents(newest(second))
    assert main(["resume", str(first), f"steps={done + 2}"]) == 0 and result(first)["steps"] == done + 2
    assert contents(newest(second)) == untouched


def test_a_killed_job_leaves_its_siblings_alone_and_goes_on_by_itself(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["hydra.launcher.jobs=2"]
    changes = {"seed": "0,1", "steps": 400, "save_every": 20}
    with endless(tmp_path / "sweep", rows, *words, **changes) as process:
        wait_for_rows(tmp_path / "sweep", jobs=2, rows=30)
        first, second = runs_in(tmp_path / "sweep")
        os.kill(process_of(first), signal.SIGKILL)
        assert process.wait(timeout=120) == 1
    states = {job["run"]: job["state"] for job in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]}
    assert states == {first.name: "killed", second.name: "completed"} and result(second)["steps"] == 400
    whole = contents(newest(second))
    assert main(["resume", str(first)]) == 0 and result(first)["steps"] == 400
    assert contents(newest(second)) == whole


def test_the_table_comes_on_a_full_disk_too(small_disk: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = small_disk / "sweep" / "0_seed=0"
    assert train(job, rows, steps=2) == 0
    (small_disk / "ballast").write_bytes(b"\0" * shutil.disk_usage(small_disk).free)
    capsys.readouterr()
    assert len(summarise(job.parent, [(job, ["seed=0"])], None, Console())) == 1
    said = capsys.readouterr().out
    assert "seed=0  completed" in said and "not written: " in said and "No space left on device" in said


# ---- a sweep in a process of its own


@contextlib.contextmanager
def endless(directory: Path, rows: Path, *words: str, **changes: object) -> Iterator[subprocess.Popen[str]]:
    """One that goes on until somebody stops it, unless `changes` say how long; in a process group of its own."""
    changes = {"steps": 100_000, "eval_every": 0, "save_every": 0, **changes}
    command_line = [sys.executable, "-m", "cookbook.cli", *command(directory, rows, **changes), "-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command_line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_rows(sweep_directory: Path, jobs: int, rows: int) -> None:
    wait_until(lambda: sum(num_rows(job) >= rows for job in runs_in(sweep_directory)) >= jobs, seconds=180)


def process_of(run: Path) -> int:
    """The one that holds it, by its command line."""
    lines = {file: file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()}
    return next(int(file.parent.name) for file, line in lines.items() if f"run_dir={run}".encode() in line)
