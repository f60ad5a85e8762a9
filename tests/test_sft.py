"""`cook sft` end to end: it learns, records what it did, and reads every key as it says."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cookbook.cli import main
from tests.small_runs import (
    chat,
    checkpoint_rows,
    command,
    contents,
    losses,
    metrics,
    newest,
    result,
    saved_steps,
    steps_in,
    train,
    weights,
    write_rows,
)
from tests.tiny import tiny_model_dir, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
NLL = "eval/held_out/nll"
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A run of 24 steps."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert train(directory, rows, steps=24) == 0
    return directory


# ---- what a run is


def test_it_learns(run: Path) -> None:
    before, after = (result(run)["eval"][phase]["held_out/nll"] for phase in ("before", "after"))
    assert after < 0.2 * before
    assert sum(losses(run)[-4:]) < 0.2 * sum(losses(run)[:4])


def test_the_record_is_whole(run: Path) -> None:
    assert steps_in(run) == list(range(25))
    assert [row["progress/step"] for row in metrics(run) if NLL in row] == [0, 4, 8, 12, 16, 20, 24]
    assert saved_steps(run)[-1] == 24
    first, last = metrics(run)[1], metrics(run)[-1]
    assert first["progress/done_frac"] == pytest.approx(1 / 24) and last["progress/done_frac"] == 1.0
    assert last["progress/epoch"] == 3.0  # 34 rows, 8 full batches
    assert first["optim/lr"] == pytest.approx(0.002)  # the first of five warm-up steps
    outcome = result(run)
    assert (outcome["status"], outcome["steps"]) == ("completed", 24)
    assert outcome["eval"] == {
        "before": {"held_out/nll": metrics(run)[0][NLL]},
        "after": {"held_out/nll": metrics(run)[-1][NLL]},
    }
    assert outcome["checkpoint"] == checkpoint_rows(run)[-1]["uri"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["engine"]["token_budget"] > 0 and config["steps"] == 24  # the machine's choice is written down


def test_the_tokens_counted_are_those_of_the_batches(run: Path, rows: Path) -> None:
    """Each row but those of the incomplete batch once an epoch; the last token of a row is a target only."""
    texts = [TOKENIZER.apply_chat_template(chat(i)["messages"], tokenize=False) for i in range(40)]
    lengths = [len(TOKENIZER.encode(text)) - 1 for text in texts]
    counts = [0, *(row["progress/tokens"] for row in metrics(run)[1:])]
    per_step = [after - before for before, after in itertools.pairwise(counts)]
    assert min(per_step) >= sum(sorted(lengths)[:4]) and max(per_step) <= sum(sorted(lengths)[-4:])
    assert sum(per_step[:8]) == pytest.approx(32 * sum(lengths) / 40, rel=0.03)


@functools.cache
def tiny_causal_lm() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32)


def nll_by_hand(conversations: list[dict], trained: Callable[[int, dict], bool], max_length: int = 1024) -> float:
    """Mean NLL of the trained messages' tokens, ends included, from transformers' own forward; ChatML spelt out."""
    total, count = 0.0, 0
    for row in conversations:
        tokens, targets = [], []
        for i, message in enumerate(row["messages"]):
            head = TOKENIZER.encode(f"<|im_start|>{message['role']}\n")
            body = TOKENIZER.encode(message["content"] + "<|im_end|>")
            is_trained = trained(i, message)
            tokens += head + body + TOKENIZER.encode("\n")
            targets += [False] * len(head) + [is_trained] * len(body) + [False]
        nll = -log_softmax_at(tokens[:max_length])
        mask = torch.tensor(targets[1:max_length])
        total, count = total + float(nll[mask].sum()), count + int(mask.sum())
    return total / count


def log_softmax_at(tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor(tokens)
    with torch.no_grad():
        logits = tiny_causal_lm()(ids.unsqueeze(0)).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


def is_reply(_: int, message: dict) -> bool:
    return message["role"] == "assistant"


def test_the_losses_are_those_of_the_model_itself(tmp_path: Path) -> None:
    """Ten rows, two held out, the other eight in one batch: step 0 and step 1 speak of the untouched model."""
    rows = [chat(i) for i in range(10)]
    assert train(tmp_path / "run", write_rows(tmp_path / "r.jsonl", rows), steps=1, batch_size=8, data_eval_rows=2) == 0
    order = list(range(10))
    random.Random("held out 0").shuffle(order)  # the split of a seed never changes: earlier figures stay comparable
    before, step = metrics(tmp_path / "run")
    assert before[NLL] == pytest.approx(nll_by_hand([rows[i] for i in order[8:]], is_reply), rel=1e-5)
    assert step["train/nll"] == pytest.approx(nll_by_hand([rows[i] for i in order[:8]], is_reply), rel=1e-5)


# ---- which tokens are trained


def two_turns(number: int) -> dict:
    """Two questions, two replies; one of the replies is flagged not to be trained."""
    (first, answer), (second, more) = chat(number)["messages"], chat(number + 1)["messages"]
    return {"messages": [first, answer | {"train": number % 2 == 0}, second, more | {"weight": number % 2}]}


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("all", is_reply),
        ("last", lambda i, message: i == 3),
        ("flags", lambda i, message: bool(message.get("train") or message.get("weight"))),
    ],
)
def test_train_on_chooses_the_replies_in_the_loss(
    tmp_path: Path, train_on: str, trained: Callable[[int, dict], bool]
) -> None:
    rows = [two_turns(i) for i in range(6)]
    file = write_rows(tmp_path / "r.jsonl", rows)
    assert train(tmp_path / "run", file, steps=1, batch_size=6, data_eval_rows=0, data_train_on=train_on) == 0
    assert losses(tmp_path / "run") == [pytest.approx(nll_by_hand(rows, trained), rel=1e-5)]


def test_train_on_everything_trains_every_token_but_the_first(tmp_path: Path) -> None:
    rows = [two_turns(i) for i in range(6)]
    file = write_rows(tmp_path / "r.jsonl", rows)
    assert train(tmp_path / "run", file, steps=1, batch_size=6, data_eval_rows=0, data_train_on="everything") == 0
    texts = [TOKENIZER.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    nll = torch.cat([-log_softmax_at(TOKENIZER.encode(text)) for text in texts])
    assert losses(tmp_path / "run") == [pytest.approx(float(nll.mean()), rel=1e-5)]


def test_rows_over_max_length_are_dropped_or_cut(tmp_path: Path) -> None:
    """Rows of 64 to 70 tokens; 66 leaves three of six, or cuts the others in their last reply."""
    rows = [two_turns(i) for i in range(6)]
    lengths = [len(TOKENIZER.encode(TOKENIZER.apply_chat_template(row["messages"], tokenize=False))) for row in rows]
    limit = sorted(lengths)[2]
    short = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    file = write_rows(tmp_path / "r.jsonl", rows)
    same = {"steps": 1, "data_eval_rows": 0, "max_length": limit, "data_train_on": "all"}
    assert train(tmp_path / "drop", file, **same, batch_size=len(short)) == 0
    assert train(tmp_path / "cut", file, **same, batch_size=6, data_overlong="truncate") == 0
    assert metrics(tmp_path / "drop")[-1]["progress/tokens"] == sum(n - 1 for n in lengths if n <= limit)
    assert metrics(tmp_path / "cut")[-1]["progress/tokens"] == sum(min(n, limit) - 1 for n in lengths)
    assert losses(tmp_path / "drop") == [pytest.approx(nll_by_hand(short, is_reply), rel=1e-5)]
    assert losses(tmp_path / "cut") == [pytest.approx(nll_by_hand(rows, is_reply, limit), rel=1e-5)]


# ---- keys


def test_epochs_are_passes_over_the_training_rows(tmp_path: Path, rows: Path) -> None:
    assert train(tmp_path / "run", rows, steps=None, epochs=1.5, batch_size=8) == 0
    assert steps_in(tmp_path / "run") == list(range(7))  # 34 rows, 4 full batches an epoch


def test_a_run_repeats_to_the_bit_and_another_seed_is_another_run(tmp_path: Path, rows: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train(tmp_path / name, rows, steps=3, seed=seed) == 0
    a, b, c = (contents(newest(tmp_path / name)) for name in "abc")
    assert a == b and a != c
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path, rows: Path) -> None:
    """The rate is so high that the loss climbs again: the best weights are not among the newest."""
    assert train(tmp_path / "run", rows, keep_last=1, learning_rate=0.15, optim_schedule="constant", eval_every=1) == 0
    rated = {row["progress/step"]: row[NLL] for row in metrics(tmp_path / "run")[1:]}
    best = min(rated, key=rated.__getitem__)
    assert best < 12
    assert saved_steps(tmp_path / "run") == [best, 12]
    on_disk = (tmp_path / "run" / "checkpoints").glob("*/weights/*")
    assert sorted(path.name for path in on_disk) == [f"{best:06d}", "000012"]
    named = result(tmp_path / "run")["best"]
    assert (named["step"], named["held_out/nll"]) == (best, rated[best])


def test_evaluations_and_saves_can_be_left_to_the_end(tmp_path: Path, rows: Path) -> None:
    assert train(tmp_path / "run", rows, steps=5, eval_every=0, save_every=0) == 0
    assert [row["progress/step"] for row in metrics(tmp_path / "run") if NLL in row] == [0, 5]
    assert saved_steps(tmp_path / "run") == [5]


def test_a_checkpoint_may_be_due_by_the_clock(tmp_path: Path, rows: Path) -> None:
    assert train(tmp_path / "run", rows, steps=4, eval_every=0, save_every=0, save_minutes=1e-9, keep_last=9) == 0
    assert saved_steps(tmp_path / "run") == [1, 2, 3, 4]


def test_a_rate_of_zero_moves_nothing(tmp_path: Path, rows: Path) -> None:
    assert train(tmp_path / "run", rows, steps=2, learning_rate=0) == 0
    assert all(bool((value == 0).all()) for key, value in weights(newest(tmp_path / "run")).items() if "lora_B" in key)


def test_without_a_rate_the_models_default_is_taken_and_told(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", rows, steps=6, learning_rate=None) == 0
    peak = 5e-5 * 10 * (2000 / 32) ** 0.781
    assert metrics(tmp_path / "run")[5]["optim/lr"] == pytest.approx(peak)
    assert f"6 steps of 4 sequences, learning rate {peak:.3g}, float32 on cpu" in capsys.readouterr().out


def test_the_lora_keys_choose_rank_and_matrices(tmp_path: Path, rows: Path) -> None:
    assert train(tmp_path / "run", rows, steps=1, lora_rank=2, lora_train_mlp=False, lora_train_unembed=False) == 0
    adapter = weights(newest(tmp_path / "run"))
    assert {key.split(".")[-3] for key in adapter} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {value.shape[0] for key, value in adapter.items() if "lora_A" in key} == {2}


def test_clipping_bounds_the_step_and_reports_the_norm_before(tmp_path: Path, rows: Path) -> None:
    """Adam forgets the gradient's size unless eps is large."""
    same = {"steps": 1, "optim_eps": 1e3, "learning_rate": 1}
    assert train(tmp_path / "free", rows, **same) == 0
    assert train(tmp_path / "clipped", rows, **same, optim_grad_clip_norm=1e-3) == 0
    free, clipped = (metrics(tmp_path / name)[1]["optim/grad_norm"] for name in ("free", "clipped"))
    assert free == clipped > 1
    moved = [
        max(float(v.abs().max()) for k, v in weights(newest(tmp_path / name)).items() if "lora_B" in k)
        for name in ("free", "clipped")
    ]
    assert moved[1] == pytest.approx(moved[0] * 1e-3 / free, rel=1e-2)


