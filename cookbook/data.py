"""Rows become batches of Datum: read, judged, rendered, split and ordered; a batch is addressed by its step."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from cookbook.config import DataConfig
from cookbook.errors import UsageError
from cookbook.keys import did_you_mean
from cookbook.row_formats import Chat, Completion, Row, detect, rename
from cookbook.row_report import RowReport
from cookbook.rows import RawRow, RowProblem
from cookbook.sources import Source, open_sources

if TYPE_CHECKING:
    from rich.console import Console

    from core.datum import Datum, ModelInput

DETECT_ROWS = 32  # looked at to find the format of a source
SHUFFLE_ROWS = 1000  # sequences in the shuffle buffer of a stream
HELD_OUT_SHARE = 0.2  # of the rows, at most
KEPT_BATCHES = 8  # of a stream, for `rows_of` after a later batch was asked for
TRAIN_ON = ("last", "all", "everything", "flags")
OVERLONG = ("drop", "truncate", "error")

AnyRow = TypeVar("AnyRow")
Say = Callable[[str], None]
Example = tuple["ModelInput", list[float]]  # tokens and, for each, its weight as a target


class ExampleRenderer(Protocol):
    """The part of cookbook.renderers.Renderer that data needs. ValueError: this row cannot be rendered."""

    def build_supervised_examples(
        self, messages: list[dict], train_on: str = "all", tools: list[dict] | None = None
    ) -> list[Example]: ...

    def build_completion_example(self, prompt: str, completion: str) -> Example: ...

    def build_text_example(self, text: str) -> Example: ...


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One training sequence, compact: 8 bytes a token."""

    label: str  # of its row
    tokens: array  # int32 [N]
    weights: array  # float32 [N], of each token as a target

    def datum(self) -> Datum:
        from cookbook.renderers import datum_from
        from core.datum import ModelInput

        return datum_from(ModelInput.from_ints(self.tokens.tolist()), self.weights.tolist())


TokenRow = list[TokenSequence]  # usually one; one per reply where the template rewrites history


class SupervisedData(ABC):
    """Training batches addressable by step, and held-out data that never occurs in them."""

    report: RowReport
    held_out: list[Datum]
    num_rows: int | None  # training sequences; None for a stream
    epoch_steps: int | None  # full batches per pass; None for a stream

    @property
    def held_out_tokens(self) -> int:
        """Of model input."""
        return sum(datum.model_input.length for datum in self.held_out)

    @abstractmethod
    def sequences(self, step: int) -> Sequence[TokenSequence]:
        """The batch of a step, `batch_size` sequences; the same for the same step, whatever was asked before."""

    def batch(self, step: int) -> list[Datum]:
        return [sequence.datum() for sequence in self.sequences(step)]

    def rows_of(self, step: int) -> list[str]:
        """Where the rows of a batch stand: "my.jsonl:12" or "no_robots[7]"."""
        return [sequence.label for sequence in self.sequences(step)]


class Batches:
    """Which of `num_rows` rows a step takes: each epoch a seeded permutation, its incomplete last batch left out."""

    def __init__(self, name: str, num_rows: int, num_held_out: int, seed: int, batch_size: int) -> None:
        self._num_rows, self._seed, self._batch_size = num_rows, seed, batch_size
        self._orders: OrderedDict[int, list[int]] = OrderedDict()
        self.epoch_steps = num_rows // batch_size
        if self.epoch_steps == 0:
            held = f" ({num_held_out} more are held out)" if num_held_out else ""
            raise UsageError(
                f"{name}: {num_rows} training rows{held} are fewer than batch_size={batch_size};"
                " lower batch_size, or bring more rows"
            )

    def rows(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.epoch_steps)
        start = position * self._batch_size
        return self._order(epoch)[start : start + self._batch_size]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(self._num_rows))
            random.Random(f"order {self._seed} {epoch}").shuffle(order)
            self._orders[epoch] = order
            if len(self._orders) > 2:  # the next batch is asked for before the last one of an epoch is done with
                self._orders.popitem(last=False)
        return self._orders[epoch]


