"""Tools: what a policy is told of a Python function, and how its calls are checked and run."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

Tool: TypeAlias = Callable[..., Any]
Kind: TypeAlias = Literal["unknown_tool", "bad_arguments", "failed"]

LIMIT = 4000  # characters of a result
SHOWN = 80  # characters of a value inside an error


class ToolError(Exception):
    """A call that gave no result; str() is the line that the policy reads. A tool may raise one of kind "failed"."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def schema(function: Tool) -> dict[str, Any]:
    """The function as OpenAI's JSON schema, from its signature and its Google-style docstring.

    ValueError where either leaves something unsaid: an argument without a type or without a line under `Args:`.
    """
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        described = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"{_name(function)} cannot be a tool: {_one_line(error)}") from error
    described["function"].pop("return", None)
    return described


async def call(
    tools: Sequence[Tool], name: str, arguments: Mapping[str, object] | str | None, *, limit: int = LIMIT
) -> str:
    """The result of a call as text, its middle left out beyond `limit` characters. Raises ToolError and nothing else.

    `arguments`: an object or its JSON text; "3" is taken for an int of 3. A tool that is not async runs in a thread.
    """
    function = _find(tools, name)
    checked = _checked(function, arguments)
    if inspect.iscoroutinefunction(function):
        try:
            result = await function(**checked)
        except Exception as error:
            raise _failed(name, error) from error
    else:
        result, error = await asyncio.to_thread(_outcome, function, checked)
        if error is not None:
            raise _failed(name, error) from error
    return _cut(_text(result), limit)


def _find(tools: Sequence[Tool], name: str) -> Tool:
    by_name = {_name(function): function for function in tools}
    if name in by_name:
        return by_name[name]
    known = f"tools: {', '.join(by_name)}" if by_name else "there are no tools"
    raise ToolError("unknown_tool", f"unknown tool {_shown(name)}{_did_you_mean(name, by_name)}; {known}")


def _checked(function: Tool, arguments: Mapping[str, object] | str | None) -> dict[str, object]:
    """The arguments as the signature's types; ToolError names the first that does not fit."""
    name, given = _name(function), _object(_name(function), arguments)
    parameters = inspect.signature(function, eval_str=True).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes = "it takes " + (", ".join(map(str, named.values())) or "none")
    for key in given:
        if key not in named and not takes_any:
            raise _bad(name, f"no argument {_shown(key)}{_did_you_mean(str(key), named)}; {takes}")
    for key, parameter in named.items():
        if key in given:
            given[key] = _value(name, parameter, given[key])
        elif parameter.default is parameter.empty:
            raise _bad(name, f"argument {key!r} is missing; {takes}")
    return given


def _object(name: str, arguments: Mapping[str, object] | str | None) -> dict[str, object]:
    found: object = arguments
    if isinstance(found, str):
        try:
            found = json.loads(found or "{}")
        except (ValueError, RecursionError):
            raise _bad(name, f"arguments are not JSON: {_shown(arguments)}") from None
    if not isinstance(found, Mapping | None):
        raise _bad(name, f"arguments should be an object of names and values, got {_shown(found)}")
    return dict(cast("Mapping[str, object]", found or {}))


def _value(name: str, parameter: inspect.Parameter, value: object) -> object:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if parameter.annotation is parameter.empty:
        return value
    hint = parameter.annotation
    config = ConfigDict(coerce_numbers_to_str=True)
    is_model = isinstance(hint, type) and hasattr(hint, "__pydantic_config__")  # pydantic: those bring their own
    try:
        return TypeAdapter(hint, config=None if is_model else config).validate_python(value)
    except (ValidationError, RecursionError):
        expected = inspect.formatannotation(hint)
        raise _bad(name, f"argument {parameter.name!r} should be {expected}, got {_shown(value)}") from None


def _outcome(function: Tool, arguments: dict[str, object]) -> tuple[object, BaseException | None]:
    """Result and error as values: a future would not carry StopIteration, and SystemExit would end us."""
    try:
        return function(**arguments), None
    except (Exception, SystemExit) as error:
        return None, error


def _failed(name: str, error: BaseException) -> ToolError:
    if isinstance(error, ToolError):
        return error
    said = _one_line(error)
    return ToolError("failed", f"{name} failed: {type(error).__name__}" + (f": {said}" if said else ""))


def _bad(name: str, text: str) -> ToolError:
    return ToolError("bad_arguments", f"{name}: {text}")


def _text(result: object) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, dict | list | tuple | bool) or result is None:
        return json.dumps(result, ensure_ascii=False, default=str)
    return str(result)


def _cut(text: str, limit: int) -> str:
    """The beginning and the end: a listing starts with what matters, a traceback ends with it."""
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 2, limit // 2
    return f"{text[:head]}\n[... {len(text) - limit} characters left out ...]\n{text[len(text) - tail :]}"


def _name(function: Tool) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _did_you_mean(word: str, options: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(options), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # an int of more than 4,300 digits has no repr
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:
        return ""
    return text if len(text) <= 300 else text[:297] + "..."