def test_a_stream_trains_too(tmp_path: Path, rows: Path) -> None:
    assert train(tmp_path / "run", rows, data_streaming=True, steps=12) == 0
    assert steps_in(tmp_path / "run") == list(range(13))
    assert losses(tmp_path / "run")[-1] < 0.5 * losses(tmp_path / "run")[0]
    assert "progress/epoch" in metrics(tmp_path / "run")[1]


def test_a_mixture_trains_on_all_its_files(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_rows(tmp_path / "other.jsonl", map(chat, range(100, 140)))
    words = [word for word in command(tmp_path / "run", rows, steps=2) if not word.startswith(("data=", "data.path="))]
    assert main([*words, "data=mixture", f"data.sources={{{rows}: 0.75, {other}: 0.25}}"]) == 0
    assert "mixed: rows.jsonl 40, other.jsonl 13" in capsys.readouterr().out


# ---- from another run


@pytest.fixture
def here(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose runs/first is the run of 24 steps."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", ["name", "directory", "checkpoint", "uri"])
def test_a_run_starts_from_anothers_weights(here: Path, rows: Path, run: Path, what: str) -> None:
    origins = {
        "name": "first", "directory": run, "checkpoint": newest(run), "uri": checkpoint_rows(run)[-1]["uri"],
    }  # fmt: skip
    assert train(here / "second", rows, steps=1, learning_rate=0, init_from=origins[what]) == 0
    assert metrics(here / "second")[0][NLL] == pytest.approx(result(run)["eval"]["after"]["held_out/nll"], rel=1e-6)
    theirs, ours = weights(newest(run)), weights(newest(here / "second"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert main(["resume", str(here / "second"), "steps=2"]) == 0  # from its own checkpoint, not from the origin


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("no-such-run", "init_from=no-such-run: no such directory, and no such run under ./runs"),
        (
            "tinker://0:train:0/weights/000001",
            "init_from={origin}: no run under ./runs holds this checkpoint; give its directory",
        ),
        ("empty", "init_from={here}/empty: neither a run with a checkpoint nor an adapter directory"),
    ],
)
def test_an_origin_that_is_none_is_one_line(
    here: Path, rows: Path, origin: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "empty").mkdir()
    assert train(here / "second", rows, init_from=origin) == 2
    assert capsys.readouterr().err == f"error: {message.format(here=here, origin=origin)}\n"
    assert not (here / "second").exists()


def test_an_origin_of_another_base_is_one_line(here: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_model_dir("qwen3")
    capsys.readouterr()  # of building it
    assert train(here / "second", rows, init_from="first", model_name=other) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: checkpoint ") and line.count("\n") == 1
    assert f"was trained on {tiny_model_dir()}" in line and f"this engine holds {other}" in line


# ---- the embedded model


@pytest.mark.slow
def test_the_embedded_model_learns_within_four_steps(tmp_path: Path) -> None:
    words = ["steps=4", "batch_size=4", "max_length=256", "data.size=64", "data.eval_rows=8"]
    assert main(["sft", *words, f"run_dir={tmp_path / 'run'}"]) == 0
    evals = result(tmp_path / "run")["eval"]
    assert evals["after"]["held_out/nll"] < 0.9 * evals["before"]["held_out/nll"]