class StoredData(SupervisedData):
    """All rows tokenised in memory; each epoch is a seeded permutation, its incomplete last batch is left out."""

    def __init__(self, rows: list[TokenRow], report: RowReport, *, seed: int, batch_size: int, eval_rows: int) -> None:
        train, held_out = split_rows(rows, seed, eval_rows, content_hash)
        self.report = report
        self.held_out = [sequence.datum() for row in held_out for sequence in row]
        self._train = [sequence for row in train for sequence in row]
        self.num_rows = len(self._train)
        self._batches = Batches(report.name, self.num_rows, len(held_out), seed, batch_size)
        self.epoch_steps = self._batches.epoch_steps

    def sequences(self, step: int) -> Sequence[TokenSequence]:
        return [self._train[i] for i in self._batches.rows(step)]


class StreamedData(SupervisedData):
    """Rows read as training goes, shuffled in a buffer; after its end a source is read again in another order.

    The first `eval_rows` usable rows are held out. A step out of turn (a resume) reads from the start and skips.
    `report` speaks of the rows read so far on the first pass.
    """

    num_rows = None
    epoch_steps = None

    def __init__(
        self,
        read: Callable[[RowReport], Iterator[TokenRow]],
        name: str,
        say: Say,
        *,
        seed: int,
        batch_size: int,
        config: DataConfig,
    ) -> None:
        self._read, self._say, self._seed, self._batch_size = read, say, seed, batch_size
        self.report = RowReport(name)
        first = list(itertools.islice(read(self.report), config.eval_rows + batch_size))
        self.report.refuse_bad(config.max_bad)
        if len(first) < config.eval_rows + batch_size:
            raise UsageError(
                f"{name}: the stream ends after {len(first)} usable rows, fewer than data.eval_rows={config.eval_rows}"
                f" and one batch of {batch_size}; set data.streaming=false"
            )
        self.held_out = [sequence.datum() for row in first[: config.eval_rows] for sequence in row]
        self._held_out = {content_hash(row) for row in first[: config.eval_rows]}  # repeats of these do not train either
        self._restart()

    def _restart(self) -> None:
        self._batches: OrderedDict[int, list[TokenSequence]] = OrderedDict()
        self._next_step, self._stream = 0, self._sequences_forever()

    def sequences(self, step: int) -> Sequence[TokenSequence]:
        if step not in self._batches and step < self._next_step:
            self._restart()
        while step not in self._batches:
            self._batches[self._next_step] = list(itertools.islice(self._stream, self._batch_size))
            self._next_step += 1
            if len(self._batches) > KEPT_BATCHES:
                self._batches.popitem(last=False)
        return self._batches[step]

    def _watched(self, report: RowReport) -> Iterator[TokenRow]:
        """The rows of a pass, with a line whenever ten times as many have been rejected as when one was last told."""
        told = max(1, report.rejected)
        for row in self._read(report):
            if report.rejected >= 10 * told:
                told = report.rejected
                self._say(f"{report.name}: {report.rejected:,} of {report.total:,} rows rejected so far")
            yield row

    def _sequences_forever(self) -> Iterator[TokenSequence]:
        for epoch in itertools.count():
            report = RowReport(self.report.name)
            if epoch == 0:
                self.report = report
            rows = (row for row in self._watched(report) if content_hash(row) not in self._held_out)
            rng = random.Random(f"stream {self._seed} {epoch}")
            sequences = shuffled((sequence for row in rows for sequence in row), SHUFFLE_ROWS, rng)
            first = next(sequences, None)
            if first is None:
                raise UsageError(f"{self.report.name}: the stream has no rows to train on any more; did the file change?")
            yield first
            yield from sequences


