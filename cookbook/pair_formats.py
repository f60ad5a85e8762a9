"""What a preference row may look like (two replies to one prompt, or one with a verdict), and what is wrong with others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cookbook.row_formats import CHAT_ROLES, Chat, Completion, chat_of, decoded_list, filled, read_completion
from cookbook.rows import RowProblem

Reply = Chat | Completion  # with its prompt
Value = Mapping[str, object]

PAIRED = (("chosen", "rejected"), ("response1", "response2"), ("preferred_output", "non_preferred_output"))
RATED = ("prompt", "completion", "label")
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # of Anthropic's transcripts


@dataclass(frozen=True)
class PairRow:
    """`kind` says what is wrong with the rejected reply, where the row does."""

    chosen: Reply
    rejected: Reply
    kind: str


@dataclass(frozen=True)
class RatedRow:
    """One reply, wanted or not."""

    reply: Reply
    desirable: bool
    kind: str


def is_preference(value: object) -> bool:
    """Whether a row looks like one of these."""
    return isinstance(value, Mapping) and any(set(names) <= value.keys() for names in (*PAIRED, RATED))


def describe(value: Value) -> str:
    """ "chosen/rejected with prompt -> pairs"."""
    if names := next((names for names in PAIRED if set(names) <= value.keys()), None):
        given = next((name for name in ("prompt", "context", "input") if value.get(name) is not None), None)
        return f"{'/'.join(names)} {f'with {given}' if given else 'that begin alike'} -> pairs"
    return "prompt/completion/label -> rated replies"


def read_pair(value: Value) -> PairRow:
    """RowProblem for a row that says nothing about which of two replies is better."""
    if {"chosen", "rejected"} <= value.keys():
        chosen, rejected, prompt = value["chosen"], value["rejected"], value.get("prompt")
    elif {"preferred_output", "non_preferred_output"} <= value.keys():  # OpenAI's
        given = value.get("input")
        prompt = given.get("messages") if isinstance(given, dict) else given
        chosen, rejected = value["preferred_output"], value["non_preferred_output"]
    elif {"response1", "response2"} <= value.keys():  # HelpSteer's
        chosen, rejected, prompt = _ranked(value)
    else:
        expected = "chosen, rejected, and prompt where they do not begin with it"
        raise RowProblem("wrong columns", f"has {', '.join(map(repr, value)) or 'none'}; expected {expected}")
    kind = str(value.get("kind") or "")
    chosen, rejected, prompt = (_turns(side) for side in (chosen, rejected, prompt))
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise RowProblem("wrong columns", "chosen and rejected must both be text or both be lists of messages")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _messages(prompt, chosen, rejected, value, kind)
    return _texts(prompt, filled(chosen, "chosen"), filled(rejected, "rejected"), kind)


def read_rated(value: Value) -> list[RatedRow]:
    """One reply with a verdict, or both sides of a pair."""
    if not {"completion", "label"} <= value.keys():
        pair = read_pair(value)
        return [RatedRow(pair.chosen, True, pair.kind), RatedRow(pair.rejected, False, pair.kind)]
    label = {"true": True, "false": False, "1": True, "0": False}.get(str(value["label"]).lower())
    if label is None:
        raise RowProblem("no verdict", f"label is {value['label']!r}, expected true or false")
    reply = read_completion(value)
    assert isinstance(reply, Chat | Completion)
    return [RatedRow(reply, label, str(value.get("kind") or ""))]


def _ranked(value: Value) -> tuple[object, object, object]:
    """chosen, rejected and prompt of two responses with a preference from -3 (the first) to 3 (the second)."""
    preference = value.get("overall_preference")
    if not isinstance(preference, int | float) or isinstance(preference, bool):
        raise RowProblem("no preference", f"overall_preference is {preference!r}, expected a number below or above 0")
    if preference == 0:
        raise RowProblem("no preference", "overall_preference is 0")
    one, two = ([{"role": "assistant", "content": value[name]}] for name in ("response1", "response2"))
    return (one, two, value.get("context")) if preference < 0 else (two, one, value.get("context"))


def _turns(side: object) -> object:
    """Messages of a transcript with Human and Assistant, or of JSON text; anything else as it is."""
    if isinstance(side, str) and side.startswith("\n\nHuman:"):
        _, *parts = TURN.split(side)
        roles = {"Human": "user", "Assistant": "assistant"}
        return [{"role": roles[r], "content": text.strip()} for r, text in zip(parts[::2], parts[1::2], strict=True)]
    return decoded_list(side)


def _messages(prompt: object, chosen: list, rejected: list, value: Value, kind: str) -> PairRow:
    whole = _role(chosen[:1]) in ("user", "system")  # the sides hold the prompt themselves
    before: list[object] = []
    if isinstance(prompt, list) and not whole:
        before = prompt
    elif isinstance(prompt, str) and not whole:
        before = [{"role": "user", "content": prompt}]
    start = len(before) if before else _shared(chosen, rejected)
    chosen, rejected = before + chosen, before + rejected
    if chosen == rejected:
        raise RowProblem("sides are equal", "chosen and rejected say the same")
    asks = {_role(side[start : start + 1]) for side in (chosen, rejected)} & {"user", "system"}
    if not before and (start == 0 or asks):
        where = f"they differ from message {start} on" if start else "they begin differently and there is no prompt column"
        raise RowProblem("sides share no prompt", where)
    sides = []
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if _role(turns[-1:]) != "assistant" or len(turns) == start:
            raise RowProblem("no assistant turn", f"{name} does not end with one")
        named = {f"{name}[{i - len(before)}]" if i >= len(before) else f"prompt[{i}]": turn for i, turn in enumerate(turns)}
        chat = chat_of(named, CHAT_ROLES, value)
        from_end = len(turns) - start  # an empty system turn may have been dropped
        sides.append(Chat(chat.messages, chat.tools, len(chat.messages) - from_end, chat.fixes))
    return PairRow(sides[0], sides[1], kind)


def _texts(prompt: object, chosen: str, rejected: str, kind: str) -> PairRow:
    """Raw text, as in TRL."""
    if chosen == rejected:
        raise RowProblem("sides are equal", "chosen and rejected say the same")
    if isinstance(prompt, str):
        return PairRow(Completion(prompt, chosen), Completion(prompt, rejected), kind)
    if prompt is not None:
        raise RowProblem("wrong columns", "prompt, chosen and rejected must all be text or all be lists of messages")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = chosen[: next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))]
    shared = shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1]  # a reply starts with a whole word
    if not shared.strip():
        raise RowProblem("sides share no prompt", "they begin differently and there is no prompt column")
    if len(shared) in (len(chosen), len(rejected)):
        raise RowProblem("no assistant turn", "one side ends where the other goes on")
    return PairRow(Completion(shared, chosen[len(shared) :]), Completion(shared, rejected[len(shared) :]), kind)


def _shared(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Messages that both begin with."""
    pairs = zip(chosen, rejected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))


def _role(turns: Sequence[object]) -> object:
    return turns[0].get("role", turns[0].get("from")) if turns and isinstance(turns[0], dict) else None
