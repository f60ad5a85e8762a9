"""`cook sft|rl|dpo service=http://...`: a run over the wire is the run in process; what goes wrong there is one line."""

from __future__ import annotations

import http.server
import json
import math
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("tinker", reason="the tinker SDK is not installed (uv sync --extra remote)")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from cookbook.cli import main
from cookbook.config import EngineConfig
from cookbook.errors import UsageError
from cookbook.remote import RemoteService
from cookbook.remote_server import Server
from cookbook.service import connect_remote
from cookbook.serving import keys
from core import AdamParams, ModelInput, SamplingParams
from core.losses import LOSSES
from tests.live_server import MODEL, serving
from tests.small_runs import (
    checkpoint_rows,
    command,
    losses,
    metrics,
    num_rows,
    result,
    train,
    wait_until,
    write_rows,
)
from tests.tiny import data, new_client, tiny_model_dir, tokens

pytestmark = pytest.mark.usefixtures("one_thread", "no_key")
EXACT = {"engine_token_budget": 2048}  # the same data in a custom loss as in process
CLOCK = ("time/", "perf/")


@pytest.fixture(scope="module")
def url(no_key: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("store")) as (url, _):
        yield url


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "here"
    assert train(directory, rows) == 0
    return directory


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, rows: Path, url: str) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "there"
    assert train(directory, rows, service=url) == 0
    return directory


