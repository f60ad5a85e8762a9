"""Preference rows become batches: pairs of replies, or replies with a verdict, rendered, split and ordered."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from cookbook.config import DataConfig
from cookbook.data import Batches, ExampleRenderer, TokenSequence, content_hash, examples_of, interleave, renamed, split_rows
from cookbook.errors import UsageError
from cookbook.pair_formats import Reply, describe, is_preference, read_pair, read_rated
from cookbook.row_report import RowReport
from cookbook.rows import RowProblem
from cookbook.sources import Source, open_sources

if TYPE_CHECKING:
    from rich.console import Console

    from core import Datum


UNPAIRED = ("dpo/kto",)  # recipes that take single replies


class Unit(Protocol):
    """What a preference recipe draws its batches from."""

    @property
    def label(self) -> str: ...  # of its row

    @property
    def kind(self) -> str: ...  # of what is wrong with the rejected reply; "" where the row does not tell

    @property
    def sequences(self) -> tuple[TokenSequence, ...]: ...


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt; only the replies have weights."""

    label: str
    kind: str
    chosen: TokenSequence
    rejected: TokenSequence

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class Rated:
    """One reply and whether it is wanted."""

    label: str
    kind: str
    reply: TokenSequence
    desirable: bool

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        return (self.reply,)


AnyUnit = TypeVar("AnyUnit", Pair, Rated)


class PreferenceData(Generic[AnyUnit]):
    """Batches addressable by step, and held-out units that never occur in them. Both replies of a row stay on one side."""

    def __init__(
        self, rows: list[list[AnyUnit]], report: RowReport, *, seed: int, batch_size: int, eval_rows: int
    ) -> None:
        train, held_out = split_rows(rows, seed, eval_rows, _content)
        self.report = report
        self._train = list(itertools.chain.from_iterable(train))
        self.held_out = list(itertools.chain.from_iterable(held_out))
        self.num_rows = len(self._train)  # units
        self._batches = Batches(report.name, self.num_rows, len(self.held_out), seed, batch_size)
        self.epoch_steps = self._batches.epoch_steps

    def batch(self, step: int) -> list[AnyUnit]:
        return [self._train[i] for i in self._batches.rows(step)]

    def sequences(self, step: int) -> list[TokenSequence]:
        """Those of the units of a step."""
        return [sequence for unit in self.batch(step) for sequence in unit.sequences]

    @property
    def held_out_tokens(self) -> int:
        """Of model input."""
        return sum(len(sequence.tokens) - 1 for unit in self.held_out for sequence in unit.sequences)


def load_pairs(
    config: DataConfig, renderer: ExampleRenderer, *, seed: int, batch_size: int, max_length: int,
    console: Console | None = None,
) -> PreferenceData[Pair]:  # fmt: skip
    """UsageError when there is nothing sound to train on; `max_length` in tokens of prompt and reply."""
    return _load(config, renderer, pair_units, seed, batch_size, max_length, console)


def load_rated(
    config: DataConfig, renderer: ExampleRenderer, *, seed: int, batch_size: int, max_length: int,
    console: Console | None = None,
) -> PreferenceData[Rated]:  # fmt: skip
    """As load_pairs; a pair counts as two rated replies."""
    return _load(config, renderer, rated_units, seed, batch_size, max_length, console)


def _load(
    config: DataConfig, renderer: ExampleRenderer, units: Units[AnyUnit], seed: int, batch_size: int, max_length: int,
    console: Console | None,
) -> PreferenceData[AnyUnit]:  # fmt: skip
    if batch_size < 1 or config.eval_rows < 0:
        raise UsageError(f"batch_size={batch_size} must be at least 1, data.eval_rows={config.eval_rows} at least 0")
    read, name = prepare_preferences(config, renderer, units, max_length)
    report = RowReport(name)
    rows = list(read(report))
    report.refuse_bad(config.max_bad)
    data = PreferenceData(rows, report, seed=seed, batch_size=batch_size, eval_rows=config.eval_rows)
    if console is not None:
        what = "pairs" if data.held_out and isinstance(data.held_out[0], Pair) else "replies"
        split = f"{data.num_rows:,} {what} to train on, {len(data.held_out):,} held out, {data.epoch_steps:,} steps per epoch"
        for line in [*report.lines(), split]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if (table := report.table()) is not None:
            console.print(table)
    return data


def prepare_preferences(
    config: DataConfig, renderer: ExampleRenderer, units: Units[AnyUnit], max_length: int
) -> tuple[Callable[[RowReport], Iterator[list[AnyUnit]]], str]:
    """A function that reads the usable rows from the start, telling a report about each row, and the data's name."""
    if config.streaming:
        raise UsageError("data.streaming=true: preference data is read whole; leave it out, or take a part with data.limit")
    if config.overlong not in ("drop", "truncate", "error"):
        raise UsageError(f"data.overlong={config.overlong}: expected drop, truncate, error")
    sources = open_sources(config)
    name = sources[0].name if len(sources) == 1 else "mixture of " + ", ".join(source.name for source in sources)

    def read(report: RowReport) -> Iterator[list[AnyUnit]]:
        streams = [_usable(source, renderer, config, units, max_length, report) for source in sources]
        return itertools.islice(interleave(streams, [source.weight for source in sources]), config.limit)

    return read, name


