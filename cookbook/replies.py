"""A model's reply text to a message: thinking, tool calls, content."""

from __future__ import annotations

import json
import re
from typing import Literal, TypeAlias

from cookbook.messages import Json

ToolStyle: TypeAlias = Literal["hermes", "json"]  # <tool_call>{...}</tool_call>, or the whole reply is one JSON object
TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Malformed(ValueError):
    """The reply opens something that it does not close, or a tool call that is not JSON."""


def parse_reply(text: str, *, in_thinking: bool, tool_style: ToolStyle) -> dict[str, Json]:
    """{"role": "assistant", "content", "reasoning_content"?, "tool_calls"?}. `in_thinking`: the prompt ended inside
    <think>. Raises Malformed."""
    message: dict[str, Json] = {"role": "assistant", "content": text}
    reasoning, content = split_thinking(text, in_thinking)
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = _json_call(content) if tool_style == "json" else None
    if calls is None:
        content, calls = _hermes_calls(content)
    else:
        content = ""
    message["content"] = content
    if calls:
        message["tool_calls"] = calls
    return message


def split_thinking(text: str, in_thinking: bool) -> tuple[str, str]:
    """(reasoning, content) of a reply that thinks first; ("", text) of one that does not."""
    opened = text.lstrip().startswith("<think>")
    if not (opened or in_thinking):
        return "", text
    thought = text.lstrip().removeprefix("<think>")
    reasoning, closed, content = thought.partition("</think>")
    if not closed:
        raise Malformed("<think> without </think>")
    return reasoning.strip("\n"), content.lstrip("\n")


def _hermes_calls(text: str) -> tuple[str, list[Json]]:
    content, opened, _ = text.partition("<tool_call>")
    if not opened:
        return text, []
    if "<tool_call>" in TOOL_CALL.sub("", text):
        raise Malformed("<tool_call> without </tool_call>")
    return content.removesuffix("\n"), [_call(body, "arguments") for body in TOOL_CALL.findall(text)]


def _json_call(text: str) -> list[Json] | None:
    """Llama-3: the reply is nothing but {"name": ..., "parameters": {...}}; None when it is something else."""
    body = text.strip().removeprefix("<|python_tag|>").strip()
    if not (body.startswith("{") and '"name"' in body and '"parameters"' in body):
        return None
    return [_call(body, "parameters")]


def _call(body: str, arguments_key: str) -> dict[str, Json]:
    try:
        call = json.loads(body)
    except json.JSONDecodeError as error:
        raise Malformed(f"tool call is not JSON: {error}") from error
    arguments = call.get(arguments_key) if isinstance(call, dict) else None
    if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
        raise Malformed(f"tool call needs a name and an object of {arguments_key}: {body.strip()[:80]}")
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
