"""Preference rows: every shape that people have becomes the same pair, what is no pair says why, and generated ones hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cookbook.config import DataConfig
from cookbook.generated_pairs import KINDS, gsm_symbolic_pairs
from cookbook.pair_formats import read_pair, read_rated
from cookbook.preferences import load_pairs, load_rated
from cookbook.row_formats import Chat, Completion
from cookbook.rows import RowProblem
from tests.scripted_sampler import tiny_renderer
from tests.small_runs import write_rows

ASKED = {"role": "user", "content": "hi"}
GOOD, BAD = {"role": "assistant", "content": "hello you"}, {"role": "assistant", "content": "go away"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello you", "rejected": "\n\nHuman: hi\n\nAssistant: go away"},
        {"context": [ASKED], "response1": "go away", "response2": "hello you", "overall_preference": 2},
        {"context": [ASKED], "response1": "hello you", "response2": "go away", "overall_preference": -1},
        {"input": {"messages": [ASKED]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    ],
    ids=["explicit", "implicit", "ultrafeedback", "text prompt", "hh", "helpsteer", "helpsteer first", "openai"],
)
def test_every_shape_is_the_same_pair(row: dict) -> None:
    pair = read_pair(row)
    assert pair.chosen == Chat([ASKED, GOOD], None, 1) and pair.rejected == Chat([ASKED, BAD], None, 1)


def test_text_is_raw_as_in_trl() -> None:
    assert read_pair({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}).chosen == Completion("1 + 1 =", " 2")
    implicit = read_pair({"chosen": "The sky is blue.", "rejected": "The sky is blond."})
    assert implicit.chosen == Completion("The sky is ", "blue.") and implicit.rejected == Completion("The sky is ", "blond.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "sides are equal"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, "sides are equal"),
        ({"chosen": [ASKED, GOOD], "rejected": [{"role": "user", "content": "yo"}, BAD]}, "sides share no prompt"),
        ({"chosen": "yes", "rejected": "no"}, "sides share no prompt"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [ASKED]}, "no assistant turn"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED]}, "no assistant turn"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty turn"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": "b"}, "wrong columns"),
        ({"prompt": "a", "chosen": "b"}, "wrong columns"),
        ({"context": [ASKED], "response1": "a", "response2": "b", "overall_preference": 0}, "no preference"),
    ],
)
def test_what_is_no_pair_says_why(row: dict, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_pair(row)
    assert caught.value.reason == reason


def test_a_verdict_is_a_boolean_in_any_spelling() -> None:
    row = {"prompt": [ASKED], "completion": [GOOD]}
    assert [read_rated({**row, "label": label})[0].desirable for label in (True, "false", 1, "0")] == [True, False, True, False]
    with pytest.raises(RowProblem, match="no verdict"):
        read_rated({**row, "label": "maybe"})
    both = read_rated({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]})
    assert [one.desirable for one in both] == [True, False]


def pairs_file(path: Path, count: int = 30) -> Path:
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "chosen": [GOOD], "rejected": [BAD]} for i in range(count)]
    return write_rows(path / "pairs.jsonl", rows)


def test_only_replies_have_weights_and_both_have_one_prompt(tmp_path: Path) -> None:
    renderer = tiny_renderer()
    config = DataConfig(name="file", path=str(pairs_file(tmp_path)), eval_rows=4)
    data = load_pairs(config, renderer, seed=0, batch_size=4, max_length=100)
    for pair in data.batch(3):
        for side, reply in ((pair.chosen, GOOD), (pair.rejected, BAD)):
            trained = [token for token, weight in zip(side.tokens, side.weights, strict=True) if weight]
            assert renderer.decode(trained) == reply["content"] + "<|im_end|>"
    held = {pair.label for pair in data.held_out}
    assert len(held) == 4 and data.epoch_steps == 6
    assert not held & {pair.label for step in range(6) for pair in data.batch(step)}


def test_both_replies_of_a_row_are_held_out_or_trained(tmp_path: Path) -> None:
    config = DataConfig(name="file", path=str(pairs_file(tmp_path)), eval_rows=4)
    data = load_rated(config, tiny_renderer(), seed=0, batch_size=4, max_length=100)
    assert len(data.held_out) == 8 and len({unit.label for unit in data.held_out}) == 4


def test_generated_pairs_have_one_thing_wrong() -> None:
    pytest.importorskip("reasoning_gym")
    rows = gsm_symbolic_pairs(60)
    assert rows == gsm_symbolic_pairs(60) and {row["kind"] for row in rows} == set(KINDS)
    for row in rows:
        right, wrong = (row[side][0]["content"] for side in ("chosen", "rejected"))  # type: ignore[index]
        numbers = [re.findall(r"\d+(?:\.\d+)?", text) for text in (right, wrong)]
        if row["kind"] == "final":
            assert right.rpartition("\n")[0] == wrong.rpartition("\n")[0] and numbers[0][-1] != numbers[1][-1]
        elif row["kind"] == "step":
            assert len(right.splitlines()) == len(wrong.splitlines()) + 1
            assert right.splitlines()[-2:] == wrong.splitlines()[-2:]
        else:
            assert sum(a != b for a, b in zip(*numbers, strict=True)) == 1 and numbers[0][-1] == numbers[1][-1]
