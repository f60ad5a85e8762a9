"""One conversation under one renderer: the texts the template makes of its beginnings, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cookbook.messages import Message, Tools, template_messages, template_tools, tool_name

if TYPE_CHECKING:
    from cookbook.renderers import Renderer

ANYTHING = {"role": "user", "content": "?"}
Span = tuple[int, int]


class Conversation:
    """Raises ValueError, naming the message, for what cannot be rendered whole."""

    def __init__(self, renderer: Renderer, messages: Sequence[Message], tools: Tools | None):
        if not messages:
            raise ValueError("no messages")
        self.renderer = renderer
        clean, schemas = template_messages(messages), template_tools(tools)
        self.spliced = {at: list(message["tokens"]) for at, message in enumerate(messages) if message.get("tokens")}
        self.messages, self.tools, self.mark = renderer.encoder.protect(clean, schemas)
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, count: int) -> str:
        """The first `count` messages."""
        return self._render(count, False)

    def prompt(self, index: int) -> str:
        """What the model is given to write message `index`."""
        if index > 0:
            return self._render(index, True)
        asked = self.renderer.render([ANYTHING], None, prompt=True)  # nothing was asked: find the header in the text
        header = asked.removeprefix(self.renderer.render([ANYTHING], None, prompt=False))
        before, found, _ = self.text(1).partition(header) if header else ("", "", "")
        if not found:
            raise ValueError("the conversation opens with a reply, which this template cannot prompt for")
        return before + found

    def _render(self, count: int, prompt: bool) -> str:
        key = (count, prompt)
        if key not in self._texts:
            self._texts[key] = self.renderer.render(self.messages[:count], self.tools, prompt=prompt)
        return self._texts[key]

    def reply(self, index: int) -> str:
        """The text up to and with the stop token of reply `index`, as rendered with nothing after it."""
        prompt, text = self.prompt(index), self.text(index + 1)
        if not text.startswith(prompt):
            hint = " (it thinks, but model.thinking=false)" if self._thinks_in_vain(index) else ""
            raise ValueError(f"reply {index} as rendered does not continue its generation prompt{hint}")
        stops = self.renderer.stop_texts
        ends = [found + len(stop) for stop in stops if (found := text.rfind(stop, len(prompt))) >= 0]
        if not ends:
            raise ValueError(f"the template puts no stop token after reply {index}")
        end = max(ends)
        self._check_kept(index, text[len(prompt) : end])
        return text[:end]

    def _thinks_in_vain(self, index: int) -> bool:
        message = self.messages[index]
        thinks = "reasoning_content" in message or "<think>" in str(message.get("content"))
        return thinks and self.renderer.thinking is False

    def _check_kept(self, index: int, rendered: str) -> None:
        """A template that does not know a field drops it without a word; a trained reply must be whole."""
        message = self.messages[index]
        content = str(message.get("content", "")).split("</think>")[-1]
        for field, text in (("reasoning_content", str(message.get("reasoning_content", ""))), ("content", content)):
            if text.strip() not in rendered:
                raise ValueError(f"the template drops the {field} of message {index}")
        for call in message.get("tool_calls", []):
            if call["function"]["name"] not in rendered:
                raise ValueError(f"the template drops the tool calls of message {index}")

    def check_complete(self, text: str) -> None:
        """The same for what was said and offered to the model, in a rendering of all messages."""
        for index, message in enumerate(self.messages):
            asked = message["role"] in ("system", "developer", "user")
            if asked and str(message.get("content", "")).strip() not in text:
                raise ValueError(f"the template drops message {index} ({message['role']})")
        for tool in self.tools or ():
            if tool_name(tool) not in text:
                raise ValueError(f"the template drops the tools (here: {tool_name(tool)})")

    def encode(self, text: str, trained: Sequence[int] = ()) -> tuple[list[int], list[Span]]:
        """Tokens of `text`, a rendering of this conversation, and the spans of the replies in `trained`.

        The tokens up to a reply are those of its generation prompt. `tokens` of a message stand for its rendered reply.
        """
        encoded = self.renderer.encoder.encode(text, self.mark)
        tokens: list[int] = []
        spans: list[Span] = []
        read = 0  # tokens of `encoded` dealt with
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant" or not text.startswith(prompt := self.prompt(index)):
                continue
            at, position = encoded.last_control_before(len(prompt))
            header = self._encode_header(prompt[position:])
            tokens += encoded.tokens[read:at] + header
            start, read = len(tokens), at + len(header)
            if encoded.tokens[at:read] != header:  # a token straddles the border: the reply is encoded by itself
                read, position = encoded.first_control_from(len(prompt)) or (len(encoded.tokens), len(text))
                tokens += self.renderer.encoder.encode(text[len(prompt) : position], self.mark).tokens
            if (index not in trained and index not in self.spliced) or not text.startswith(reply := self.reply(index)):
                continue
            stop = encoded.last_control_before(len(reply))[0]
            stopped = True
            tokens += encoded.tokens[read:stop]
            if sampled := self.spliced.get(index):
                stopped = sampled[-1] == encoded.tokens[stop]
                tokens[start:] = sampled[:-1] if stopped else sampled  # cut short: the template's stop token, untrained
            read = stop
            if index in trained:
                spans.append((start, len(tokens) + stopped))
        return tokens + encoded.tokens[read:], spans

    def _encode_header(self, text: str) -> list[int]:
        encoder = self.renderer.encoder
        marked = self.mark and self.mark in text
        return encoder.encode(text, self.mark).tokens if marked else encoder.encode_short(text)