def assert_same_metrics(run: Path, other: Path, within: float) -> None:
    """Row by row, everything that no clock measured."""
    ours, theirs = metrics(run), metrics(other)
    assert [row["progress/step"] for row in ours] == [row["progress/step"] for row in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        for key in mine:
            if not key.startswith(CLOCK):
                assert mine[key] == pytest.approx(its[key], rel=within, abs=within), (mine["progress/step"], key)


# ---- equal runs


def test_sft_over_the_wire_is_sft_in_process(here: Path, there: Path) -> None:
    assert losses(there) == pytest.approx(losses(here), rel=1e-6)
    assert_same_metrics(there, here, within=1e-5)
    assert losses(there)[-1] < 0.5 * losses(there)[0]


def test_dpo_over_the_wire_is_dpo_in_process(tmp_path: Path, url: str) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", map(pair, range(24)))
    for recipe in ("pairs", "ipo", "simpo", "kto"):
        where = {name: tmp_path / f"{recipe}-{name}" for name in ("here", "there")}
        changes = {"recipe": recipe, "steps": 4, "eval_every": 2, **EXACT}
        assert train(where["here"], pairs, "dpo", **changes) == 0
        assert train(where["there"], pairs, "dpo", service=url, **changes) == 0
        assert_same_metrics(where["there"], where["here"], within=1e-5)
        if recipe == "pairs":
            assert metrics(where["there"])[-1]["dpo/loss"] < 0.6


def pair(number: int) -> dict[str, object]:
    """Answering in a's is wanted, in b's it is not."""
    reply = {letter: [{"role": "assistant", "content": letter * (4 + number % 5)}] for letter in "ab"}
    return {"prompt": [{"role": "user", "content": f"say something, {number}"}], "chosen": reply["a"], "rejected": reply["b"]}


@pytest.mark.parametrize(
    "words",
    [(), ("recipe=grpo", "kl_penalty=0.1"), ("loss_fn=gspo",), ("recipe=async_reinforce", "max_steps_off_policy=0")],
    ids=["reinforce", "grpo", "gspo", "async"],
)
def test_rl_over_the_wire_is_rl_in_process(tmp_path: Path, url: str, words: tuple[str, ...]) -> None:
    for name, service in (("here", "local"), ("there", url)):
        assert rl(tmp_path / name, tmp_path, f"service={service}", *words) == 0
    assert_same_metrics(tmp_path / "there", tmp_path / "here", within=1e-5)
    assert any(row.get("optim/grad_norm") for row in metrics(tmp_path / "there"))
    first = [(tmp_path / name / "rollouts" / "000003.jsonl").read_text() for name in ("here", "there")]
    said = [[json.loads(line)["turns"][0]["tokens"] for line in text.splitlines()] for text in first]
    assert said[0] == said[1]


def rl(run_dir: Path, folder: Path, *words: str) -> int:
    """The exit status of `cook rl`: 3 problems, 4 attempts of 6 tokens."""
    write_rows(folder / "prompts.jsonl", ({"prompt": f"say {i}"} for i in range(20)))
    (folder / "rewards.py").write_text("def letters(completions, **columns):\n    return [c.count('a') for c in completions]")
    return main([
        "rl", "data=file", f"data.path={folder}/prompts.jsonl", f"reward={folder}/rewards.py:letters",
        f"model.name={tiny_model_dir()}", "engine.dtype=float32", "engine.device=cpu", "lora.rank=4", "steps=3",
        "groups_per_batch=3", "group_size=4", "max_tokens=6", "learning_rate=0.02", "eval_every=2", "eval.problems=2",
        "save_every=2", f"run_dir={run_dir}", *words,
    ])  # fmt: skip


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_weight_means_the_same_over_the_wire(tmp_path: Path, url: str, loss_fn: str) -> None:
    """RL losses of Tinker take none: they travel in the advantages."""
    batch = data([20, 9], seed=3, loss_fn=loss_fn)
    remote = connect_remote(url, EngineConfig()).create_lora_training_client(MODEL, 4).result()
    found = []
    for client in (new_client(tmp_path, noise=False), remote):
        output = client.forward_backward(batch, loss_fn, logprobs="weighted").result()
        found.append((output, client.optim_step(AdamParams(1e-3)).result().metrics["grad_norm:mean"]))
    (ours, norm), (theirs, its_norm) = found
    assert its_norm == pytest.approx(norm, rel=1e-5)
    assert theirs.metrics["loss:sum"] == pytest.approx(ours.metrics["loss:sum"], rel=1e-5)
    for a, b in zip(theirs.loss_fn_outputs, ours.loss_fn_outputs, strict=True):
        torch.testing.assert_close(a["logprobs"], b["logprobs"], rtol=0, atol=1e-5)


def test_a_snapshot_samples_as_in_process(tmp_path: Path, url: str) -> None:
    prompt, params = ModelInput.from_ints(tokens(12, 5)), SamplingParams(max_tokens=9, seed=7, stop=[258], temperature=0.8)
    remote = connect_remote(url, EngineConfig()).create_lora_training_client(MODEL, 4).result()
    samplers = [c.save_weights_and_get_sampling_client().result() for c in (new_client(tmp_path, noise=False), remote)]
    ours, theirs = (s.sample(prompt, 3, params, True).result() for s in samplers)
    assert [s.tokens for s in theirs.sequences] == [s.tokens for s in ours.sequences]
    assert [s.stop_reason for s in theirs.sequences] == [s.stop_reason for s in ours.sequences]
    assert theirs.sequences[0].logprobs == pytest.approx(ours.sequences[0].logprobs, abs=1e-5)
    assert theirs.prompt_logprobs is not None and theirs.prompt_logprobs[0] is None
    assert theirs.prompt_logprobs[1:] == pytest.approx(samplers[0].compute_logprobs(prompt).result()[1:], abs=1e-5)
    assert samplers[1].compute_logprobs(prompt).result()[1:] == pytest.approx(theirs.prompt_logprobs[1:], abs=1e-5)


# ---- checkpoints


def test_the_record_names_checkpoints_on_the_server_and_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, there: Path
) -> None:
    kept = checkpoint_rows(there)
    assert all(row["uri"].startswith("tinker://") and row["path"] is None for row in kept)
    broken = tmp_path / "broken"
    shutil.copytree(there, broken)
    (broken / "checkpoints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept if row["step"] < 12))
    (broken / "result.json").unlink()
    assert main(["resume", str(broken)]) == 0
    assert_same_metrics(broken, there, within=1e-6)
    assert result(broken)["status"] == "completed" and result(broken)["steps"] == 12


def test_what_a_run_does_not_keep_goes_on_the_server_too(there: Path, url: str) -> None:
    import tinker

    rest = tinker.RestClient(base_url=url, api_key="tml-none")
    kept = {row["uri"] for row in checkpoint_rows(there)}
    run = next(iter(kept)).removeprefix("tinker://").split("/")[0]
    wait_until(lambda: {c.tinker_path for c in rest.list_checkpoints(run).result().checkpoints} == kept)


def test_a_checkpoint_that_the_server_lost_gives_way_to_the_one_before(tmp_path: Path, there: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(there, run)
    lost = checkpoint_rows(run)[-1]
    lost["uri"] = lost["uri"].rpartition("/")[0] + "/000099"
    with (run / "checkpoints.jsonl").open("a") as file:
        file.write(json.dumps({**lost, "step": 13}) + "\n")
    assert main(["resume", str(run), "steps=13"]) == 0
    said = (run / "console.log").read_text()
    assert "checkpoint 000013 is damaged" in said and "no checkpoint tinker://" in said
    assert "falling back to 000012" in said and result(run)["steps"] == 13


def test_the_adapter_comes_home_and_serves_without_the_server(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint_rows(there)[-1]
    adapter = there / "checkpoints" / newest["uri"].removeprefix("tinker://")
    assert sorted(file.name for file in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert main(["eval", str(there), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["held_out/nll"]["value"] == pytest.approx(result(there)["eval"]["after"]["held_out/nll"], rel=1e-3)
    assert main(["export", str(there), "--to", str(tmp_path / "peft")]) == 0
    older = str(checkpoint_rows(there)[0]["step"])  # fetched when it is wanted
    assert main(["export", str(there), "--to", str(tmp_path / "older"), "--checkpoint", older]) == 0


def test_a_run_starts_from_another_one_on_either_side(tmp_path: Path, there: Path, here: Path, rows: Path, url: str) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", map(pair, range(24)))
    assert train(tmp_path / "dpo", pairs, "dpo", service=url, init_from=there, steps=2, learning_rate=0.003) == 0
    assert metrics(tmp_path / "dpo")[1]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)  # the run is its own reference
    record = json.loads((tmp_path / "dpo" / "run.json").read_text())
    assert record["origin"] == checkpoint_rows(there)[-1]["uri"]
    assert sorted(file.name for file in (tmp_path / "dpo" / "origin").iterdir()) == [  # brought home with the adapter
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert main(["eval", str(tmp_path / "dpo"), "--to", str(tmp_path / "eval.json")]) == 0
    accuracy = json.loads((tmp_path / "eval.json").read_text())["figures"]["held_out/accuracy"]["value"]
    assert accuracy == result(tmp_path / "dpo")["eval"]["after"]["held_out/accuracy"]
    assert main(["resume", str(tmp_path / "dpo"), "steps=3"]) == 0
    assert train(tmp_path / "local", rows, init_from=there, steps=1) == 0
    held_out = result(there)["eval"]["after"]["held_out/nll"]
    assert metrics(tmp_path / "local")[0]["eval/held_out/nll"] == pytest.approx(held_out, rel=1e-4)


# ---- what goes wrong


def error_of(capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: Path, **changes: object) -> str:
    """The one line of a run that does not begin."""
    capsys.readouterr()
    assert train(tmp_path / "refused", rows, **changes) == 2
    assert not (tmp_path / "refused").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said.removeprefix("error: ").rstrip("\n")


def test_what_cannot_begin_is_one_line(
    tmp_path: Path, rows: Path, here: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(**changes: object) -> str:
        return error_of(capsys, tmp_path, rows, **changes)

    assert error(service="http://127.0.0.1:1") == (
        "service=http://127.0.0.1:1: no server answers there ([Errno 111] Connection refused): start one (cook serve),"
        " or correct the address"
    )
    assert error(service="box:8000") == (
        "service=box:8000: expected local, tinker, or the URL of a server such as http://box:8000"
    )
    other = tiny_model_dir("qwen2")
    assert error(service=url, model_name=other) == f"model.name={other} is not served by {url}, which has: {MODEL}"
    assert error(service=url, init_from=here) == (
        f"init_from={here} lies on this machine, and {url} takes no weights from outside:"
        " start from a run that was trained there or a tinker:// URI, or train with service=local"
    )
    gone = "tinker://a:train:0/weights/000001"
    assert error(service=url, init_from=gone) == f"{url} refuses this (HTTP 404): no checkpoint {gone}"
    assert error(service=url, lora_rank=1024) == (
        f"{url} refuses this (HTTP 400): lora_config.rank is 1024, expected at most 512 (limits.rank)"
    )
    assert error(service=url, max_length=1025) == (
        f"max_length=1025, but the context of {MODEL} is 1024 tokens: set max_length=1024 or less"
    )


def test_a_key_is_wanted_wrong_or_right(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "(no valid API key: give one made by `cook serve keys create NAME`)"
    with serving(tmp_path / "store") as (url, server):
        key = keys.create(server.store, "alice")
        assert error_of(capsys, tmp_path, rows, service=url) == f"{url} wants a key, set TINKER_API_KEY {told}"
        monkeypatch.setenv("TINKER_API_KEY", "tml-guessed")
        line = error_of(capsys, tmp_path, rows, service=url)
        assert line == f"{url} does not take the key in TINKER_API_KEY {told}"
        monkeypatch.setenv("TINKER_API_KEY", "guessed")
        line = error_of(capsys, tmp_path, rows, service=url)
        assert line == "TINKER_API_KEY is no key of a Tinker server: those begin with tml-"
        monkeypatch.setenv("TINKER_API_KEY", key)
        assert train(tmp_path / "run", rows, service=url, steps=1) == 0
        wait_until(lambda: not server.store.rows("SELECT 1 FROM sessions WHERE finished IS NULL"))  # runs end their sessions


def test_what_answers_may_be_no_tinker_server(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}"
        assert train(tmp_path / "run", rows, service=url) == 2
        web.shutdown()
    line = capsys.readouterr().err.splitlines()[-1]  # above it that server's own log
    assert line == f"error: service={url}: what answers there is no Tinker server (HTTP 501)"


def test_a_loss_that_is_no_number_names_its_rows(
    tmp_path: Path, rows: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", rows, service=url, learning_rate=1e30, eval_every=0, optim_warmup_steps=0) == 2
    said = capsys.readouterr().err
    assert re.match(r"error: step \d+: loss nan, the gradient of optimizer step \d+ is not finite.*; rows rows.jsonl:", said)
    assert "lower learning_rate" in said and said.count("\n") == 1


def test_a_run_whose_server_restarts_ends_in_one_line_and_goes_on_when_resumed(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, status = tmp_path / "run", list[int]()
    assert train(tmp_path / "straight", rows, steps=30) == 0
    with serving(tmp_path / "store") as (url, _):
        thread = threading.Thread(target=lambda: status.append(train(run, rows, service=url, steps=30)))
        thread.start()
        wait_until(lambda: (run / "checkpoints.jsonl").exists() and num_rows(run) >= 5)
    with serving(tmp_path / "store", port=int(url.rpartition(":")[2])):
        thread.join(60)
        assert status == [2] and result(run)["status"] == "failed" and 3 <= result(run)["steps"] < 30
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == f"error: {result(run)['error']}"
        lost, gone = f"{url} has lost what was under way", f"{url} refuses this (HTTP 404): "
        assert line.startswith((f"error: {lost}", f"error: {gone}training run ", f"error: {gone}sampling session "))
    with serving(tmp_path / "store") as (moved, _):
        assert main(["resume", str(run), f"service={moved}"]) == 0
    assert_same_metrics(run, tmp_path / "straight", within=1e-5)


def test_a_server_that_stays_away_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, _):
        service = RemoteService(Server.named(url), patience=1.0)
        trainer = service.create_lora_training_client(MODEL, 4).result()
        sampler = trainer.save_weights_and_get_sampling_client().result()
    waiting = [trainer.forward(data([9]), "cross_entropy"), sampler.sample(ModelInput.from_ints([1, 2]))]
    for future in waiting:
        with pytest.raises(UsageError, match=rf"^{url} has not answered for 1 seconds$"):
            future.result(30)


def test_a_dry_run_asks_the_server(tmp_path: Path, rows: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(tmp_path / "run", rows, service=url), "--dry-run"]) == 0
    assert f"served   by {url}: memory and time are that machine's" in capsys.readouterr().out
    assert main([*command(tmp_path / "run", rows, service=url, model_name=tiny_model_dir("qwen3")), "--dry-run"]) == 2
    assert "is not served by" in capsys.readouterr().err
