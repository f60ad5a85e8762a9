"""What a row may look like (chat, ShareGPT, prompt and completion, ...), and what is wrong with one that does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from cookbook.errors import UsageError
from cookbook.keys import did_you_mean
from cookbook.rows import RowProblem

Message = dict[str, object]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
CHAT_ROLES = {role: role for role in ("system", "user", "assistant", "tool", "developer")} | {"function": "tool"}


@dataclass(frozen=True)
class Chat:
    """Messages in the shape a renderer takes. `completion_from`: only messages from this index on are trained."""

    messages: list[Message]
    tools: list[dict] | None = None
    completion_from: int = 0
    fixes: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """All that stands before the first trained reply: two rows with the same prompt are duplicates."""
        turns = [(m["role"], m["content"]) for m in self.messages]
        replies = (i for i, (role, _) in enumerate(turns) if role == "assistant" and i >= self.completion_from)
        return repr(turns[: next(replies)])

    @property
    def flagged(self) -> bool:
        return any(m.get("weight") is not None or m.get("train") is not None for m in self.messages)


@dataclass(frozen=True)
class Completion:
    """Raw text, no template: the completion is trained."""

    prompt: str
    completion: str
    fixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """Raw text, all of it trained."""

    text: str
    fixes: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        return self.text


Row = Chat | Completion | Text


@dataclass(frozen=True)
class Format:
    """A set of columns and how to read them; `becomes` is what the renderer gets."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, object]], Row]
    becomes: str = "messages"

    def read_row(self, value: Mapping[str, object]) -> Row:
        """Raise RowProblem when the row cannot be trained on."""
        if any(column not in value for column in self.columns):
            raise RowProblem("wrong columns", f"has {_names(value)}; expected {', '.join(self.columns)}")
        return self.read(value)

    def describe(self, sample: Mapping[str, object]) -> str:
        """ "sharegpt -> messages", told by a row of this format."""
        becomes = "messages" if isinstance(sample.get(self.columns[0]), list) else self.becomes
        return self.name if becomes == self.name else f"{self.name} -> {becomes}"


def detect(samples: Iterable[Mapping[str, object]], columns: Mapping[str, str], where: str) -> Format:
    """The format that most of the (renamed) samples have; columns that the user named win over those merely present."""
    samples = list(samples)
    if not samples:  # no row is readable: each will say why
        return FORMATS[0]
    mapped = [f for f in FORMATS if any(column in columns for column in f.columns)]
    best, matches = FORMATS[0], 0
    for candidate in mapped or FORMATS:
        count = sum(all(s.get(c) is not None for c in candidate.columns) for s in samples)
        if count > matches:
            best, matches = candidate, count
    if not matches and {"chosen", "rejected"} <= samples[0].keys():
        raise UsageError(f"{where}: rows with chosen and rejected are for `cook dpo`, which learns from pairs of replies")
    if not matches:
        accepted = " | ".join("+".join(f.columns) for f in FORMATS)
        raise UsageError(
            f"{where}: columns {_names(samples[0])} fit no known format ({accepted}); name yours, e.g."
            " data.columns.prompt=question data.columns.completion=answer"
        )
    return best


def check_columns(columns: Mapping[str, str]) -> None:
    for standard in columns:
        if standard not in STANDARD_COLUMNS:
            known = ", ".join(STANDARD_COLUMNS)
            hint = did_you_mean(standard, STANDARD_COLUMNS)
            raise UsageError(f"data.columns.{standard}: no such column{hint}; known: {known}")


