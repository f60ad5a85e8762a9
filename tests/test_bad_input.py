"""What a person may get wrong with `cook sft`: one line with what came and what to do, status 2, no run left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cookbook.cli import main
from tests.small_runs import (
    ROOT,
    chat,
    checkpoint_rows,
    command,
    contents,
    metrics,
    newest,
    result,
    saved_steps,
    steps_in,
    train,
    write_rows,
)
from tests.tiny import CONTEXT, VOCAB, tiny_model_dir, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
GOOD = [chat(i) for i in range(20)]


@pytest.fixture(scope="module", autouse=True)
def tiny_model_is_there() -> None:
    """Building it prints a progress bar, which is not what these tests listen to."""
    tiny_model_dir()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", GOOD)


def refusal(capsys: pytest.CaptureFixture[str], run: Path, data: Path, **changes: object) -> str:
    """The one line on stderr of a run that is refused, without a trace of it."""
    capsys.readouterr()
    assert train(run, data, **changes) == 2
    *lines, end = capsys.readouterr().err.split("\n")
    assert len(lines) == 1 and end == "", lines
    assert lines[0].startswith("error: ")
    assert not run.exists()
    return lines[0].removeprefix("error: ")


# ---- rows


def messages(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


BAD_ROWS: dict[str, tuple[object, str]] = {
    "broken JSON": (
        b'{"messages": [{"role": "user"',
        "broken JSON (2 of them, first my.jsonl:1, Expecting ',' delimiter at column 30)",
    ),
    "wrong columns": (
        {"prompt": "hello"},
        "wrong columns (2 of them, first my.jsonl:1, has 'prompt'; expected messages)",
    ),
    "an empty turn": (
        messages(("user", "  "), ("assistant", "hello")),
        "empty turn (2 of them, first my.jsonl:1, messages[0] (user) has no content)",
    ),
    "no turns": ({"messages": []}, "no messages (2 of them, first my.jsonl:1, messages is empty)"),
    "two users in a row": (
        messages(("user", "hello"), ("user", "hello?"), ("assistant", "yes")),
        "two user turns in a row (2 of them, first my.jsonl:1, messages[0] and messages[1])",
    ),
    "an unknown role": (
        messages(("user", "hello"), ("asistant", "yes")),
        "unknown role (2 of them, first my.jsonl:1, messages[1] has role 'asistant' (did you mean assistant?))",
    ),
    "nobody answers": (
        messages(("user", "hello")),
        "no assistant message (2 of them, first my.jsonl:1, only user)",
    ),
    "no UTF-8": (b'{"text": "\xff"}', "not UTF-8 text (2 of them, first my.jsonl:1, byte 0xff at column 11)"),
    "a list": ([1, 2], 'not an object (2 of them, first my.jsonl:1, a list; a row looks like {"messages": [...]})'),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_too_many_bad_rows_are_refused_by_reason_and_line(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, message = BAD_ROWS[what]
    file = write_rows(tmp_path / "my.jsonl", [bad, *GOOD, bad])
    assert refusal(capsys, tmp_path / "run", file) == (
        "my.jsonl: 2 of 22 rows unusable, 9% (above data.max_bad=0.05);"
        f" most often: {message}; `cook data check` lists them all"
    )


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_few_bad_rows_are_left_out_and_told(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "my.jsonl", [*GOOD, BAD_ROWS[what][0]])
    assert train(tmp_path / "run", file, steps=1, eval_every=0, save_every=0) == 0
    said = capsys.readouterr()
    assert "21 rows: 20 usable, 1 rejected" in said.out and "my.jsonl:21" in said.out
    assert said.err == ""


def test_no_trained_tokens_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = messages(("user", "hello"), ("assistant", "yes"))
    row["messages"][1]["train"] = False
    file = write_rows(tmp_path / "my.jsonl", [row] * 3)
    assert refusal(capsys, tmp_path / "run", file, data_train_on="flags") == (
        "my.jsonl: 3 of 3 rows unusable, 100%; most often: no trained tokens (3 of them, first my.jsonl:1, no trained"
        " tokens: the conversation has no assistant message that is to be trained); `cook data check` lists them all"
    )


# ---- files


def test_files_that_are_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(bytes(range(256)))
    assert refusal(capsys, run, binary) == f"{binary} is a binary file; expected UTF-8 text (.jsonl)"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert refusal(capsys, run, empty) == f"{empty} is empty (0 bytes); it should hold at least one row"
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    assert refusal(capsys, run, blank) == "blank.jsonl holds no rows"
    missing = tmp_path / "emty.jsonl"
    assert refusal(capsys, run, missing) == f"no such file: {missing} (did you mean empty.jsonl?); check data.path"
    strange = write_rows(tmp_path / "strange.jsonl", [{"a": 1, "b": 2}])
    assert refusal(capsys, run, strange).startswith("strange.jsonl: columns 'a', 'b' fit no known format (messages |")


def test_fewer_rows_than_a_batch(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, tmp_path / "run", rows, batch_size=32) == (
        "rows.jsonl: 16 training rows (4 more are held out) are fewer than batch_size=32;"
        " lower batch_size, or bring more rows"
    )


# ---- lengths


def test_rows_longer_than_max_length(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = messages(("user", "hello"), ("assistant", "a" * 200))
    file = write_rows(tmp_path / "my.jsonl", [long, *GOOD])
    assert refusal(capsys, tmp_path / "run", file, data_overlong="error") == (
        "my.jsonl:1: 226 tokens, max_length=128 and data.overlong=error;"
        " raise max_length, or set data.overlong=drop or truncate"
    )
    assert refusal(capsys, tmp_path / "run", rows, max_length=8) == (
        "rows.jsonl: all 20 rows are longer than max_length; raise max_length or set data.overlong=truncate"
    )


def test_sequences_longer_than_the_models_context(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, tmp_path / "run", rows, max_length=CONTEXT + 1) == (
        f"max_length={CONTEXT + 1}, but the context of {tiny_model_dir()} is {CONTEXT} tokens:"
        f" set max_length={CONTEXT} or less"
    )
    row = messages(("user", "hello"), ("assistant", "a" * 5000))  # cut to just what fits
    file = write_rows(tmp_path / "long.jsonl", [row] * 4)
    assert train(tmp_path / "run", file, steps=1, max_length=CONTEXT, data_overlong="truncate", data_eval_rows=0) == 0
    assert metrics(tmp_path / "run")[-1]["progress/tokens"] == 4 * (CONTEXT - 1)


# ---- models


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=smollm2-135"], "model=smollm2-135: no such model (did you mean smollm2-135m?); there are "),
        (
            ["model.name=smollm2-135m-instruct"],
            "unknown model 'smollm2-135m-instruct': give a hub id (organisation/name), a directory or a .gguf file;",
        ),
        (["model.name=./nowhere"], "no model directory at nowhere"),
        (["model.name=./nowhere.gguf"], "no GGUF file at nowhere.gguf"),
    ],
)
def test_a_model_that_is_not_there(
    tmp_path: Path, rows: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [word for word in command(tmp_path / "run", rows) if not word.startswith("model.name=")]
    assert main([*argv, *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {message}") and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def copy_of_the_model(directory: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir(), directory))


def test_a_directory_without_a_config_or_weights(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert refusal(capsys, tmp_path / "run", rows, model_name=tmp_path / "empty") == (
        f"{tmp_path / 'empty'} holds no config.json: not a model directory"
    )
    model = copy_of_the_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    line = refusal(capsys, tmp_path / "run", rows, model_name=model)
    assert line.startswith(f"model '{model}' at {model} cannot be loaded: ") and "model.safetensors" in line


def test_weights_that_are_cut_short_incomplete_or_of_another_shape(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_of_the_model(tmp_path / "model")
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    line = refusal(capsys, tmp_path / "run", rows, model_name=model)
    assert line.startswith(f"model '{model}' at {model} cannot be loaded: ")
    file.write_bytes(whole)
    tensors = load_file(file)
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != gone}, file, metadata={"format": "pt"})
    assert refusal(capsys, tmp_path / "run", rows, model_name=model) == (
        f"model '{model}' at {model} cannot be loaded: 1 of its weights are missing, first {gone};"
        " fetch or convert it again"
    )
    save_file({**tensors, gone: tensors[gone][:, :16].contiguous()}, file, metadata={"format": "pt"})
    assert refusal(capsys, tmp_path / "run", rows, model_name=model) == (
        f"model '{model}' at {model} cannot be loaded: 1 of its weights are of another shape, first {gone};"
        " fetch or convert it again"
    )


def test_a_model_that_is_no_decoder(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig, BertModel

    model = tmp_path / "bert"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=VOCAB, **sizes)).save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    assert refusal(capsys, tmp_path / "run", rows, model_name=model) == (
        f"model '{model}' at {model} cannot be loaded: config.json says BertModel, which is no decoder with a head for tokens"
        " (it lacks 6 weights of BertLMHeadModel)"
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "cannot mmap an empty file"),
        (b"GGUF" + bytes(500), "{file} is GGUF v0; this reader handles v2 and v3."),
        (b"no such thing", "{file} does not start with the GGUF magic bytes, so it is not a GGUF file."),
    ],
)
def test_a_gguf_file_that_cannot_be_read(
    tmp_path: Path, rows: Path, content: bytes, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    assert train(tmp_path / "run", rows, model_name=file) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("converting broken.gguf")]
    assert said == [f"error: model '{file}' cannot be loaded: {why.format(file=file)}"]
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_of_the_model(tmp_path / "model")
    file, config = model / "model.safetensors", model / "config.json"
    ids = {"vocab_size": 250, "pad_token_id": None, "eos_token_id": None}
    config.write_text(json.dumps({**json.loads(config.read_text()), **ids}))
    cut = {key: t[:250].contiguous() if len(t) == VOCAB else t for key, t in load_file(file).items()}
    save_file(cut, file, metadata={"format": "pt"})
    (model / "generation_config.json").unlink()
    assert refusal(capsys, tmp_path / "run", rows, model_name=model) == (
        f"the tokenizer of {model} has token ids up to {VOCAB - 1}, but its embedding has 250 rows:"
        " they are not of one model, or the embedding was not resized; fetch or convert it again"
    )


def test_a_directory_without_a_tokenizer(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_of_the_model(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    line = refusal(capsys, tmp_path / "run", rows, model_name=model)
    assert line.startswith(f"no tokenizer for model '{model}' (it cannot be loaded): ")


def test_a_hub_model_without_a_network_is_told_at_once(tmp_path: Path, rows: Path) -> None:
    """In a process of its own: the loading thread may be trying still when this line is out."""
    argv = [word for word in command(tmp_path / "run", rows) if not word.startswith("model.name=")]
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "cookbook.cli", *argv, "model=qwen3-0.6b"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: no network, and model 'Qwen/Qwen3-0.6B' is not in the local cache: connect once to fetch it\n"
    )
    assert time.monotonic() - started < 25  # most of it imports
    assert not (tmp_path / "run").exists()


# ---- keys and values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_lenght": 9}, "unknown key max_lenght (did you mean max_length?); all keys: --cfg job"),
        ({"data_eval_row": 9}, "unknown key data.eval_row (did you mean data.eval_rows?); all keys: --cfg job"),
        ({"steps": "ten"}, "steps=ten: expected int or null, got ten"),
        ({"steps": 0}, "steps=0 makes 0 optimizer steps: at least 1 is needed"),
        ({"steps": None, "epochs": -1}, "epochs=-1 makes -4 optimizer steps: at least 1 is needed"),
        ({"keep_last": -1}, "keep_last=-1: expected at least 0"),
        ({"save_every": -3}, "save_every=-3: expected at least 0"),
        ({"eval_every": -2}, "eval_every=-2: expected at least 0"),
        ({"save_minutes": -1}, "save_minutes=-1.0: expected at least 0"),
        ({"log_every": 0}, "log.every=0: expected at least 1"),
        ({"data_max_bad": 7}, "data.max_bad=7: expected a share of the rows, from 0 to 1"),
        ({"name": "foo/../bar"}, "name=foo/../bar: expected a name under runs/; run_dir= takes any directory"),
        ({"steps": None, "data_streaming": True}, "a stream has no known length: give steps="),
        ({"batch_size": 0}, "batch_size=0 must be at least 1, data.eval_rows=6 at least 0"),
        ({"max_length": 1}, "max_length=1: a sequence needs at least 2 tokens"),
        ({"lora_rank": 0}, "rank is 0, expected at least 1"),
        ({"lora_rank": 100_000}, "rank is 100000, expected at most 512: no matrix of this model has more than rank 32"),
        (
            {"lora_train_attn": False, "lora_train_mlp": False, "lora_train_unembed": False},
            "train_attn, train_mlp and train_unembed are all false: nothing to train",
        ),
        ({"learning_rate": -1}, "learning_rate=-1: expected a number from 0 on"),
        ({"learning_rate": "nan"}, "learning_rate=nan: expected a number from 0 on"),
        ({"optim_beta2": 1}, "optim.beta2=1: expected a number from 0 on, below 1"),
        ({"optim_eps": 0}, "optim.eps=0: expected a number above 0"),
        (
            {"optim_schedule": "liner"},
            "optim.schedule=liner is unknown, did you mean linear? (it is one of constant, linear, cosine)",
        ),
        ({"data_train_on": "al"}, "data.train_on=al: expected last, all, everything, flags (did you mean all?)"),
        ({"data_overlong": "cut"}, "data.overlong=cut: expected drop, truncate, error"),
        ({"engine_dtype": "float16"}, "engine.dtype=float16, expected auto, bfloat16 or float32"),
        ({"engine_device": "cuda:99"}, None),
        ({"engine_device": "gpu"}, "engine.device=gpu: expected auto, cpu, cuda or cuda:N"),
        ({"engine_token_budget": 0}, "engine.token_budget=0: expected at least 1, or null (by machine)"),
        ({"service": "http://"}, "service=http://: expected local, tinker, or the URL of a server such as http://box:8000"),
        (
            {"model_chat_template": "chatlm"},
            "model.chat_template is 'chatlm', expected chatml, plain or a .jinja file; did you mean 'chatml'?",
        ),
        (
            {"model_thinking": True},
            "model.thinking=true: chat template of {model} has no such switch, leave it out",
        ),
        ({"log_wandb": "on"}, None),
    ],
)
def test_a_value_that_cannot_be_meant(
    tmp_path: Path, rows: Path, changes: dict[str, object], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, tmp_path / "run", rows, **changes)
    if message is None:  # depends on the machine or on a library
        key, value = next(iter(changes.items()))
        assert key.replace("_", ".", 1) in line and str(value) in line
    else:
        assert line == message.format(model=tiny_model_dir())


# ---- losses that are no numbers


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """The tiny model with an infinite embedding of "~"."""
    model = copy_of_the_model(tmp_path / "poisoned")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][TOKENIZER.encode("~")] = torch.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_loss_that_is_no_number_stops_the_run_at_its_last_good_checkpoint(
    tmp_path: Path, poisoned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 13 makes one, wherever it comes up in the epoch."""
    bad = messages(("user", "hello ~"), ("assistant", "no"))
    clean = write_rows(tmp_path / "clean.jsonl", [chat(i) for i in range(24)])
    file = write_rows(tmp_path / "my.jsonl", [*(chat(i) for i in range(12)), bad, *(chat(i) for i in range(13, 24))])
    run = tmp_path / "run"
    same = {"model_name": poisoned, "data_eval_rows": 0, "steps": 6, "save_every": 1, "keep_last": 9}
    assert train(tmp_path / "clean", clean, **same) == 0
    capsys.readouterr()
    assert train(run, file, **same) == 2
    said = capsys.readouterr()
    done = steps_in(run)[-1]
    assert 0 < done < 6
    assert said.err.startswith(
        f"error: step {done + 1}: loss nan, the gradient of optimizer step {done + 1} is not finite"
    )
    assert "my.jsonl:13" in said.err and said.err.count("my.jsonl:") == 4 and said.err.count("\n") == 1
    sound = run / checkpoint_rows(run)[-2]["path"]  # the loss of the step after the newest one is no number
    way_out = f"cook rerun {run} init_from={sound} learning_rate=..."
    assert said.err.endswith(f" (cook data show). {sound} is good: go on from it with a lower learning_rate ({way_out})\n")
    assert f"next        {way_out}  # with a lower rate" in said.out and "cook resume" not in said.out
    assert result(run)["go_on"] == way_out
    assert (result(run)["status"], result(run)["steps"]) == ("failed", done)
    assert result(run)["checkpoint"] == checkpoint_rows(run)[-1]["uri"] and saved_steps(run)[-1] == done
    good = tmp_path / "clean" / checkpoint_rows(tmp_path / "clean")[done - 1]["path"]
    assert contents(newest(run)) == contents(good)
    assert main(["resume", str(run)]) == 2  # the same row again, and again nothing lost
    assert saved_steps(run)[-1] == steps_in(run)[-1] == done


