"""What a report's reader shows, from rollouts/*.jsonl of a run: groups of attempts, rows of data, pairs, answers.

A set is a file (or two, before and after), an item a problem or a row, an attempt one way it went. All of it is cut to
a size that a page can hold, the most telling first.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cookbook.charts import figure
from cookbook.messages import text_of
from cookbook.run_reader import PastRun

Json: TypeAlias = "dict[str, Any]"

FILES = 5  # of one kind: the first, the newest, and some between
ITEMS = 40  # of a set
ATTEMPTS = 8  # of an item: the best and the worst
SET_CHARACTERS = 240_000  # of a set as JSON
TOKENS = 800  # of a reply: its beginning and its end
CHARACTERS = 4000  # of a message
KINDS = {"": "training", "eval": "evaluation", "samples": "answers", "held_out": "held-out rows", "trained": "training rows"}


def reader_sets(run: PastRun) -> list[Json]:
    """The sets of a run; empty where nothing was recorded. Files and rows that cannot be read are left out."""
    sets = []
    for kind, files in _files(run).items():
        first = files[0] if files[0][0] == 0 else None
        chosen = _spaced([file for file in files if file is not first] or files, FILES)
        before = _rows(run, first[1]) if first and first not in chosen else []
        if kind == "eval" and first and first not in chosen:
            chosen = [first, *chosen]  # the others show it beside the later ones
        for step, path in reversed(chosen):
            try:
                items = _fitting(_items(_rows(run, path), before if step else []))
            except (KeyError, TypeError, ValueError, AttributeError):  # rows of a shape that this version does not know
                continue
            if items:
                when = f"step {step}" if step else "before the first step"
                sets.append(
                    {"label": f"{KINDS.get(kind, kind)}, {when}", "kind": kind or "training", "step": step, "items": items}
                )
    return sets


def _files(run: PastRun) -> dict[str, list[tuple[int, Path]]]:
    """Kind ("", eval, samples, ...) -> its (step, file), by step; in the order in which a page offers them."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in (run.directory / "rollouts").glob("*.jsonl"):
        if name := re.fullmatch(r"(?:(.+)-)?(\d+)", path.stem):
            found.setdefault(name[1] or "", []).append((int(name[2]), path))
    order = [*KINDS, *sorted(set(found) - set(KINDS))]
    return {kind: sorted(found[kind]) for kind in order if kind in found}


def _spaced(files: Sequence[tuple[int, Path]], number: int) -> list[tuple[int, Path]]:
    if len(files) <= number:
        return list(files)
    return [files[round(i * (len(files) - 1) / (number - 1))] for i in range(number)]


def _rows(run: PastRun, path: Path) -> list[Json]:
    return run.rows(f"rollouts/{path.name}")[0]


def _items(rows: list[Json], before: list[Json]) -> Iterable[Json]:
    """By what the rows hold, so that files of any name are shown."""
    if not rows:
        return []
    if "messages" in rows[0]:
        return _groups(rows)
    if "pair" in rows[0]:
        return _pairs(rows, before)
    if "texts" in rows[0]:
        return _data(rows, before)
    if "reply" in rows[0]:
        return _answers(rows, before)
    return []


def _fitting(items: Iterable[Json]) -> list[Json]:
    fitting, room = [], SET_CHARACTERS
    for item in itertools.islice(items, ITEMS):
        room -= len(json.dumps(item, ensure_ascii=False))
        if room < 0 and fitting:
            break
        fitting.append(item)
    return fitting


# Rollouts: an item is a problem, its attempts best first.


def _groups(rows: list[Json]) -> list[Json]:
    """Where rewards lie furthest apart first, the groups with texts of their tokens before the others."""
    groups: dict[object, list[Json]] = {}
    for row in rows:
        groups.setdefault(row.get("problem"), []).append(row)
    items = [_group(problem, attempts) for problem, attempts in groups.items()]
    return sorted(items, key=lambda item: (-item["spread"], -item["tokens"]))