def rename(value: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """The row under standard names. RowProblem when a column named by the user is not there."""
    renamed = {name: cell for name, cell in value.items() if name not in columns.values()}
    for standard, own in columns.items():
        if own not in value:
            raise RowProblem("wrong columns", f"no {own!r} (data.columns.{standard}); has {_names(value)}")
        renamed[standard] = value[own]
    return renamed


def _names(value: Mapping[str, object]) -> str:
    return ", ".join(map(repr, value)) or "none"


# ---- formats


def _read_messages(value: Mapping[str, object]) -> Chat:
    return _turns(value, "messages", CHAT_ROLES)


def _read_sharegpt(value: Mapping[str, object]) -> Chat:
    return _turns(value, "conversations", SHAREGPT_ROLES)


def _turns(value: Mapping[str, object], column: str, roles: Mapping[str, str]) -> Chat:
    turns = decoded_list(value[column])
    if not isinstance(turns, list) or not turns:
        empty = turns in (None, "", [])
        seen = "empty" if empty else f"{type(turns).__name__}, expected a list"
        raise RowProblem("no messages", f"{column} is {seen}")
    return chat_of({f"{column}[{i}]": turn for i, turn in enumerate(turns)}, roles, value)


def read_completion(value: Mapping[str, object]) -> Row:
    prompt, completion = decoded_messages(value["prompt"]), decoded_messages(value["completion"])
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowProblem("wrong columns", "prompt and completion must both be text or both be lists of messages")
    if isinstance(prompt, list) and isinstance(completion, list):
        if not any(isinstance(m, dict) and m.get("role") == "assistant" for m in completion):
            raise RowProblem("no assistant message", "completion holds none")
        turns = {f"prompt[{i}]": turn for i, turn in enumerate(prompt)}
        turns |= {f"completion[{i}]": turn for i, turn in enumerate(completion)}
        chat = chat_of(turns, CHAT_ROLES, value)
        start = len(chat.messages) - len(completion)  # an empty system turn before it may have been dropped
        return replace(chat, completion_from=start)
    return Completion(_cell(prompt, "prompt"), filled(completion, "completion"))


def _pair(question: str, answer: str) -> Callable[[Mapping[str, object]], Chat]:
    def read(value: Mapping[str, object]) -> Chat:
        asked = filled(value[question], question)
        if question == "instruction" and value.get("input"):
            asked += "\n" + _cell(value["input"], "input")
        turns: dict[str, object] = {}
        for i, (past, reply) in enumerate(_history(value.get("history"))):
            turns[f"history[{i}][0]"] = {"role": "user", "content": past}
            turns[f"history[{i}][1]"] = {"role": "assistant", "content": reply}
        turns[question] = {"role": "user", "content": asked}
        turns[answer] = {"role": "assistant", "content": filled(value[answer], answer)}
        return chat_of(turns, CHAT_ROLES, value)

    return read


def _history(value: object) -> list[list[object]]:
    value = decoded_list(value) or []
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        return value
    raise RowProblem("wrong columns", "history must be a list of [question, answer] pairs")


def _read_text(value: Mapping[str, object]) -> Text:
    return Text(filled(value["text"], "text"))


FORMATS = (
    Format("messages", ("messages",), _read_messages),
    Format("sharegpt", ("conversations",), _read_sharegpt),
    Format("prompt/completion", ("prompt", "completion"), read_completion, "raw text"),
    *(
        Format(f"{question}/{answer}", (question, answer), _pair(question, answer))
        for question, answer in (
            ("instruction", "output"),
            ("instruction", "response"),
            ("question", "answer"),
            ("question", "response"),
            ("query", "response"),
        )
    ),
    Format("text", ("text",), _read_text, "raw text"),
)
OPTIONAL_COLUMNS = ("tools", "system", "input", "history")
PREFERENCE_COLUMNS = ("chosen", "rejected", "label", "kind", "response1", "response2", "context", "overall_preference")
STANDARD_COLUMNS = tuple(
    dict.fromkeys([*(column for form in FORMATS for column in form.columns), *OPTIONAL_COLUMNS, *PREFERENCE_COLUMNS])
)


# ---- verdicts


def chat_of(turns: Mapping[str, object], roles: Mapping[str, str], value: Mapping[str, object]) -> Chat:
    """Turns by the name an error message calls them, e.g. "messages[2]"."""
    fixes: list[str] = []
    messages = {where: _message(turn, where, roles, fixes) for where, turn in turns.items()}
    first = next(iter(messages))
    if messages[first]["role"] == "system":
        if not str(messages[first]["content"]).strip():
            del messages[first]
            fixes.append("empty system message left out")
    elif value.get("system"):  # a column of its own in some Alpaca and ShareGPT files
        system: Message = {"role": "system", "content": _cell(value["system"], "system")}
        messages = {"system": system, **messages}
    _check_order(messages)
    return Chat(list(messages.values()), _tools(value.get("tools")), fixes=tuple(fixes))


def _check_order(messages: Mapping[str, Message]) -> None:
    before, role_before = "", ""
    for where, message in messages.items():
        role = str(message["role"])
        if role == "system" and before:
            raise RowProblem("system message not first", where)
        if role == role_before == "user":
            raise RowProblem("two user turns in a row", f"{before} and {where}")
        before, role_before = where, role
    roles = dict.fromkeys(str(m["role"]) for m in messages.values())
    if "assistant" not in roles:
        raise RowProblem("no assistant message", f"only {', '.join(roles) or 'an empty system message'}")


def _message(turn: object, where: str, roles: Mapping[str, str], fixes: list[str]) -> Message:
    if not isinstance(turn, dict):
        like = '{"role": ..., "content": ...}'
        raise RowProblem("not a message", f"{where} is {type(turn).__name__}; a message looks like {like}")
    given = turn.get("role", turn.get("from"))
    if "role" not in turn and "from" in turn:
        roles = SHAREGPT_ROLES
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowProblem("unknown role", f"{where} has role {given!r}{_suggest_role(given)}")
    renamed = ("role", "from", "content", "value", "tool_calls")
    message = {key: value for key, value in turn.items() if value is not None and key not in renamed}
    content = _content(turn.get("content", turn.get("value")), where)
    calls = _tool_calls(turn.get("tool_calls"), where)
    if role == "function_call":
        role, calls, content = "assistant", _tool_calls([_json(content, where)], where), ""
    if role == "developer":
        role = "system"
        fixes.append("role 'developer' read as 'system'")
    if not content.strip() and not calls and role in ("user", "assistant") and not message.get("reasoning_content"):
        raise RowProblem("empty turn", f"{where} ({role}) has no content")
    if calls:
        message["tool_calls"] = calls
    return {"role": role, "content": content, **message}


def _suggest_role(given: object) -> str:
    if not isinstance(given, str):
        return ""
    alias = SHAREGPT_ROLES.get(given.lower())
    return f" (did you mean {alias}?)" if alias in CHAT_ROLES else did_you_mean(given, CHAT_ROLES)


def _content(content: object, where: str) -> str:
    if isinstance(content, list):  # OpenAI's parts
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise RowProblem("content is not text", f"{where} has a part of type {kind!r}")
        content = "".join(part["text"] for part in content)
    return "" if content is None else _cell(content, where)


def _cell(cell: object, where: str) -> str:
    """Text of a cell; numbers are written out."""
    if cell is None:
        raise RowProblem("empty turn", f"{where} is null")
    if isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell):
        return str(cell)
    if not isinstance(cell, str):
        raise RowProblem("content is not text", f"{where} is {type(cell).__name__}")
    if not cell.isascii():
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError:
            raise RowProblem("not valid Unicode", f"{where} holds half of a surrogate pair") from None
    return cell


