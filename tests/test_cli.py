"""The command line: flags anywhere, one-line errors, runs named, resumed, repeated; completion; the cost of --help."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cookbook.cli import main

ROOT = Path(__file__).parent.parent

RECIPE = '''"""A recipe that trains nothing: it says what it was given."""
from __future__ import annotations
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from cookbook.config import DataConfig, LogConfig, ModelConfig
from cookbook.errors import UsageError

@dataclass
class Config:
    name: str | None = None
    run_dir: str | None = None
    seed: int = 0
    steps: int | None = 10
    keep_last: int = 3
    fail: str = ""
    reward: str | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    log: LogConfig = field(default_factory=LogConfig)

def main(config: Config) -> None:
    if config.fail == "usage":
        raise UsageError("data.path=x: no such file")
    if config.fail == "interrupt":
        raise KeyboardInterrupt
    if config.fail == "bug":
        raise RuntimeError("a bug")
    print(f"trained {config.name} steps={config.steps} seed={config.seed}")
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a recipe file in it."""
    (tmp_path / "mine.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err.rstrip("\n")


# Runs.


def test_a_run_is_called_after_recipe_model_data_and_time(here: Path) -> None:
    assert main(["run", "mine.py", "model=qwen3-8b", "data=no_robots"]) == 0
    assert main(["run", "mine.py", "model.name=some/Other-Model", "data=file", "data.path=rows/my.jsonl"]) == 0
    names = sorted(path.name.rsplit("-", 2)[0] for path in (here / "runs").iterdir())
    assert names == ["mine-Other-Model-my.jsonl", "mine-qwen3-8b-no_robots"]


def test_a_run_of_rl_is_called_after_its_env_too(here: Path) -> None:
    assert main(["run", "mine.py", "env=guess_number", "env.high=50", "model=qwen3-8b", "data=file"]) == 0
    assert [path.name.rsplit("-", 2)[0] for path in (here / "runs").iterdir()] == ["mine-qwen3-8b-guess_number-file"]
    assert main(["rerun", next((here / "runs").iterdir()).name, "env.low=2", "name=b"]) == 0
    saved = yaml.safe_load((here / "runs/b/config.yaml").read_text())
    assert saved["env"] == {"name": "guess_number", "low": 2, "high": 50, "max_turns": None}


def test_two_runs_of_one_second_get_two_directories(here: Path) -> None:
    assert [main(["run", "mine.py"]) for _ in range(3)] == [0, 0, 0]
    assert len(list((here / "runs").iterdir())) == 3


def test_flags_may_stand_between_overrides(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "mine.py", "steps=3", "--cfg", "job", "seed=2"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["steps"], printed["seed"]) == (3, 2)
    assert not (here / "runs").exists()


def test_config_yaml_holds_the_directory_and_absolute_paths(here: Path) -> None:
    (here / "my.jsonl").touch()
    main(["run", "mine.py", "run_dir=out/a", "data=file", "data.path=my.jsonl"])
    saved = yaml.safe_load((here / "out/a/config.yaml").read_text())
    assert saved["run_dir"] == str(here / "out/a") and saved["name"] == "a"
    assert saved["data"]["path"] == str(here / "my.jsonl")


def test_reward_files_and_files_of_an_env_are_saved_from_the_root_too(here: Path) -> None:
    words = ["reward=mine.py:score", "rewards.mine.py:other=0.5", "rewards.json:dumps=1", "rewards.judge=1"]
    main(["run", "mine.py", "run_dir=a", *words, "data=mine.py", "env=gsm8k", "env.path=mine.py"])
    saved = yaml.safe_load((here / "a/config.yaml").read_text())
    assert saved["reward"] == f"{here}/mine.py:score"
    assert saved["rewards"] == {f"{here}/mine.py:other": 0.5, "json:dumps": 1.0, "judge": 1.0}
    assert (saved["data"]["name"], saved["data"]["path"]) == ("file", str(here / "mine.py"))
    assert (saved["env"]["name"], saved["env"]["path"]) == ("gsm8k", str(here / "mine.py"))


def test_a_directory_that_holds_a_run_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "mine.py", "name=a"])
    assert error(capsys, "run", "mine.py", "name=a") == (
        f"error: {here}/runs/a holds a run: cook resume {here}/runs/a, or choose another name= or run_dir="
    )
    (here / "taken").touch()
    assert (
        error(capsys, "run", "mine.py", "run_dir=taken") == f"error: run_dir={here}/taken is a file; give a directory"
    )