def _group(problem: object, rows: list[Json]) -> Json:
    rows = sorted(rows, key=lambda row: (row.get("error") is not None, -_finite(row.get("reward"))))
    rewards = [_finite(row.get("reward")) for row in rows if row.get("error") is None]
    spread = max(rewards) - min(rewards) if rewards else 0.0
    kept = rows if len(rows) <= ATTEMPTS else [*rows[: ATTEMPTS // 2], *rows[-(ATTEMPTS // 2) :]]
    prompts = [_before_reply(row) for row in kept]
    shared = all(prompt == prompts[0] for prompt in prompts)
    note = f"{len(rows)} attempts" if len(rows) > 1 else ""
    if rewards:
        note += f"{', ' if note else ''}mean reward {figure(sum(rewards) / len(rewards))}"
    flags = ["attempts differ" if spread else "attempts agree"]
    flags += ["with errors"] * any(row.get("error") for row in rows)
    flags += ["cut short"] * any(turn.get("ended") == "length" for row in rows for turn in row.get("turns", []))
    return {
        "title": f"problem {problem}", "note": note, "flags": flags, "spread": round(spread, 6),
        "mean": round(sum(rewards) / len(rewards), 6) if rewards else None,
        "tokens": sum("texts" in turn for row in rows for turn in row.get("turns", [])),
        "prompt": [_message(message) for message in prompts[0]] if shared else [],
        "attempts": [_attempt(row, 0 if not shared else len(prompts[0])) for row in kept],
        "show": [0, len(kept) - 1] if len(kept) > 1 else [0],
        "names": ["best", "worst"] if spread else [],
    }  # fmt: skip


def _attempt(row: Json, skip: int) -> Json:
    messages, turns = list(row.get("messages", [])), list(row.get("turns", []))
    replies = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    told = dict(zip(replies[len(replies) - len(turns) :], turns, strict=True)) if len(turns) <= len(replies) else {}
    advantage = row.get("advantage")
    parts = []
    for index, message in enumerate(messages[skip:], start=skip):
        turn = told.get(index, {})
        if "texts" in turn:
            trained = [int(advantage is not None)] * len(turn["texts"])
            parts.append(["assistant", _tokens(turn["texts"], turn.get("logprobs"), trained, advantage)])
        else:
            parts.append(_message(message))
    about = [] if advantage is None else [f"advantage {_finite(advantage):+.3g}"]
    about += [f"{sum(len(turn.get('tokens', [])) for turn in turns)} tokens"]
    about += [f"{len(turns)} turns"] * (len(turns) > 1) + [str(row.get("ended"))] * (row.get("ended", "done") != "done")
    about += [f"{key} {figure(_finite(value))}" for key, value in list(row.get("metrics", {}).items())[:6]]
    about += ["not trained on"] * (advantage is None and row.get("error") is None)
    return {
        "head": f"error: {row['error']}" if row.get("error") else f"reward {figure(_finite(row.get('reward')))}",
        "chip": "error" if row.get("error") else figure(_finite(row.get("reward"))),
        "value": None if row.get("error") else _finite(row.get("reward")),
        "sub": " · ".join(about), "parts": parts,
    }  # fmt: skip


def _before_reply(row: Json) -> list[Json]:
    return list(itertools.takewhile(lambda message: message.get("role") != "assistant", row.get("messages", [])))


def _message(message: Mapping[str, Any]) -> list[str]:
    return [str(message.get("role", "")), _cut_text(text_of(message))]


# Data: an item is a row or a pair, before and after training where logprobs tell them apart.


def _data(rows: list[Json], before: list[Json]) -> Iterable[Json]:
    for index, row in enumerate(rows):
        earlier = before[index] if index < len(before) and before[index].get("tokens") == row.get("tokens") else None
        attempts = [_sequence(earlier, "before"), _sequence(row, "after")] if earlier else [_sequence(row, "")]
        yield _item(f"row {index + 1}", row, attempts, list(range(len(attempts))))


def _pairs(rows: list[Json], before: list[Json]) -> Iterable[Json]:
    def sides(of: list[Json], pair: object) -> list[Json]:
        return [row for row in of if row.get("pair") == pair]

    for pair in dict.fromkeys(row["pair"] for row in rows):
        both, earlier = sides(rows, pair), sides(before, pair)
        attempts = [_sequence(row, str(row.get("side", ""))) for row in both]
        attempts += [_sequence(row, f"{row.get('side', '')} before") for row in earlier]
        show = range(len(both)) if len(both) > 1 else range(len(attempts))  # an unpaired reply beside itself before
        kind = f", {both[0]['kind']}" if both[0].get("kind") else ""
        yield _item(f"pair {pair}{kind}" if len(both) > 1 else f"reply {pair}{kind}", both[0], attempts, list(show))


def _item(title: str, row: Json, attempts: list[Json], show: list[int]) -> Json:
    note = f"{row.get('length', len(row['texts']))} tokens, {sum(row.get('trained', []))} trained"
    return {"title": title, "note": note, "flags": [], "prompt": [], "attempts": attempts, "show": show, "names": []}


def _sequence(row: Json, name: str) -> Json:
    trained, logprobs = row.get("trained") or [0] * len(row["texts"]), row.get("logprobs")
    known = [_finite(lp) for lp in logprobs or [] if lp is not None]
    rated = f"log p {sum(known) / len(known):+.3f} per trained token" if known else ""
    tokens = _tokens(row["texts"], logprobs, trained, None)
    return {"head": name, "chip": name, "value": None, "sub": rated, "parts": [["", tokens]]}


def _tokens(texts: list[str], logprobs: list[float | None] | None, trained: list[int], advantage: float | None) -> Json:
    """t: texts, l: logprobs, m: 1 where trained, a: the advantage of them all."""
    half = TOKENS // 2
    if len(texts) > TOKENS:
        left_out = f" [... {len(texts) - 2 * half} tokens ...] "
        texts, trained = [*texts[:half], left_out, *texts[-half:]], [*trained[:half], 0, *trained[-half:]]
        logprobs = [*logprobs[:half], None, *logprobs[-half:]] if logprobs else None
    tokens: Json = {"t": texts, "m": trained}
    if logprobs:
        tokens["l"] = [None if lp is None else round(_finite(lp), 2) for lp in logprobs]
    if advantage is not None:
        tokens["a"] = round(_finite(advantage), 4)
    return tokens


# Answers of a recipe without rollouts: an item is a prompt.


def _answers(rows: list[Json], before: list[Json]) -> Iterable[Json]:
    def answer(name: str, text: object) -> Json:
        return {"head": name, "chip": name, "value": None, "sub": "", "parts": [["", _cut_text(str(text).strip())]]}

    for index, row in enumerate(rows):
        attempts = [answer("now", row["reply"]), answer("expected", row.get("expected", ""))]
        if index < len(before) and before[index].get("prompt") == row.get("prompt"):
            attempts = [answer("before", before[index].get("reply", "")), *attempts]
        prompt = [["prompt", _cut_text(str(row.get("prompt", "")).strip())]]
        yield {"title": f"prompt {index + 1}", "note": "", "flags": [], "prompt": prompt, "attempts": attempts,
               "show": list(range(len(attempts))), "names": []}  # fmt: skip


def _cut_text(text: str) -> str:
    if len(text) <= CHARACTERS:
        return text
    half = CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _finite(value: object, number: Callable[[Any], float] = float) -> float:
    """NaN and what is no number count as 0 here: they must be shown somewhere."""
    try:
        found = number(value)
    except (TypeError, ValueError):
        return 0.0
    return found if math.isfinite(found) else 0.0
