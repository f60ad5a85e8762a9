"""Streams of problems from a seed: drawn without end, or rows split and reshuffled; train never shows what eval holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

Row: TypeAlias = dict[str, Any]
T = TypeVar("T")

EVAL_SHARE = 5  # one problem in five is held out from training
PATIENCE = 2000  # draws in a row that bring nothing new before a kind of problem counts as exhausted


def check_split(split: str) -> None:
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: expected train or eval")


def generator(split: str, seed: int, *more: object) -> random.Random:
    """The randomness of one stream, or of the part of it that `more` names."""
    return random.Random(" ".join(map(str, (split, seed, *more))))


def held_apart(
    drawn: Iterator[T], key: Callable[[T], str], split: str, label: Callable[[T], str] | None = None
) -> Iterator[T]:
    """Of problems drawn without end, those of `split`; what `key` says of a problem decides where it belongs.

    train goes on for ever and may repeat; eval has each `label` (or key) once and ends when nothing new comes.
    """
    seen: set[str] = set()
    in_vain = 0
    for problem in drawn:
        name = (label or key)(problem)
        if (digest(key(problem)) % EVAL_SHARE == 0) is (split == "eval") and name not in seen:
            if split == "eval":
                seen.add(name)
            in_vain = 0
            yield problem
        elif (in_vain := in_vain + 1) >= PATIENCE:
            if split == "train":
                raise ValueError("all problems of this kind are held out for evaluation: choose settings with more of them")
            return


def digest(text: str) -> int:
    """The same for the same text on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_rows(rows: Sequence[T], key: Callable[[T], str], eval_rows: int, split: str) -> list[T]:
    """The rows of `split`: held out are at most `eval_rows` and a fifth, chosen by `key` alone; equal keys stay together."""
    room = min(eval_rows, len(rows) // EVAL_SHARE)
    counts: dict[str, int] = {}
    for row in rows:
        counts[key(row)] = counts.get(key(row), 0) + 1
    held_out: set[str] = set()
    for name in sorted(counts, key=digest):
        if counts[name] <= room:
            held_out.add(name)
            room -= counts[name]
    return [row for row in rows if (key(row) in held_out) is (split == "eval")]


def reshuffled(rows: Sequence[T], split: str, seed: int) -> Iterator[T]:
    """train: all rows again and again, each epoch in an order of its own; eval: once, in an order of the seed's."""
    epoch = 0
    while rows and (split == "train" or epoch == 0):
        order = list(range(len(rows)))
        generator(split, seed, epoch).shuffle(order)
        yield from (rows[i] for i in order)
        epoch += 1


def read_jsonl(path: str, needed: Sequence[str]) -> list[Row]:
    """The objects of a file, each with text or a number in some field of every 'a|b' of `needed`. ValueError names the line."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"env.path={path} cannot be read ({error}): expected a file with one JSON object a line") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_object(line, f"{file.name}:{number}", needed))
    if not rows:
        raise ValueError(f"env.path={path} has no rows")
    return rows


def _object(line: str, where: str, needed: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object with {', '.join(needed)}: {line[:60]}")
    for names in needed:
        if not any(str(value).strip() for name in names.split("|") if isinstance(value := row.get(name), str | int | float)):
            raise ValueError(f"{where} has no text in {' or '.join(names.split('|'))}; it has {', '.join(row) or 'nothing'}")
    return row


def hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """A hub data set's rows. ValueError in one line when it cannot be had."""
    from datasets import load_dataset

    try:
        with _offline_when_unreachable():
            return [dict(row) for row in load_dataset(name, config, split=split)]
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"hub data set {name} cannot be loaded ({type(error).__name__}: {said}); or use a file: env.path=my.jsonl"
        ) from error


@contextlib.contextmanager
def _offline_when_unreachable() -> Iterator[None]:
    """Without a way to the hub its client retries for half a minute before it looks into the cache."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