def test_resume_goes_on_in_the_same_directory_also_when_it_was_moved(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", "mine.py", "name=a", "seed=4"])
    (here / "runs/a").rename(here / "moved")
    assert main(["resume", "moved", "steps=20", "log.every=5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "trained a steps=20 seed=4"
    saved = yaml.safe_load((here / "moved/config.yaml").read_text())
    assert (saved["steps"], saved["log"]["every"], saved["run_dir"]) == (20, 5, str(here / "moved"))


def test_resume_refuses_what_would_make_it_another_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "mine.py", "name=a"])
    assert error(capsys, "resume", "a", "seed=1") == (
        "error: seed=1: a resumed run keeps its seed; steps, epochs, eval_every, save_*, keep_last, log.*, service may change "
        "(a new run with this change: cook rerun a seed=1)"
    )


def test_resume_of_no_run_names_the_one_meant(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "resume", "x") == "error: no run x; the newest are (none in ./runs)"
    main(["run", "mine.py", "name=first"])
    assert error(capsys, "resume", "frist") == "error: no run frist (did you mean first?); the newest are first"
    assert error(capsys, "resume", "runs") == "error: runs is a folder of runs: name one of first"
    (here / "empty").mkdir()
    assert error(capsys, "resume", "empty") == "error: empty holds no run: there is no config.yaml in it"


def test_rerun_is_a_new_run_with_the_same_configuration(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "mine.py", "name=a", "seed=4", "model=qwen3-8b"])
    assert main(["rerun", "a", "name=b", "steps=2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "trained b steps=2 seed=4"
    assert yaml.safe_load((here / "runs/b/config.yaml").read_text())["model"]["name"] == "Qwen/Qwen3-8B"
    assert yaml.safe_load((here / "runs/b/overrides.yaml").read_text()) == [
        "seed=4",
        "model=qwen3-8b",
        "name=b",
        "steps=2",
    ]


# How it ends.


def test_a_users_mistake_is_one_line_and_leaves_no_run_behind(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "run", "mine.py", "name=a", "fail=usage") == "error: data.path=x: no such file"
    assert not (here / "runs/a").exists()


def test_an_interrupt_ends_with_130_and_a_bug_with_its_traceback(here: Path) -> None:
    assert main(["run", "mine.py", "fail=interrupt"]) == 130
    with pytest.raises(RuntimeError, match="a bug"):
        main(["run", "mine.py", "fail=bug"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sfft"], "error: No such command 'sfft'. Did you mean 'sft'?"),
        (["sft", "--dryrun"], "error: No such option: --dryrun (Possible options: --dry-run)"),
        (["run"], "error: Missing argument 'FILE'."),
        (["rl", "env.digts=1"], "error: unknown key env.digts (did you mean env.digits?); all keys: --cfg job"),
        (["rl", "digits=1"], "error: unknown key digits (did you mean env.digits?); all keys: --cfg job"),
        (["sft", "lr=1"], "error: unknown key lr (did you mean learning_rate?); all keys: --cfg job"),
        (
            ["data", "check", "max_lenght=1"],
            "error: unknown key max_lenght (did you mean max_length?); all keys: --cfg job",
        ),
    ],
)
def test_a_wrong_word_is_answered_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error(capsys, *words) == message


# What it shows.


def test_models_lists_every_file_of_conf_with_its_hub_id(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    for path in (ROOT / "conf/model").glob("*.yaml"):
        assert path.stem in shown and yaml.safe_load(path.read_text())["name"] in shown


def test_recipes_lists_the_first_sentence_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cook sft Supervised fine-tuning" in shown and "cook rl REINFORCE" in shown


def test_doctor_names_versions_devices_and_what_auto_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("torch ", "cpu", "dtype", "GiB", "smollm2-135m", "hub"))


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_neither_help_nor_composing_imports_torch() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'datasets', 'wandb', 'peft') if m in sys.modules]"
    for words in (["--help"], ["sft", "--cfg", "job"], ["rl", "--cfg", "job"], ["models"], ["envs"]):
        code = f"import sys; from cookbook.cli import main; main({words}); print('heavy', {heavy})"
        assert in_a_fresh_process(code).splitlines()[-1] == "heavy []", words


