"""`cook dpo` end to end: it learns, its reference stays where it was, and a resumed run ends where it would have ended."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from cookbook.cli import main
from tests.small_runs import (
    chat,
    checkpoint_rows,
    contents,
    metrics,
    newest,
    read_lines,
    repeatable,
    result,
    saved_steps,
    train,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(number: int) -> dict[str, object]:
    """Answering in a's is wanted, in b's it is not."""
    letters = "ab"[number // 20]
    reply = {letter: [{"role": "assistant", "content": letter * (4 + number % 5)}] for letter in "ab"}
    asked = [{"role": "user", "content": f"say something, {number}"}]
    return {"prompt": asked, "chosen": reply["a"], "rejected": reply["b"], "kind": f"kind-{letters}"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", map(pair, range(40)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert train(directory, rows, "dpo") == 0
    return directory


def test_it_learns_which_reply_is_wanted(run: Path) -> None:
    before, after = (result(run)["eval"][phase] for phase in ("before", "after"))
    assert before["held_out/accuracy"] == 0.5 and before["held_out/margin"] == 0.0
    assert after["held_out/accuracy"] == 1.0 and after["held_out/margin"] > 0.5
    assert after["held_out/accuracy/kind-a"] == after["held_out/accuracy/kind-b"] == 1.0
    assert after["held_out/chosen_reward"] > 0 > after["held_out/rejected_reward"]


def test_the_first_loss_is_ln_2(run: Path) -> None:
    first = metrics(run)[1]
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["dpo/accuracy"] == 0.5
    assert metrics(run)[0]["eval/held_out/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_small_micro_batches_give_the_same_run(run: Path, rows: Path, tmp_path: Path) -> None:
    """Each pair in a pass of its own instead of all in one."""
    assert train(tmp_path / "run", rows, "dpo", engine_token_budget=16) == 0
    mine, theirs = (metrics(directory)[-1] for directory in (run, tmp_path / "run"))
    for name in ("dpo/loss", "dpo/margin", "optim/grad_norm", "eval/held_out/loss"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3)


@pytest.mark.parametrize("recipe", ["ipo", "simpo", "kto"])
def test_the_other_recipes_learn_it_too(recipe: str, rows: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", rows, "dpo", recipe=recipe, steps=16) == 0
    after = result(tmp_path / "run")["eval"]["after"]
    assert after["held_out/accuracy"] > 0.9 and after["held_out/margin"] > 0
    assert ("held_out/chosen_shift" in after) == (recipe != "simpo")  # it has no reference to compare with


def test_kto_learns_from_rated_replies(tmp_path: Path) -> None:
    rows = []
    for i in range(40):
        letter = "ab"[i // 20]
        asked, reply = {"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": letter * 5}
        rows.append({"prompt": [asked], "completion": [reply], "label": letter == "a"})
    data = write_rows(tmp_path / "rated.jsonl", rows)
    assert train(tmp_path / "run", data, "dpo", recipe="kto", steps=16) == 0
    assert result(tmp_path / "run")["eval"]["after"]["held_out/accuracy"] == 1.0
    assert max(row["dpo/z"] for row in metrics(tmp_path / "run")[1:]) >= 0.0


def test_mistakes_of_a_kind_are_compared_with_all_wanted_replies_where_these_have_none(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"say {i}", "completion": "aab"[i % 3] * 4, "label": i % 3 < 2, **({"kind": "b's"} if i % 3 == 2 else {})}
        for i in range(60)
    ]
    data = write_rows(tmp_path / "rated.jsonl", rows)
    assert train(tmp_path / "run", data, "dpo", recipe="kto", steps=2, data_eval_rows=12, eval_prompts=2) == 0
    after = result(tmp_path / "run")["eval"]["after"]
    assert after["held_out/accuracy/b's"] == pytest.approx(after["held_out/accuracy"])
    asked = read_lines(tmp_path / "run" / "rollouts" / "samples-000000.jsonl")
    assert {row["expected"] for row in asked} == {"aaaa"}


def test_kto_needs_another_reply_in_the_batch(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", rows, "dpo", recipe="kto", batch_size=1) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: batch_size=1: ") and "at least 2" in said and said.count("\n") == 1
    row = {"prompt": "say a", "completion": "a", "label": True}
    same = [{**row, "completion": "ab"[i % 2] * (1 + i), "label": i % 2 == 0} for i in range(12)]
    same = write_rows(tmp_path / "same.jsonl", same)  # one prompt: nothing is mismatched
    assert train(tmp_path / "run", same, "dpo", recipe="kto", batch_size=2, data_eval_rows=2, steps=3) == 0
    assert [step["dpo/z"] for step in metrics(tmp_path / "run")[1:]] == [0.0] * 3


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(run: Path, rows: Path, tmp_path: Path) -> None:
    """The reference among it: with the policy of step 6 in its place the losses would start over at ln 2."""
    part = tmp_path / "part"
    assert train(part, rows, "dpo", steps=12, save_every=3) == 0
    row = next(row for row in checkpoint_rows(part) if row["step"] == 9)
    lines = [line for line in (part / "checkpoints.jsonl").read_text().splitlines(keepends=True) if '"step": 12' not in line]
    (part / "checkpoints.jsonl").write_text("".join(lines))
    (part / "result.json").unlink()
    assert row["step"] == 9 and saved_steps(part)[-1] == 9
    assert main(["resume", str(part)]) == 0
    assert repeatable(part) == repeatable(run)
    assert contents(newest(part)) == contents(newest(run))


def test_the_reference_after_init_from_is_the_run_that_it_starts_from(rows: Path, tmp_path: Path) -> None:
    sft = tmp_path / "sft"
    assert train(sft, write_rows(tmp_path / "rows.jsonl", map(chat, range(40)))) == 0
    run = tmp_path / "run"
    assert train(run, rows, "dpo", init_from=sft, steps=4, save_every=2, learning_rate=0.003) == 0
    first, last = metrics(run)[1], metrics(run)[-1]
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6) and last["dpo/loss"] < 0.69
    assert json.loads((run / "run.json").read_text())["origin"] == str(newest(sft))


def test_a_run_keeps_the_adapter_that_it_starts_from(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its source trains on, prunes that checkpoint and goes: reference, evaluation and rerun stay the same."""
    sft, run, again, anew = (tmp_path / name for name in ("sft", "run", "again", "anew"))
    assert train(sft, write_rows(tmp_path / "rows.jsonl", map(chat, range(40))), steps=4, keep_last=1) == 0
    assert train(run, rows, "dpo", init_from=sft, steps=8, learning_rate=0.003) == 0
    evaluated = evaluation(run, capsys)
    assert main(["resume", str(sft), "steps=12"]) == 0
    for gone in (False, True):
        if gone:
            shutil.rmtree(sft)
        shutil.copytree(run, again)
        (again / "checkpoints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checkpoint_rows(run)[:1]))
        assert saved_steps(again) == [4] and main(["resume", str(again)]) == 0
        assert repeatable(again) == repeatable(run) and contents(newest(again)) == contents(newest(run))
        assert evaluation(run, capsys) == evaluated
        shutil.rmtree(again)
    assert main(["rerun", str(run), f"run_dir={anew}"]) == 0
    assert repeatable(anew) == repeatable(run)


def test_a_run_that_kept_no_adapter_looks_at_its_source_again(rows: Path, tmp_path: Path) -> None:
    sft, run = tmp_path / "sft", tmp_path / "run"
    assert train(sft, write_rows(tmp_path / "rows.jsonl", map(chat, range(40))), steps=4) == 0
    assert train(run, rows, "dpo", init_from=sft, steps=4, learning_rate=0.003) == 0
    shutil.rmtree(run / "origin")
    record = json.loads((run / "run.json").read_text())
    del record["origin"]
    (run / "run.json").write_text(json.dumps(record))
    assert main(["resume", str(run), "steps=6"]) == 0
    assert metrics(run)[5]["dpo/loss"] < metrics(run)[4]["dpo/loss"] + 0.05 and not (run / "origin").exists()


def evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The figures of `cook eval`."""
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["figures"]


def test_replies_are_answered_and_the_dry_run_counts(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.small_runs import command

    assert main([*command(tmp_path / "run", rows, "dpo"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "34 pairs to train on, 6 held out" in shown and "12 of 4 sequences" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": 0}, "beta=0: expected more than 0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5: expected at least 0 and less than 0.5"),
        ({"data_streaming": True}, "data.streaming=true: preference data is read whole"),
        ({"batch_size": 64}, "34 training rows (6 more are held out) are fewer than batch_size=64"),
    ],
)
def test_a_mistake_is_one_line(
    changes: dict, said: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", rows, "dpo", **changes) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "run").exists()


def test_an_adapter_that_has_diverged_is_not_saved(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", rows, "dpo", learning_rate=1e30, steps=1) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: step 1: ") and "No checkpoint is known to be good: start again with a lower" in line
    assert not (tmp_path / "run" / "checkpoints.jsonl").exists()


def test_sft_tells_where_pairs_belong(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", rows) == 2
    assert "rows with chosen and rejected are for `cook dpo`" in capsys.readouterr().err


@pytest.mark.slow
def test_the_embedded_model_learns_what_a_mistake_is_within_eight_steps(tmp_path: Path) -> None:
    """The defaults but for the size: 26 held-out pairs, ties before the first step in whatever dtype the machine has."""
    words = ["steps=8", "batch_size=8", "max_length=170", "data.size=400", "data.eval_rows=32", "learning_rate=2e-4"]
    words += ["eval.prompts=0", "eval_every=0", "save_every=0", f"run_dir={tmp_path / 'run'}"]
    assert main(["dpo", *words]) == 0
    before, after = (result(tmp_path / "run")["eval"][phase] for phase in ("before", "after"))
    assert before["held_out/accuracy"] == 0.5 and before["held_out/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert after["held_out/accuracy"] > 0.8 and after["held_out/margin"] > 0.2
    assert after["held_out/chosen_shift"] > -0.1  # nats per token
