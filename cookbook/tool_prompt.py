"""Tools for models whose chat template knows none (SmolLM2): told in the system message, called in the reply's text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cookbook.messages import Json, tool_name
from cookbook.template_check import ASK, TOOL
from envs.env import Message

if TYPE_CHECKING:
    from cookbook.renderers import Renderer


def told_of_tools(
    messages: Sequence[Message], tools: Sequence[Callable[..., Any]], renderer: Renderer
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The first messages, and the schemas that the template is to tell of; None: the messages do it."""
    from envs.tools import schema

    schemas = [schema(tool) for tool in tools]
    if knows_tools(renderer):
        return list(messages), schemas
    return with_tools_as_text(messages, schemas), None


def knows_tools(renderer: Renderer) -> bool:
    """Whether the chat template tells the model of tools."""
    try:
        return tool_name(TOOL) in renderer.render([ASK], [TOOL], prompt=True)
    except ValueError:
        return False


def with_tools_as_text(messages: Sequence[Message], schemas: Sequence[Mapping[str, Json]]) -> list[Message]:
    """The messages with the tools in the (perhaps new) system message, in the words of the built-in `chatml` template.

    Calls that were made are text too, also where no tools are told of any more.
    """
    messages = [_call_as_text(message) if message.get("tool_calls") else message for message in messages]
    if not schemas:
        return messages
    told = "\n".join([
        "These functions can be called:", "<tools>", *(json.dumps(schema, ensure_ascii=False) for schema in schemas),
        "</tools>", "To call one, write", "<tool_call>", '{"name": ..., "arguments": {...}}', "</tool_call>",
    ])  # fmt: skip
    if messages and messages[0]["role"] == "system":
        first, *others = messages
        return [{**first, "content": f"{first['content']}\n\n{told}"}, *others]
    return [{"role": "system", "content": told}, *messages]


def _call_as_text(message: Message) -> Message:
    """An example of a call, in the words in which the model is to make its own."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    text = "\n".join([message.get("content") or "", *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]).strip()
    return {"role": message["role"], "content": text}
