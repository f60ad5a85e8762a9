"""Texts of single tokens join to the text of them all; data files mark what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from cookbook.data_log import write_data
from cookbook.token_texts import TokenTexts
from core import Datum, ForwardBackwardOutput, ModelInput
from tests.tiny import tiny_tokenizer


def texts_of() -> TokenTexts:
    tokenizer = tiny_tokenizer()
    return TokenTexts(lambda tokens: str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)))


def test_texts_join_to_the_text_and_a_character_of_many_bytes_is_whole() -> None:
    said = "Zürich 🙂 日本<|im_end|>"
    tokens = tiny_tokenizer().encode(said)
    texts = texts_of()(tokens)
    assert "".join(texts) == said and len(texts) == len(tokens)
    assert "🙂" in texts and texts[-1] == "<|im_end|>"


def test_bytes_that_are_no_character_stay_visible_and_end_nothing() -> None:
    tokens = tiny_tokenizer().encode("é")[:1] + tiny_tokenizer().encode("ab") + tiny_tokenizer().encode("🙂")[:2]
    texts = texts_of()(tokens)
    assert "".join(texts).startswith("\ufffdab") and texts[-1].endswith("\ufffd") and len(texts) == len(tokens)


def test_a_data_file_has_whole_sequences_with_logprobs_of_trained_tokens(tmp_path: Path) -> None:
    tokens = tiny_tokenizer().encode("abcd")
    weights = torch.tensor([0.0, 0.5, 0.5])
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": torch.tensor(tokens[1:]), "weights": weights})
    output = ForwardBackwardOutput([{"logprobs": torch.tensor([0.0, -1.25, -0.5])}])
    file = write_data(tmp_path, 20, "held_out", [datum] * 3, output=None, texts_of=texts_of())
    assert file.name == "held_out-000020.jsonl" and len(file.read_text().splitlines()) == 3
    write_data(tmp_path, 20, "held_out", [datum], output, texts_of(), [{"pair": 0, "side": "chosen"}])
    assert json.loads(file.read_text()) == {
        "pair": 0, "side": "chosen", "length": 4, "tokens": tokens, "texts": ["a", "b", "c", "d"],
        "trained": [0, 0, 1, 1], "logprobs": [None, None, -1.25, -0.5],
    }  # fmt: skip


def test_long_rows_are_cut_and_many_left_out(tmp_path: Path) -> None:
    tokens = tiny_tokenizer().encode("a" * 3000)
    inputs = {"target_tokens": torch.tensor(tokens[1:]), "weights": torch.ones(2999)}
    file = write_data(tmp_path, 1, "trained", [Datum(ModelInput.from_ints(tokens[:-1]), inputs)] * 50, None, texts_of())
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["length"], len(row["tokens"])) for row in rows] == [(3000, 3000), (3000, 1096)]
