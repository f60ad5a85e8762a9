"""The tool calls in a reply, and their answers: the same for rollouts and for a chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from envs.env import Message

Calls: TypeAlias = "list[Message | None] | None"  # None: the reply is but text; None in the list: a call that cannot be read

CALL_MARKS = ("<tool_call>", '"parameters"')  # what a reply has whose tool call is malformed
MALFORMED = 'the tool call cannot be read; expected <tool_call>{"name": ..., "arguments": {...}}</tool_call>'


def calls_of(message: Message, ended: Literal["stop", "length", "malformed"]) -> Calls:
    """The calls in a reply to somebody who has tools; one that was cut short is text."""
    if ended == "stop" and message.get("tool_calls"):
        return list(message["tool_calls"])
    if ended == "malformed" and any(mark in message["content"] for mark in CALL_MARKS):
        return [None]
    return None


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
