"""Chat messages as rows and rollouts carry them, brought to the one form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Json: TypeAlias = Any  # what json.loads gives; checked here, at the door
Message: TypeAlias = Mapping[str, Json]
Tools: TypeAlias = Sequence[Mapping[str, Json]] | str  # JSON schemas, or the JSON text of their list

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
NOT_FOR_TEMPLATES = ("train", "weight", "tokens", *REASONING_KEYS[1:])


def template_messages(messages: Sequence[Message]) -> list[dict[str, Json]]:
    """Messages without nulls and without our own keys: content a string, reasoning under `reasoning_content`,
    tool arguments as objects. Raises ValueError that names the message."""
    return [_template_message(index, message) for index, message in enumerate(messages)]


def _template_message(index: int, message: Message) -> dict[str, Json]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {index} needs a role and a content, got {str(message)[:60]!r}")
    clean = {key: value for key, value in message.items() if value is not None and key not in NOT_FOR_TEMPLATES}
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    clean.pop("reasoning_content", None)
    if reasoning is not None:
        clean["reasoning_content"] = reasoning
    calls = clean.pop("tool_calls", None)  # an empty list makes templates believe in a call
    if calls:
        clean["tool_calls"] = [_tool_call(index, call) for call in calls]
    if "content" in clean:
        clean["content"] = _text(index, clean["content"])
    elif not calls:
        raise ValueError(f"message {index} ({clean['role']}) has no content")
    return clean


def _text(index: int, content: Json) -> str:
    """Content given in parts ([{"type": "text", "text": ...}]) as one string."""
    if isinstance(content, str):
        return content
    parts: Sequence[Json] = content if isinstance(content, Sequence) else [content]
    if all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        return "".join(str(part["text"]) for part in parts)
    raise ValueError(f"message {index}: content must be text or text parts, got {str(content)[:60]!r}")


def _tool_call(index: int, call: Json) -> dict[str, Json]:
    """{"type": "function", "function": {"name", "arguments": object}, ...} from OpenAI's or HF's way of writing it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {index}: a tool call needs a function with a name, got {str(call)[:60]!r}")
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"message {index}: arguments of tool call {name!r} are not JSON: {error}") from error
    if not isinstance(arguments, Mapping | None):
        raise ValueError(f"message {index}: arguments of tool call {name!r} must be an object, got {arguments!r}")
    extra = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return {"type": "function", **extra, "function": {"name": name, "arguments": dict(arguments or {})}}


def template_tools(tools: Tools | None) -> list[Mapping[str, Json]] | None:
    """Tool schemas as a list, or None when there are none."""
    try:
        schemas = json.loads(tools or "[]") if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"tools are not JSON: {error}") from error
    return list(schemas) if schemas else None


def tool_name(tool: Mapping[str, Json]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def text_of(message: Message) -> str:
    """A message as one reads it: its thinking in tags, its content, its calls as name(arguments)."""
    parts = [f"<think>{message['reasoning_content']}</think>"] if message.get("reasoning_content") else []
    parts += [str(message["content"])] if message.get("content") else []
    parts += [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls") or []]
    return " ".join(parts)


def strings(value: Json) -> Iterator[str]:
    """Every string inside `value`, dict keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)
