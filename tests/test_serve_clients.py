"""Programs of others that know nothing of this server: tinker-cookbook's training loops, and the tinker command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("tinker", reason="the tinker SDK is not installed (uv sync --group serving)")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from cookbook.serving.server import Server
from tests.live_server import MODEL, serving
from tests.small_runs import ROOT
from tests.tiny import data, logprobs_of, peft_model, randomise

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
TINKER_COOKBOOK = "0.5.8"
INSTALL_SECONDS, LOOP_SECONDS = 480, 240
KEY = "tml-anything"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    with serving(tmp_path_factory.mktemp("store")) as (url, server):
        yield url, server


def client_environment(url: str) -> dict[str, str]:
    """That of a shell in which somebody uses Tinker."""
    theirs = {"TINKER_BASE_URL": url, "TINKER_API_KEY": KEY, "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, "OMP_NUM_THREADS": "1", **theirs}


# ---- tinker-cookbook


@pytest.fixture(scope="module")
def cookbook_python() -> Path:
    """Of an environment with tinker-cookbook, made once and kept beside uv's cache, of whose files it consists."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("tinker-cookbook needs an environment of its own, and there is no uv to make it")
    cache = Path(subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip())
    torch_version = importlib.metadata.version("torch")  # the one that uv has in its cache
    home = cache.parent / f"cook-tests-tinker-cookbook-{TINKER_COOKBOOK}-torch-{torch_version}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}."))
        try:
            _install(uv, aside, [f"tinker-cookbook=={TINKER_COOKBOOK}", f"torch=={torch_version}"])
            aside.rename(home)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return python


def _install(uv: str, home: Path, wanted: list[str]) -> None:
    import tomllib

    until = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["exclude-newer"]
    made = [uv, "venv", "--relocatable", "--allow-existing", "--python", sys.executable, str(home)]
    subprocess.run(made, capture_output=True, check=True)
    command = [uv, "pip", "install", "--python", str(home), "--exclude-newer", until, *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, cwd=home)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{' '.join(wanted)} could not be installed within {INSTALL_SECONDS} s")
    if done.returncode:
        pytest.skip(f"{' '.join(wanted)} could not be installed: {done.stderr.strip()[-500:]}")