def load_supervised(
    config: DataConfig,
    renderer: ExampleRenderer,
    *,
    seed: int,
    batch_size: int,
    max_length: int,
    console: Console | None = None,
) -> SupervisedData:
    """Read, judge, render and split the rows of `config`. UsageError when there is nothing sound to train on.

    `max_length` is in tokens per sequence; `console` gets a few lines on what was found.
    """
    read, name = prepare(config, renderer, max_length)
    say: Say = partial(console.print, markup=False, highlight=False, soft_wrap=True) if console else lambda line: None
    if batch_size < 1 or config.eval_rows < 0:
        raise UsageError(f"batch_size={batch_size} must be at least 1, data.eval_rows={config.eval_rows} at least 0")
    if config.streaming:
        data: SupervisedData = StreamedData(read, name, say, seed=seed, batch_size=batch_size, config=config)
        lines = [*data.report.detected, f"streaming {name}: the first {config.eval_rows} rows are held out"]
    else:
        report = RowReport(name)
        rows = list(read(report))
        report.refuse_bad(config.max_bad)
        data = StoredData(rows, report, seed=seed, batch_size=batch_size, eval_rows=config.eval_rows)
        split = f"{data.num_rows:,} sequences to train on, {len(data.held_out):,} held out"
        lines = [*report.lines(), f"{split}, {data.epoch_steps:,} steps per epoch"]
    for line in lines:
        say(line)
    if console is not None and (table := data.report.table()) is not None:
        console.print(table)
    return data


def prepare(
    config: DataConfig, renderer: ExampleRenderer, max_length: int
) -> tuple[Callable[[RowReport], Iterator[TokenRow]], str]:
    """A function that reads the usable rows from the start, telling a report about each row, and the data's name."""
    for key, value, known in (("train_on", config.train_on, TRAIN_ON), ("overlong", config.overlong, OVERLONG)):
        if value is not None and value not in known:
            raise UsageError(f"data.{key}={value}: expected {', '.join(known)}{did_you_mean(value, known)}")
    if max_length < 2:
        raise UsageError(f"max_length={max_length}: a sequence needs at least 2 tokens")
    sources = open_sources(config)
    name = sources[0].name if len(sources) == 1 else "mixture of " + ", ".join(source.name for source in sources)

    def read(report: RowReport) -> Iterator[TokenRow]:
        report.name = name
        streams = [usable_rows(source, renderer, config, max_length, report) for source in sources]
        return itertools.islice(interleave(streams, [source.weight for source in sources]), config.limit)

    return read, name


def usable_rows(
    source: Source, renderer: ExampleRenderer, config: DataConfig, max_length: int, report: RowReport
) -> Iterator[TokenRow]:
    """The rows of one source that can be trained on; all others are told to the report."""
    raw_rows = source.rows()
    head = list(itertools.islice(raw_rows, DETECT_ROWS))
    if not head:
        raise UsageError(f"{source.name} holds no rows")
    samples = [value for raw in head if isinstance(value := renamed(raw, source), dict)]
    form = detect(samples, source.columns, source.name)
    if samples:
        report.detected.append(f"{source.name}, detected: {form.describe(samples[0])}")
    report.used.setdefault(source.name, 0)
    accepted = 0
    for raw in itertools.chain(head, raw_rows):
        if accepted == source.limit:
            return
        try:
            value = renamed(raw, source)
            if isinstance(value, RowProblem):
                raise value
            row = form.read_row(value)
            sequences = _token_sequences(
                raw.label, row, examples_of(row, renderer, config.train_on), config, max_length, report
            )
        except RowProblem as problem:
            report.reject(raw.label, problem)
            continue
        if sequences:
            accepted += 1
            report.used[source.name] += 1
            if isinstance(row, Chat) and row.flagged:
                report.count_flags(config.train_on)
            yield sequences


def renamed(raw: RawRow, source: Source) -> dict[str, object] | RowProblem:
    if isinstance(raw.value, RowProblem) or not source.columns:
        return raw.value
    try:
        return rename(raw.value, source.columns)
    except RowProblem as problem:
        return problem