def units_in(config: DataConfig) -> Units[Pair] | Units[Rated] | None:
    """How to read the data if its first row is a preference row; for commands that look at data of any kind."""
    for source in open_sources(config) if not config.streaming else ():
        first = next(source.rows(), None)
        value = renamed(first, source) if first is not None else None
        if isinstance(value, dict) and is_preference(value):
            return rated_units if "label" in value else pair_units
    return None


def _usable(
    source: Source, renderer: ExampleRenderer, config: DataConfig, units: Units[AnyUnit], max_length: int, report: RowReport
) -> Iterator[list[AnyUnit]]:
    accepted = 0
    report.used.setdefault(source.name, 0)
    for number, raw in enumerate(source.rows()):
        if accepted == source.limit:
            return
        try:
            value = renamed(raw, source)
            if isinstance(value, RowProblem):
                raise value
            if number == 0 and is_preference(value):
                report.detected.append(f"{source.name}, detected: {describe(value)}")
            found = units(raw.label, value, renderer, config, max_length, report)
        except RowProblem as problem:
            report.reject(raw.label, problem)
            continue
        if found:
            accepted += 1
            report.used[source.name] += 1
            yield found
    if accepted == 0 and report.total == 0:
        raise UsageError(f"{source.name} holds no rows")


class Units(Protocol[AnyUnit]):
    def __call__(
        self, label: str, value: dict[str, object], renderer: ExampleRenderer, config: DataConfig, max_length: int,
        report: RowReport,
    ) -> list[AnyUnit]:  # fmt: skip
        """The units of a row; none when it is too long and data.overlong=drop. RowProblem when it cannot be used."""
        ...


def pair_units(
    label: str, value: dict[str, object], renderer: ExampleRenderer, config: DataConfig, max_length: int, report: RowReport
) -> list[Pair]:
    row = read_pair(value)
    sides = [_sequence(label, reply, renderer, config.train_on) for reply in (row.chosen, row.rejected)]
    kept = _fitted(label, sides, [*row.chosen.fixes, *row.rejected.fixes], row.chosen.prompt, config, max_length, report)
    if kept and content_hash(kept[:1]) == content_hash(kept[1:]):
        raise RowProblem("sides are equal", "once rendered, or cut to max_length")
    return [Pair(label, row.kind, *kept)] if kept else []


def rated_units(
    label: str, value: dict[str, object], renderer: ExampleRenderer, config: DataConfig, max_length: int, report: RowReport
) -> list[Rated]:
    rows = read_rated(value)
    replies = [_sequence(label, row.reply, renderer, config.train_on) for row in rows]
    fixes = [fix for row in rows for fix in row.reply.fixes]
    kept = _fitted(label, replies, fixes, rows[0].reply.prompt, config, max_length, report)
    return [Rated(label, row.kind, reply, row.desirable) for row, reply in zip(rows, kept, strict=True)] if kept else []


def _sequence(label: str, reply: Reply, renderer: ExampleRenderer, train_on: str | None) -> TokenSequence:
    examples = examples_of(reply, renderer, train_on)
    if len(examples) != 1:
        raise RowProblem("cannot be rendered", "the template rewrites earlier replies: data.train_on=last takes the last one")
    model_input, weights = examples[0]
    return TokenSequence(label, array("i", model_input.to_ints()), array("f", weights))


def _fitted(
    label: str, sides: Sequence[TokenSequence], fixes: list[str], prompt: str, config: DataConfig, max_length: int,
    report: RowReport,
) -> list[TokenSequence]:  # fmt: skip
    """The sequences of a row under the policy for long ones; empty when the row is dropped by it."""
    longest = max(len(side.tokens) for side in sides)
    if longest > max_length and config.overlong == "error":
        raise UsageError(
            f"{label}: {longest} tokens, max_length={max_length} and data.overlong=error;"
            " raise max_length, or set data.overlong=drop or truncate"
        )
    if longest > max_length and config.overlong == "drop":
        report.drop_overlong(label, longest, max_length)
        return []
    if longest > max_length:
        fixes.append(f"cut to max_length={max_length}")
    kept = [TokenSequence(label, side.tokens[:max_length], side.weights[:max_length]) for side in sides]
    if not all(any(side.weights[1:]) for side in kept):
        raise RowProblem("no trained tokens", f"none of a reply in the first {max_length} tokens")
    report.accept(label, tuple(dict.fromkeys(fixes)), prompt)
    for side in kept:
        report.measure(side)
    return kept


def mismatched(replies: Sequence[TokenSequence], max_length: int) -> list[Datum]:
    """Each prompt with the next reply that is to another prompt, cut to max_length tokens; none where all have one prompt."""
    data = []
    prompts = [reply.tokens[: _first_weight(reply)] for reply in replies]
    for i, one in enumerate(replies):
        order = [*range(i + 1, len(replies)), *range(i)]
        place = next((j for j in order if prompts[j] != prompts[i]), None)
        if place is None:
            continue
        other, end, start = replies[place], len(prompts[i]), len(prompts[place])
        tokens, weights = one.tokens[:end] + other.tokens[start:], one.weights[:end] + other.weights[start:]
        data.append(TokenSequence(one.label, tokens[:max_length], weights[:max_length]).datum())
    return data


def _first_weight(sequence: TokenSequence) -> int:
    return next(i for i, weight in enumerate(sequence.weights) if weight)


def _content(row: Sequence[Unit]) -> int:
    return content_hash([sequence for unit in row for sequence in unit.sequences])
