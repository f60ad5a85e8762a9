"""Sequences that begin alike share the rows of their common beginning: a tree of spans, each computed once.

Rows of a position depend on the tokens up to it alone, so a prompt that sixteen attempts share needs one forward and one
backward; its gradient is the sum of theirs. Sharing is per adapter: another adapter's rows are other numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

MIN_SAVED = 24  # rows that a shared span must save, worth one more gather in attention


@dataclass(eq=False)
class Span:
    """Positions [start, stop) of one sequence, or of all that pass through it; `parent` holds the positions before."""

    tokens: torch.Tensor  # [stop - start]
    start: int
    parent: Span | None

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    def path(self) -> list[Span]:
        """From the root to this span."""
        spans: list[Span] = [self]
        while (parent := spans[-1].parent) is not None:
            spans.append(parent)
        return spans[::-1]


def order(sequences: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """(indices, rows): like beginnings side by side, longer ones first, and the rows that each adds to the one before."""
    ranked, common = _sorted(sequences)
    found: list[int] = []
    runs = [(0, len(ranked))] if ranked else []
    while runs:
        low, high = runs.pop()
        if high - low == 1:
            found.append(ranked[low])
            continue
        _, children = _split(common, low, high)
        longest = {run: max(len(sequences[i]) for i in ranked[run[0] : run[1]]) for run in children}
        runs += sorted(children, key=lambda run: (longest[run], -run[0]))
    shared = [0, *(_common(sequences[a], sequences[b]) for a, b in pairwise(found))]
    return found, [len(sequences[i]) - s for i, s in zip(found, shared, strict=True)]


def share(sequences: Sequence[torch.Tensor]) -> tuple[list[Span], list[Span]]:
    """(spans, parents before children; the last span of each sequence)."""
    ranked, common = _sorted(sequences)
    spans: list[Span] = []
    last: list[Span | None] = [None] * len(sequences)
    runs: list[tuple[int, int, Span | None]] = [(0, len(ranked), None)] if ranked else []
    while runs:
        low, high, parent = runs.pop()
        done = parent.stop if parent is not None else 0
        first = sequences[ranked[low]]
        shared, children = (len(first), []) if high - low == 1 else _split(common, low, high)
        saves = not children or (shared - done) * (high - low - 1) >= MIN_SAVED
        if saves and shared > done:
            parent = Span(first[done:shared], done, parent)
            spans.append(parent)
        for i in range(low, high) if not children else ():
            last[ranked[i]] = parent
        runs += [(a, b, parent) for a, b in reversed(children)]
    assert all(span is not None for span in last)
    return spans, [span for span in last if span is not None]


def _sorted(sequences: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """(indices by tokens, the common length of each with its predecessor)."""
    ranked = sorted(range(len(sequences)), key=lambda i: sequences[i].tolist())
    common = [0, *(_common(sequences[a], sequences[b]) for a, b in pairwise(ranked))]
    return ranked, common


def _common(a: torch.Tensor, b: torch.Tensor) -> int:
    n = min(len(a), len(b))
    different = (a[:n] != b[:n]).nonzero()
    return int(different[0]) if len(different) else n


def _split(common: list[int], low: int, high: int) -> tuple[int, list[tuple[int, int]]]:
    """(tokens that all of a run of two or more share, the runs that it falls into after those)."""
    shared = min(common[low + 1 : high])
    borders = [low, *(i for i in range(low + 1, high) if common[i] == shared), high]
    return shared, list(pairwise(borders))