def run_loop(python: Path, loop: str, url: str, log: Path, epochs: int) -> tuple[list[dict], list[dict]]:
    """What the loop has written: its metrics per step, its checkpoints."""
    script = ROOT / "tests" / "clients" / "cookbook_loops.py"
    command = [str(python), str(script), loop, url, MODEL, str(log), str(epochs)]
    done = subprocess.run(
        command, env=client_environment(url), cwd=log.parent, capture_output=True, text=True, timeout=LOOP_SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return rows(log / "metrics.jsonl"), rows(log / "checkpoints.jsonl")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_their_supervised_loop_learns_and_resumes(cookbook_python: Path, live: tuple[str, Server], tmp_path: Path) -> None:
    url, server = live
    metrics, checkpoints = run_loop(cookbook_python, "sft", url, tmp_path / "sft", epochs=1)
    losses = [row["train_mean_nll"] for row in metrics]
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert losses[-1] < 0.6 * losses[0]
    assert metrics[2]["test/nll"] < metrics[0]["test/nll"] == pytest.approx(losses[0], rel=0.2)
    assert [one["name"] for one in checkpoints] == ["000002", "final"]

    metrics, checkpoints = run_loop(cookbook_python, "sft", url, tmp_path / "sft", epochs=2)  # goes on from "final"
    assert [row["step"] for row in metrics] == list(range(8))
    assert metrics[4]["train_mean_nll"] < losses[-1] and metrics[-1]["train_mean_nll"] < 0.2 * losses[0]
    for one in checkpoints:
        for uri in (one["state_path"], one["sampler_path"]):
            assert server.store.checkpoint(uri, "local").size > 1000


def test_their_rl_loop_learns_on_policy(cookbook_python: Path, live: tuple[str, Server], tmp_path: Path) -> None:
    metrics, checkpoints = run_loop(cookbook_python, "rl", live[0], tmp_path / "rl", epochs=1)
    rewards = [row["env/all/reward/total"] for row in metrics]
    assert [row["step"] for row in metrics] == list(range(8))
    assert max(rewards[-3:]) > rewards[0] + 0.2
    for row in metrics:  # what was sampled has the logprobs under which it was sampled
        assert abs(row["optim/kl_sample_train_v1"]) < 1e-4 and row["env/all/total_episodes"] == 32
    assert [one["name"] for one in checkpoints] == ["000004", "000008", "final"]
    assert live[1].store.checkpoint(checkpoints[-1]["sampler_path"], "local").size > 1000


# ---- the tinker command


class Command:
    """`tinker`, typed against a server."""

    def __init__(self, url: str, directory: Path) -> None:
        self.environment, self.directory = client_environment(url), directory

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tinker.cli", *words]
        return subprocess.run(command, env=self.environment, cwd=self.directory, capture_output=True, text=True, timeout=120)

    def json(self, *words: str) -> dict:
        done = self.run("--format", "json", *words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def said(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def command(live: tuple[str, Server], tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(live[0], tmp_path_factory.mktemp("shell"))


@pytest.fixture(scope="module")
def run_id(live: tuple[str, Server]) -> str:
    """A training client with a training checkpoint "kept" and an export "out"."""
    import tinker

    url, server = live
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TINKER_TELEMETRY", "0")
        service = tinker.ServiceClient(base_url=url, api_key=KEY)
        client = service.create_lora_training_client(MODEL, rank=4, seed=0).result()
        trainer = server.runs[client.model_id].opening
        assert trainer is not None
        randomise(trainer.result(), 3)
        client.save_state("kept").result()
        client.save_weights_external("out").result()
    return client.model_id


def test_the_command_lists_runs_and_checkpoints(command: Command, run_id: str) -> None:
    (run,) = [one for one in command.json("run", "list", "--limit", "0")["runs"] if one["training_run_id"] == run_id]
    assert (run["base_model"], run["lora_rank"]) == (MODEL, 4)
    assert run_id in command.said("run", "info", run_id)
    (model,) = command.json("model", "list")["models"]
    assert model["model_name"] == MODEL
    listed = command.json("checkpoint", "list", "--run-id", run_id)["checkpoints"]
    assert {one["checkpoint_id"] for one in listed} == {"weights/kept", "external_weights/out"}
    everywhere = command.json("checkpoint", "list", "--limit", "0")["checkpoints"]
    assert {one["tinker_path"] for one in listed} <= {one["tinker_path"] for one in everywhere}
    missing = command.run("run", "info", "nothing:train:0")
    assert missing.returncode == 1 and "no training run nothing:train:0" in missing.stderr


def test_the_command_publishes_times_and_deletes(command: Command, run_id: str) -> None:
    path = f"tinker://{run_id}/external_weights/out"
    command.said("checkpoint", "publish", path)
    command.said("checkpoint", "set-ttl", path, "--ttl", "7200")
    found = command.json("checkpoint", "info", path)
    assert found["public"] and found["expires_at"] is not None and found["lora_rank"] == 4
    command.said("checkpoint", "unpublish", path)
    command.said("checkpoint", "set-ttl", path, "--remove")
    found = command.json("checkpoint", "info", path)
    assert not found["public"] and found["expires_at"] is None
    short = command.run("checkpoint", "set-ttl", path, "--ttl", "5")
    assert short.returncode == 1 and "3600" in short.stderr


@pytest.mark.parametrize("kind", ["weights/kept", "external_weights/out"])
def test_what_the_command_downloads_loads_in_peft(
    kind: str, command: Command, live: tuple[str, Server], run_id: str, tmp_path: Path
) -> None:
    server = live[1]
    exports, runs = len(server.store.checkpoints("kind = 'external_weights'")), set(server.runs)
    command.said("checkpoint", "download", f"tinker://{run_id}/{kind}", "--output", str(tmp_path))
    (config,) = tmp_path.rglob("adapter_config.json")
    one = data([20], weights=False)[0]
    opening = server.runs[run_id].opening
    assert opening is not None
    ours = opening.result().forward([one], "cross_entropy").result(60).loss_fn_outputs[0]["logprobs"]
    torch.testing.assert_close(logprobs_of(peft_model(config.parent), one).detach(), ours, rtol=0, atol=1e-4)
    assert len(server.store.checkpoints("kind = 'external_weights'")) == exports  # the export on the way was temporary
    assert set(server.runs) == runs  # and so was its training client