EMPTY = "import typer; app = typer.Typer(); app.command()(lambda: None); app(['--help'])"


def test_help_is_there_in_six_tenths_of_a_second() -> None:
    def seconds(code: str) -> float:
        """Of processor time, the least of three."""
        tries = []
        for _ in range(3):
            start = os.times()
            in_a_fresh_process(code)
            end = os.times()
            tries.append(end.children_user + end.children_system - start.children_user - start.children_system)
        return min(tries)

    ours = seconds("from cookbook.cli import main; main(['--help'])")
    assert ours < 0.6 or ours < 1.35 * seconds(EMPTY)  # on a slow or busy machine: little more than Typer itself takes


# Completion.


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cook ru", ["run", "runs"]),
        ("cook data ", ["check", "show"]),
        ("cook sft model=qwen3-1", ["model=qwen3-1.7b", "model=qwen3-14b"]),
        ("cook sft steps=1 lora.tr", ["lora.train_attn=", "lora.train_mlp=", "lora.train_unembed="]),
        ("cook sft lora.train_mlp=", ["lora.train_mlp=true", "lora.train_mlp=false"]),
        ("cook sft lea", ["learning_rate="]),
        ("cook sft lo", ["lora.", "log."]),
        ("cook sft --d", ["--dry-run"]),
        ("cook sft --cfg ", ["job"]),
        ("cook sft recipe=", ["recipe=chat"]),
        ("cook rl env=gue", ["env=guess_number"]),
        ("cook rl env.d", ["env.digits="]),
        ("cook rl env=guess_number env.h", ["env.high="]),
        ("cook rl env=no_such_env ste", ["steps="]),
        ("cook run mine.py env=guess_number env.h", ["env.high="]),
        ("cook rl experiment=rl_s", ["experiment=rl_smoke"]),
        ("cook sft experiment=", ["experiment=smoke", "experiment=speedrun"]),
        ("cook rl data=my", []),
        ("cook rl data=mi", ["data=mixture", "data=mine.py"]),
        ("cook rl rewa", ["reward=", "rewards."]),
        ("cook envs ", ["play", "check"]),
        ("cook envs play gue", ["guess_number"]),
        ("cook envs check arithmetic d", ["digits="]),
        ("cook completion ", ["bash", "zsh", "fish"]),
        ("cook resume a/b st", ["steps="]),
        ("cook nonsense ", ["sft"]),
        ("cook sft data.path='", []),
    ],
)
def test_completion_offers_what_may_stand_there(
    line: str, found: list[str], capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert main(["_complete", "zsh", line]) == 0
    offered = capsys.readouterr().out.split()
    assert offered == found or (line == "cook nonsense " and found[0] in offered)


def test_completion_offers_paths_and_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "rows").mkdir()
    (here / "rows/a.jsonl").touch()
    main(["run", "mine.py", "name=first"])
    for line, found in {
        "cook run m": ["mine.py"],
        "cook sft data.path=ro": ["data.path=rows/"],
        "cook data check rows/": ["rows/a.jsonl"],
        "cook resume f": ["first"],
        "cook run mine.py see": ["seed="],
    }.items():
        capsys.readouterr()
        main(["_complete", "zsh", line])
        assert capsys.readouterr().out.split() == found, line


def test_bash_itself_completes_a_model(tmp_path: Path) -> None:
    """Typed into a real bash on a terminal: COMP_WORDBREAKS, the script and the answer together."""
    (tmp_path / "cook").write_text(f'#!/bin/sh\nexec {sys.executable} -m cookbook.cli "$@"\n')
    (tmp_path / "cook").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)

    def read_until(text: str) -> str:
        seen, deadline = "", time.monotonic() + 20
        while text not in seen and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096).decode().replace("\x07", "")  # the bell
        return seen

    try:
        os.write(terminal, b'eval "$(cook completion bash)"; echo rea"dy"\n')
        read_until("ready")
        os.write(terminal, b"cook sft lea\t1 model=qwen3-8\t--cf\t")
        assert "cook sft learning_rate=1 model=qwen3-8b --cfg" in read_until("--cfg")
    finally:
        os.close(terminal)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