def test_a_rate_that_blows_the_weights_up_is_told_with_the_step(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", rows, learning_rate=1e30, save_every=0, eval_every=0) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: step 2: loss ") and "is not finite" in line and line.count("\n") == 1
    assert (result(tmp_path / "run")["status"], result(tmp_path / "run")["checkpoint"]) == ("failed", None)
    assert steps_in(tmp_path / "run") == [0, 1]


def test_an_evaluation_that_is_no_number_stops_the_run_before_it_saves(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of the only step is that of the untouched model; what the step made of it shows in the evaluation."""
    run = tmp_path / "run"
    assert train(run, rows, learning_rate=1e30, steps=1, save_every=1) == 2
    said = capsys.readouterr()
    way_out = f"cook rerun {run} learning_rate=..."
    advice = f"No checkpoint is known to be good: start again with a lower learning_rate ({way_out})"
    assert said.err == f"error: step 1: held_out/nll is nan. {advice}\n"
    assert f"next        {way_out}" in said.out and "nan%" not in said.out
    assert result(run)["status"] == "failed" and result(run)["checkpoint"] is None
    assert not (run / "checkpoints.jsonl").exists() and metrics(run)[-1]["eval/held_out/nll"] == "NaN"


def test_a_broken_start_is_told_before_the_first_step(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "broken", rows, learning_rate=1e30, steps=1, data_eval_rows=0) == 0  # nothing evaluates it
    assert refusal(capsys, tmp_path / "run", rows, init_from=tmp_path / "broken") == (
        "step 0: held_out/nll is nan. No weight has moved yet: the model, the adapter of init_from or the rows are at fault"
    )


def test_an_adapter_to_start_from_keeps_its_rank_and_targets(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    assert train(start, rows, steps=1, lora_train_mlp=False) == 0
    assert refusal(capsys, run, rows, init_from=start, lora_rank=8) == (
        f"lora.rank=8, but init_from={start} has 4, which it keeps: leave lora.rank out"
    )
    words = [word for word in command(run, rows, init_from=start, steps=1) if not word.startswith("lora.rank=")]
    assert main(words) == 0
    lora = yaml.safe_load((run / "config.yaml").read_text())["lora"]
    assert lora == {"rank": 4, "train_attn": True, "train_mlp": False, "train_unembed": True}


# ---- a full disk


@pytest.mark.parametrize("pages", [0, 2, 4, 6, 12, 20])
def test_a_disk_that_is_full_at_the_start_or_at_a_save_loses_nothing(
    rows: Path, small_disk: Path, pages: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    assert train(run, rows, steps=4, keep_last=9, lora_rank=8) == 0
    before = contents(newest(run))
    ballast.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 4096 * pages))
    capsys.readouterr()
    assert main(["resume", str(run), "steps=6"]) == 2
    out, line = capsys.readouterr()
    assert out.rstrip().rpartition("\n")[2][:11] != "report.html"
    assert line in (
        f"error: cannot write {run}: No space left on device; put it right, or choose another run_dir=\n",
        f"error: the disk of {run} is full (0 MiB free): make room, then `cook resume {run}`\n",
    )
    assert saved_steps(run)[-1] == 4 and contents(newest(run)) == before
    ballast.unlink()
    assert main(["resume", str(run), "steps=6"]) == 0
    assert steps_in(run) == list(range(7))


def test_a_run_directory_that_cannot_be_written(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "run"
    assert refusal(capsys, inside, rows) == (
        f"cannot write {inside}: Not a directory; put it right, or choose another run_dir="
    )