def examples_of(row: Row, renderer: ExampleRenderer, train_on: str | None) -> list[Example]:
    """Without `train_on` the flags of a row's messages say what is trained; a row without flags trains all its replies."""
    try:
        if isinstance(row, Chat):
            messages, by_flags = row.messages, train_on is None and row.flagged
            if row.completion_from and train_on in (None, "all"):  # as with raw text: the completion, not its history
                parts = [i >= row.completion_from and m["role"] == "assistant" for i, m in enumerate(messages)]
                pairs = zip(messages, parts, strict=True)
                messages = [m if part and by_flags else {**m, "train": part} for m, part in pairs]
                by_flags = True
            return renderer.build_supervised_examples(messages, "flags" if by_flags else train_on or "all", row.tools)
        if isinstance(row, Completion):
            return [renderer.build_completion_example(row.prompt, row.completion)]
        return [renderer.build_text_example(row.text)]
    except ValueError as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        reason = "no trained tokens" if "no trained tokens" in first_line else "cannot be rendered"
        raise RowProblem(reason, first_line) from error


def _token_sequences(
    label: str, row: Row, examples: list[Example], config: DataConfig, max_length: int, report: RowReport
) -> TokenRow:
    """The sequences of a row after the policy for overlong ones; empty when it was dropped by that policy."""
    if not examples:
        raise RowProblem("no trained tokens")
    fixes, kept = list(row.fixes), []
    longest = max(model_input.length for model_input, _ in examples)
    if longest > max_length and config.overlong == "error":
        raise UsageError(
            f"{label}: {longest} tokens, max_length={max_length} and data.overlong=error;"
            " raise max_length, or set data.overlong=drop or truncate"
        )
    for model_input, weights in examples:
        if model_input.length <= max_length or config.overlong == "truncate":
            tokens = array("i", model_input.to_ints()[:max_length])
            kept.append(TokenSequence(label, tokens, array("f", weights[:max_length])))
    if not kept:
        report.drop_overlong(label, longest, max_length)
        return []
    if longest > max_length:
        fixes.append(
            f"cut to max_length={max_length}" if config.overlong == "truncate" else f"a part over {max_length} left out"
        )
    kept = [sequence for sequence in kept if any(sequence.weights[1:])]  # nothing predicts the first token
    if not kept:
        raise RowProblem("no trained tokens", f"none in the first {max_length} tokens" if longest > max_length else "")
    report.accept(label, tuple(fixes), row.prompt)
    for sequence in kept:
        report.measure(sequence)
    return kept


def content_hash(row: TokenRow) -> int:
    return hash(tuple(sequence.tokens.tobytes() for sequence in row))


def split_rows(
    rows: list[AnyRow], seed: int, eval_rows: int, content: Callable[[AnyRow], int]
) -> tuple[list[AnyRow], list[AnyRow]]:
    """(train, held out): the last `eval_rows` of the seed-shuffled rows, at most a fifth; repeated rows stay."""
    order = list(range(len(rows)))
    random.Random(f"held out {seed}").shuffle(order)
    contents = [content(row) for row in rows]
    times = Counter(contents)
    wanted = min(eval_rows, int(HELD_OUT_SHARE * len(rows)))
    held = set(itertools.islice((i for i in reversed(order) if times[contents[i]] == 1), wanted))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in order if i in held]


def interleave(streams: Sequence[Iterator[AnyRow]], weights: Sequence[float]) -> Iterator[AnyRow]:
    """Always the stream that is furthest behind its share; ends with the first stream, so no row is used twice."""
    taken = [0] * len(streams)
    while True:
        behind = min(range(len(streams)), key=lambda i: (taken[i] + 0.5) / weights[i])
        row = next(streams[behind], None)
        if row is None:
            return
        taken[behind] += 1
        yield row


def shuffled(items: Iterator[TokenSequence], buffer_size: int, rng: random.Random) -> Iterator[TokenSequence]:
    """Each item once, in an order mixed over `buffer_size` neighbours."""
    buffer = list(itertools.islice(items, buffer_size))
    for item in items:
        at = rng.randrange(len(buffer))
        yield buffer[at]
        buffer[at] = item
    rng.shuffle(buffer)
    yield from buffer