def filled(cell: object, where: str) -> str:
    text = _cell(cell, where)
    if not text.strip():
        raise RowProblem("empty turn", f"{where} is empty")
    return text


def _tool_calls(calls: object, where: str) -> list[dict]:
    """OpenAI's shape with arguments as an object, which is what templates want."""
    read: list[dict] = []
    calls = decoded_list(calls) or []
    if not isinstance(calls, list):
        raise RowProblem("broken tool call", f"{where}: tool_calls is {type(calls).__name__}, expected a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowProblem("broken tool call", f"{where}: a call needs a name and arguments")
        arguments = function.get("arguments", {})
        arguments = _json(arguments, where) if isinstance(arguments, str) else arguments
        call_id = {"id": call["id"]} if call.get("id") else {}
        read.append(
            {**call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        )
    return read


def _tools(tools: object) -> list[dict] | None:
    tools = _json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowProblem("broken tools", "expected a list of JSON schemas")
    return tools


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = "broken tools" if where == "tools" else "broken tool call"
        raise RowProblem(reason, f"{where}: not JSON ({error.msg} at column {error.colno})") from None


def decoded_messages(cell: object) -> object:
    """The same of messages only, in columns that may as well hold a text."""
    decoded = decoded_list(cell)
    return decoded if isinstance(decoded, list) and all(isinstance(m, dict) and "role" in m for m in decoded) else cell


def decoded_list(cell: object) -> object:
    """Lists arrive as JSON text from csv files and some parquet files."""
    if isinstance(cell, str) and cell.lstrip()[:1] == "[":
        try:
            decoded = json.loads(cell)
        except json.JSONDecodeError:
            return cell
        return decoded if all(isinstance(item, dict | list) for item in decoded) and decoded else cell
    return cell
