"""tokenizer.ggml.* of a GGUF file: copied from the GGUF that the base came from, else written from tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.errors import UsageError
from cookbook.exporting.subject import tokenizer_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from cookbook.renderers import Renderer

OURS = ("eos_token_id", "padding_token_id", "eot_token_id")  # written anew: sources have them wrong, or of another template
# How llama.cpp calls a way of cutting text before its merges, by what only that one has in tokenizer.json.
PRE_TOKENIZERS = (
    ("llama-bpe", r"\p{N}{1,3}"),
    ("qwen2", r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"),
)
UNICODE_DIGITS_THEN_BYTES = ["Digits", "ByteLevel"]


def write_tokenizer(writer: GGUFWriter, renderer: Renderer, num_rows: int, source: Path | None) -> None:
    """Tokens, merges, how text is cut, the ids that end and pad, and the chat template. Raises UsageError by name."""
    from gguf import GGUFReader

    tokenizer = tokenizer_of(renderer)
    if source is not None:
        _copy(writer, GGUFReader(source))
    else:
        _from_json(writer, json.loads(tokenizer.backend_tokenizer.to_str()), num_rows)
        writer.add_add_bos_token(tokenizer.encode("a")[:1] == [tokenizer.bos_token_id])
        if tokenizer.bos_token_id is not None:
            writer.add_bos_token_id(_id(tokenizer.bos_token_id))
    writer.add_eos_token_id(renderer.stop[0])
    writer.add_eot_token_id(renderer.stop[0])
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(_id(tokenizer.pad_token_id))
    writer.add_chat_template(str(tokenizer.chat_template))


def _id(token: Any) -> int:
    return int(token)


def _copy(writer: GGUFWriter, reader: Any) -> None:
    """Every tokenizer.ggml.* field but OURS, as it stands."""
    from gguf import GGUFValueType

    for key, field in reader.fields.items():
        if not key.startswith("tokenizer.ggml.") or key.rpartition(".")[2] in OURS:
            continue
        value_type, *item_type = field.types
        if value_type == GGUFValueType.ARRAY:
            writer.add_key_value(key, field.contents(), value_type, item_type[-1])
        else:
            writer.add_key_value(key, field.contents(), value_type)


def _from_json(writer: GGUFWriter, description: dict, num_rows: int) -> None:
    from gguf import TokenType

    model = description["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte_fallback (SentencePiece)" if model["type"] == "BPE" else model["type"]
        raise UsageError(f"--format gguf writes byte-level BPE tokenizers, this one is {kind}: take --format merged")
    pre = pre_tokenizer_name(description)
    tokens = {token_id: (token, TokenType.NORMAL) for token, token_id in model["vocab"].items()}
    for added in description.get("added_tokens", []):
        tokens[added["id"]] = (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if max(tokens) >= num_rows:
        raise UsageError(f"--format gguf: the tokenizer has id {max(tokens)}, the embedding {num_rows} rows")
    rows = [tokens.get(row, (f"[PAD{row}]", TokenType.UNUSED)) for row in range(num_rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    if not model["merges"]:
        writer.add_token_scores([0.0] * num_rows)  # transformers' reader asks for them where there are no merges
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])


def pre_tokenizer_name(description: dict) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json."""
    pre = description.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    types = [step.get("type") for step in steps]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    if types[-1:] == ["ByteLevel"]:
        for name, mark in PRE_TOKENIZERS:
            if len(patterns) == 1 and mark in patterns[0]:
                return name
        if types == UNICODE_DIGITS_THEN_BYTES and steps[0].get("individual_digits"):
            return "smollm"
        if types == ["ByteLevel"] and (steps[0].get("use_regex", True) or not description["model"]["merges"]):
            return "gpt-2"  # without merges every byte is a token, however the text is cut
    shown = ", ".join(patterns) or ", ".join(map(str, types))
    raise UsageError(f"--format gguf knows no name of llama.cpp for the pre-tokenizer {shown}: take --format merged")
