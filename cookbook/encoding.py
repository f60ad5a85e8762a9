"""Rendered text to tokens, where only the chat template may write control tokens.

Before rendering, a control token inside a message ("<|im_end|>" typed by a user) gets a Unicode noncharacter after its
first letter. The template carries the mark along, so what still reads as a control token was written by the template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from cookbook.messages import Json, Message, strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLY_TAGS = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})  # models write these themselves
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text. `controls` are its control tokens, in order: (index among the tokens, position in the text)."""

    tokens: list[int]
    controls: list[tuple[int, int]]

    def last_control_before(self, position: int) -> tuple[int, int]:
        return next((control for control in reversed(self.controls) if control[1] < position), (0, 0))

    def first_control_from(self, position: int) -> tuple[int, int] | None:
        return next((control for control in self.controls if control[1] >= position), None)


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "((?!))")


class TextEncoder:
    """A tokenizer that knows which of its added tokens steer the model: the special ones and those in `structural`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, structural: Iterable[str]):
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._added = {str(token): (id, token) for id, token in tokenizer.added_tokens_decoder.items()}
        control = {text for text, (_, token) in self._added.items() if token.special} | set(structural)
        self._control_ids = {self._added[text][0] for text in control}
        self._in_messages = _any_of(control)
        self._in_replies = _any_of(control - REPLY_TAGS)
        self.encode_short = lru_cache(maxsize=4096)(lambda text: self.encode(text).tokens)  # headers recur

    def protect(self, messages: Sequence[Message], tools: Json) -> tuple[Sequence[Message], Json, str]:
        """Messages and tools with the control tokens in them marked, and the mark ("" when there was none)."""
        everything = "\0".join([*strings(messages), *strings(tools)])
        if not self._in_messages.search(everything):
            return messages, tools, ""
        mark = next(char for char in NONCHARACTERS if char not in everything)

        def marker(pattern: re.Pattern[str]) -> Callable[[Json], Json]:
            def put(value: Json) -> Json:
                if isinstance(value, str):
                    return pattern.sub(lambda found: found[0][0] + mark + found[0][1:], value)
                if isinstance(value, Mapping):
                    return {put(key): put(item) for key, item in value.items()}
                return [put(item) for item in value] if isinstance(value, Sequence) else value

            return put

        message_marker, reply_marker = marker(self._in_messages), marker(self._in_replies)
        marked = [(reply_marker if message["role"] == "assistant" else message_marker)(message) for message in messages]
        return marked, message_marker(tools), mark

    def encode(self, text: str, mark: str = "") -> Encoded:
        """Tokens of rendered `text`; what is marked in it becomes ordinary text and loses its mark."""
        if mark and mark in text:
            return self._encode_marked(text, mark)
        encoding = self._backend.encode(text, add_special_tokens=False)
        tokens = encoding.ids
        at = [index for index, token in enumerate(tokens) if token in self._control_ids]
        offsets = encoding.offsets if at else []
        return Encoded(tokens, [(index, offsets[index][0]) for index in at])

    def _encode_marked(self, text: str, mark: str) -> Encoded:
        tokens: list[int] = []
        controls: list[tuple[int, int]] = []
        position = 0
        swallow = False  # some added tokens eat the white space that follows them (Phi-3)
        for number, piece in enumerate(self._any_added.split(text)):
            if number % 2:
                id, token = self._added[piece]
                if id in self._control_ids:
                    controls.append((len(tokens), position))
                tokens.append(id)
                swallow = token.rstrip
            else:
                ordinary = piece.lstrip() if swallow else piece
                tokens += self._as_text(ordinary.replace(mark, "")) if mark in piece else self.encode(ordinary).tokens
            position += len(piece)
        return Encoded(tokens, controls)

    @cached_property
    def _any_added(self) -> re.Pattern[str]:
        return _any_of(self._added)

    def _as_text(self, text: str) -> list[int]:
        """Tokens of `text` with no added token recognised (the switch of `tokenizers` covers special ones only)."""
        backend = self._backend
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        tokens = [token.id for word in words for token in backend.model.tokenize(word)]
        if not self._control_ids.isdisjoint(tokens):
            raise ValueError("the tokenizer makes a control token from ordinary text")
        return tokens
