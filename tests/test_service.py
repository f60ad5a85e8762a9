"""Where training happens: what a run connects to, and which adapter it starts from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cookbook.config import EngineConfig, LoraConfig, ModelConfig
from cookbook.errors import UsageError
from cookbook.service import adapter_directory, check_context, connect, new_trainer, opened
from core import AdamParams
from tests.small_runs import ROOT
from tests.tiny import datum, flat, new_client, tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = EngineConfig(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of rank 4 on the tiny Llama, one step trained."""
    client = new_client(tmp_path_factory.mktemp("store"))
    client.forward_backward([datum(20)], "cross_entropy")
    client.optim_step(AdamParams(0.1))
    return Path(client.save_state("000001").result().directory)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Path:
    """A working directory with runs/a, which has the checkpoint and rows of two that are gone."""
    run = tmp_path / "runs" / "a"
    shutil.copytree(checkpoint, run / "checkpoints" / "0:train:0" / "weights" / "000001")
    rows = [{"step": step, "path": f"checkpoints/0:train:0/weights/{step:06d}"} for step in (1, 2)]
    rows.append({"step": 3, "path": None})
    (run / "checkpoints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(store: Path, **options: object):
    model = ModelConfig(name=str(options.pop("model", tiny_model_dir())))
    return opened(new_trainer(connect("local", store, CPU), model, LoraConfig(rank=2), 0, options.get("init_from")))  # type: ignore[arg-type]


def test_a_new_trainer_has_the_geometry_and_seed_asked_for(tmp_path: Path) -> None:
    service = connect("local", tmp_path, CPU)
    lora = LoraConfig(rank=2, train_mlp=False)
    clients = [opened(new_trainer(service, ModelConfig(str(tiny_model_dir())), lora, s, None)) for s in (0, 0, 1)]
    assert {(c.adapter.config.rank, c.adapter.config.train_mlp) for c in clients} == {(2, False)}
    a, b, c = (flat(client)["params"] for client in clients)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_an_adapter_to_start_from_keeps_its_rank_and_gets_fresh_moments(here: Path, checkpoint: Path) -> None:
    client = start(here / "store", init_from=str(checkpoint))
    resumed = opened(connect("local", here, CPU).create_training_client_from_state_with_optimizer(checkpoint))
    assert client.adapter.config.rank == 4
    assert torch.equal(flat(client)["params"], flat(resumed)["params"])
    assert (client.adapter.step, resumed.adapter.step) == (0, 1)
    assert not flat(client)["exp_avg"].any() and flat(resumed)["exp_avg"].any()


@pytest.mark.parametrize(
    "origin", ["a", "runs/a", "runs/a/checkpoints/0:train:0/weights/000001", "tinker://0:train:0/weights/000001"]
)
def test_an_adapter_is_named_by_run_directory_or_uri(here: Path, origin: str) -> None:
    expected = here / "runs" / "a" / "checkpoints" / "0:train:0" / "weights" / "000001"
    assert adapter_directory(origin).resolve() == expected


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("b", "init_from=b: no such directory, and no such run under ./runs"),
        ("runs", "init_from=runs: neither a run with a checkpoint nor an adapter directory"),
        ("tinker://", "init_from={origin}: no run under ./runs holds this checkpoint; give its directory"),
        (
            "tinker://0:train:0",
            "init_from={origin}: no run under ./runs holds this checkpoint; give its directory",
        ),
        ("tinker://../a", "init_from={origin}: no run under ./runs holds this checkpoint; give its directory"),
    ],
)
def test_what_names_no_adapter_is_refused(here: Path, origin: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        adapter_directory(origin)
    assert str(refused.value) == message.format(origin=origin)


def test_what_the_engine_refuses_is_one_line(here: Path, checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"was trained on .* this engine holds"):
        start(here / "store", model=tiny_model_dir("qwen3"), init_from=str(checkpoint))
    damaged = Path(shutil.copytree(checkpoint, here / "damaged"))
    (damaged / "state.json").write_text("{")
    with pytest.raises(UsageError, match=r"damaged: state\.json") as refused:
        start(here / "store", init_from=str(damaged))
    assert "\n" not in str(refused.value)


def test_sequences_must_fit_the_models_context(tmp_path: Path) -> None:
    info = start(tmp_path).get_info()
    check_context(info.max_length, info)
    with pytest.raises(UsageError, match=r"max_length=1025, but the context of .* is 1024 tokens"):
        check_context(info.max_length + 1, info)


@pytest.mark.parametrize(
    ("service", "engine", "message"),
    [
        ("lokal", EngineConfig(), "service=lokal: expected local, tinker, or the URL of a server such as http://box:8000"),
        ("local", EngineConfig(dtype="fp32"), "engine.dtype=fp32, expected auto, bfloat16 or float32"),
        ("local", EngineConfig(device="gpu"), "engine.device=gpu: expected auto, cpu, cuda or cuda:N"),
        ("local", EngineConfig(token_budget=-1), "engine.token_budget=-1: expected at least 1, or null (by machine)"),
    ],
)
def test_a_service_that_cannot_be_is_refused(tmp_path: Path, service: str, engine: EngineConfig, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        connect(service, tmp_path, engine)
    assert str(refused.value) == message


def test_after_connecting_the_threads_find_transformers_imported(tmp_path: Path) -> None:
    """Its __init__ swaps itself out while it runs: a second thread that imports it meanwhile fails."""
    code = (
        "import sys; from pathlib import Path; from cookbook.config import EngineConfig; from cookbook.service import connect;"
        f"connect('local', Path({str(tmp_path)!r}), EngineConfig(device='cpu'));"
        "print({'AutoTokenizer', 'AutoModelForCausalLM'} <= vars(sys.modules['transformers']).keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr
