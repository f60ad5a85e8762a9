"""Sampled tokens as OpenAI's clients read them: text up to a stop, logprobs by token, messages with tool calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cookbook.messages import Json
from cookbook.replies import Malformed, ToolStyle, parse_reply
from cookbook.token_texts import LONGEST, PART


@dataclass(frozen=True)
class Entry:
    """A token of a reply: `start` is where its text begins, `top` the likeliest tokens at its place."""

    token: int
    logprob: float
    start: int
    top: Sequence[tuple[int, float]] | None


class Reply:
    """One sequence as it grows. `text` is what no stop can take back any more; a stop is no part of it."""

    def __init__(self, texts_of: Callable[[Sequence[int]], list[str]], stops: Sequence[str], ends: Iterable[int]) -> None:
        self.texts_of, self.stops, self.ends = texts_of, stops, frozenset(ends)
        self.text = ""
        self.count = 0
        self.stopped = False  # by an end token or a text
        self._whole = ""  # the text with its end that may yet become a stop
        self._waiting: list[int] = []  # tokens of a character that is not whole yet
        self._entries: list[Entry] = []  # not taken yet

    def add(self, token: int, logprob: float, top: Sequence[tuple[int, float]] | None) -> None:
        self.count += 1
        if token in self.ends:
            self._grow(self._rest())
            self.text, self.stopped = self._whole, True
            return
        self._entries.append(Entry(token, logprob, len(self._whole), top))
        self._waiting.append(token)
        text = "".join(self.texts_of(self._waiting))
        if not text.endswith(PART) or len(self._waiting) >= LONGEST:
            self._waiting = []
            self._grow(text)

    def finish(self) -> None:
        """There are no more tokens."""
        if not self.stopped:
            self._grow(self._rest())
            self.text = self._whole

    def take(self) -> list[Entry]:
        """The tokens of what `text` has gained since the last call."""
        ready = [entry for entry in self._entries if entry.start < len(self.text)]
        self._entries = self._entries[len(ready) :]
        return ready

    def _rest(self) -> str:
        waiting, self._waiting = self._waiting, []
        return "".join(self.texts_of(waiting))

    def _grow(self, piece: str) -> None:
        before = len(self._whole)
        self._whole += piece
        found = [at for stop in self.stops if (at := self._whole.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if found:
            self.text = self._whole = self._whole[: min(found)]
            self.stopped = True
        else:
            self.text = self._whole[: len(self._whole) - _begun(self._whole, self.stops)]


def _begun(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    longest = min(len(text), max((len(mark) for mark in marks), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)


# ---- messages


@dataclass(frozen=True)
class Style:
    """How a model's replies are read. `tools` None: none were offered, and what looks like a call is text."""

    in_thinking: bool
    tools: ToolStyle | None


def message_of(text: str, style: Style) -> dict[str, Json]:
    """The message of a whole reply. A call that cannot be read stays text; a thought that is cut off stays a thought."""
    reasoning, content = _split(text, style)
    try:
        parsed = parse_reply(text, in_thinking=style.in_thinking, tool_style=style.tools or "hermes")
    except Malformed:
        parsed = {}
    calls = parsed.get("tool_calls") if style.tools else None
    if calls:
        content = parsed["content"]
    message: dict[str, Json] = {"role": "assistant", "content": None if calls and not content else content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [tool_call_json(call) for call in calls]
    return message


def tool_call_json(call: dict[str, Json]) -> dict[str, Json]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _split(text: str, style: Style) -> tuple[str, str]:
    """(reasoning, content), the thought closed or not."""
    opened = text.lstrip().startswith("<think>")
    if not (opened or style.in_thinking):
        return "", text
    reasoning, _, content = text.lstrip().removeprefix("<think>").partition("</think>")
    return reasoning.strip("\n"), content.lstrip("\n")


def _shown(text: str, style: Style) -> tuple[str, str]:
    """(reasoning, content) of an unfinished reply: beginnings of what the whole one's will be."""
    if not style.in_thinking and len(text.lstrip()) < len("<think>") and "<think>".startswith(text.lstrip()):
        return "", ""
    reasoning, content = _split(text[: len(text) - _begun(text, ["</think>"])], style)
    if style.tools is None:
        return reasoning, content
    bare = content.lstrip()
    if style.tools == "json" and any(bare.startswith(mark[: len(bare)]) for mark in ("{", "<|python_tag|>")):
        return reasoning, ""
    before, opened, _ = content.partition("<tool_call>")
    if not opened:
        before = before[: len(before) - _begun(before, ["<tool_call>"])]
    return reasoning, before.removesuffix("\n")


class Deltas:
    """The parts of a message that are new since the last call."""

    def __init__(self, style: Style) -> None:
        self.style = style
        self._sent = {"reasoning_content": "", "content": ""}

    def of(self, text: str) -> dict[str, Json]:
        return self._new(*_shown(text, self.style))

    def last(self, text: str) -> dict[str, Json]:
        """For the whole text: the rest, and the tool calls."""
        message = message_of(text, self.style)
        delta = self._new(message.get("reasoning_content", ""), message["content"] or "")
        if "tool_calls" in message:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]
        return delta

    def _new(self, reasoning: str, content: str) -> dict[str, Json]:
        delta = {}
        for key, now in (("reasoning_content", reasoning), ("content", content)):
            if len(now) > len(self._sent[key]):
                delta[key] = now[len(self._sent[key]) :]
                self._sent[key] = now
        return delta


# ---- logprobs


def chat_logprobs(entries: Sequence[Entry], texts_of: Callable[[Sequence[int]], list[str]]) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        text = texts_of([token])[0]
        return {"token": text, "logprob": logprob, "bytes": None if PART in text else list(text.encode())}

    rows = [{**one(e.token, e.logprob), "top_logprobs": [one(*pair) for pair in e.top or ()]} for e in entries]
    return {"content": rows, "refusal": None}


def completion_logprobs(entries: Sequence[Entry], texts_of: Callable[[Sequence[int]], list[str]]) -> dict[str, Any]:
    tops = [{texts_of([token])[0]: logprob for token, logprob in entry.top or ()} for entry in entries]
    return {
        "tokens": [texts_of([entry.token])[0] for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": [entry.start for entry in entries],
    }
