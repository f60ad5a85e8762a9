"""The tool calls in a reply, and their answers: the same for rollouts and for a chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from envs.env import Message

if TYPE_CHECKING:
    from cookbook.renderers import Ended, Renderer

Calls: TypeAlias = "list[Message | None] | None"  # None: the reply is but text; None in the list: a call that cannot be read
CALL_MARKS = ("<tool_call>", '"parameters"')  # what a reply has whose tool call is malformed
MALFORMED = 'the tool call cannot be read; expected <tool_call>{"name": ..., "arguments": {...}}</tool_call>'


def calls_of(message: Message, ended: Ended) -> Calls:
    """The calls in a reply to somebody who has tools; one that was cut short is text."""
    if ended == "stop" and message.get("tool_calls"):
        return list(message["tool_calls"])
    if ended == "malformed" and any(mark in message["content"] for mark in CALL_MARKS):
        return [None]
    return None


@dataclass(frozen=True)
class Reply:
    """Sampled tokens as a message. `as_text`: all that was said, for templates that know no tools."""

    message: Message
    as_text: Message
    calls: Calls
    ended: Ended

    def in_conversation(self, tokens: Sequence[int], calls_as_text: bool) -> Message:
        """As the next prompt has it: the renderer splices the tokens."""
        return {**(self.as_text if calls_as_text else self.message), "tokens": list(tokens)}


def read_reply(renderer: Renderer, tokens: Sequence[int], has_tools: bool) -> Reply:
    message, ended = renderer.parse_response(tokens)
    text = renderer.decode([token for token in tokens if token not in renderer.stop])
    as_text: Message = {"role": "assistant", "content": text}
    calls = calls_of(message, ended) if has_tools else None
    if calls is None and message.get("tool_calls"):  # cut short, or there are no tools: it is but text
        message = as_text
    return Reply(message, as_text, calls, ended)


async def answer(tools: Sequence[Callable[..., Any]], call: Message | None) -> tuple[Message, str | None]:
    """(the tool's message, the kind of error if it is one)."""
    from envs import tools as envs_tools

    if call is None:
        return {"role": "tool", "content": f"error: {MALFORMED}"}, "malformed"
    function, kind = call["function"], None
    try:
        text = await envs_tools.call(tools, function["name"], function["arguments"])
    except envs_tools.ToolError as error:
        text, kind = f"error: {error}", error.kind
    return {"role": "tool", "name": function["name"], "content": text}, kind
