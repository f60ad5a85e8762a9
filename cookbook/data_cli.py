"""`cook data check` and `cook data show`: what a run would train on, before it does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cookbook.config import DataConfig, ModelConfig
from cookbook.data import StoredData, TokenSequence, prepare
from cookbook.errors import UsageError
from cookbook.preferences import PreferenceData, prepare_preferences, units_in
from cookbook.row_report import RowReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from cookbook.renderers import Renderer

STREAM_ROWS = 1000  # of a stream are checked
TRAINED_STYLE = "bold green"


class RecipeConfig(Protocol):
    """The keys of a recipe's Config that data needs."""

    seed: int
    batch_size: int
    max_length: int
    model: ModelConfig
    data: DataConfig


def check(config: RecipeConfig, console: Console) -> int:
    """Read all rows and print what was found. Exit code: 0, or 2 when a run would refuse to start on them."""
    return check_rows(config, _renderer(config), console)


def show(config: RecipeConfig, rows: int, console: Console) -> None:
    """Print the first `rows` usable rows as the model sees them, trained tokens coloured (or in [[brackets]])."""
    show_rows(config, _renderer(config), rows, console)


def _renderer(config: RecipeConfig) -> Renderer:
    from cookbook.renderers import load_renderer

    return load_renderer(config.model)


def check_rows(config: RecipeConfig, renderer: Renderer, console: Console) -> int:
    data = config.data
    if data.overlong == "error":  # a check counts them all
        data = dataclasses.replace(data, overlong="drop")
    if data.streaming and data.limit is None:
        data = dataclasses.replace(data, limit=STREAM_ROWS)
        console.print(f"streaming: checking the first {STREAM_ROWS:,} usable rows", highlight=False)
    units = units_in(data)
    read, name = _reader(data, renderer, config.max_length, units)
    report = RowReport(name)
    found = list(read(report))
    for line in report.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if report.duplicate_prompts:
        console.print(
            f"duplicate prompts: {report.duplicate_prompts:,} (what an earlier row asks already)", highlight=False
        )
    if (table := report.table()) is not None:
        console.print(table)
    try:
        report.refuse_bad(data.max_bad)
        if config.data.overlong == "error" and report.overlong:
            raise UsageError(
                f"rows longer than max_length={config.max_length}: {report.overlong}, and data.overlong=error;"
                " raise max_length, or set data.overlong=drop or truncate"
            )
        sizes = {"seed": config.seed, "batch_size": config.batch_size, "eval_rows": data.eval_rows}
        split = StoredData(found, report, **sizes) if units is None else PreferenceData(found, report, **sizes)
    except UsageError as error:
        console.print(f"a run would refuse: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    steps = f"{split.epoch_steps:,} steps of {config.batch_size} per epoch"
    console.print(f"fine: {split.num_rows:,} to train on, {len(split.held_out):,} held out, {steps}", highlight=False)
    return 0


def show_rows(config: RecipeConfig, renderer: Renderer, rows: int, console: Console) -> None:
    units = units_in(config.data)
    read, name = _reader(config.data, renderer, config.max_length, units)
    report = RowReport(name)
    shown = list(itertools.islice(read(report), rows))
    for line in report.detected:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not shown:
        report.refuse_bad(config.data.max_bad)
    found = itertools.chain.from_iterable(shown)
    sequences = list(found) if units is None else [sequence for unit in found for sequence in unit.sequences]
    print_sequences(sequences, renderer, console)


def _reader(config: DataConfig, renderer: Renderer, max_length: int, units: Any) -> tuple[Callable[..., Iterator], str]:
    """Of supervised rows, or of preferences, whose rows are lists of units."""
    if units is None:
        return prepare(config, renderer, max_length)
    return prepare_preferences(config, renderer, units, max_length)


def print_sequences(sequences: Sequence[TokenSequence], renderer: Renderer, console: Console) -> None:
    """Each sequence as the model sees it under a line of counts, and how trained tokens are marked."""
    from rich.text import Text

    coloured = console.color_system is not None and not console.no_color
    for sequence in sequences:
        trained = _trained(sequence)
        share = sum(trained) / len(trained)
        head = f"{sequence.label}: {len(trained):,} tokens, {sum(trained):,} trained ({share:.0%})"
        console.rule(Text(head), align="left")
        console.print(_marked(sequence, trained, renderer, coloured), soft_wrap=True)
    mark = Text("coloured", style=TRAINED_STYLE) if coloured else Text("[[in brackets]]")
    console.print(Text.assemble("trained tokens are ", mark), highlight=False)


def _trained(sequence: TokenSequence) -> list[bool]:
    """Per token; the first is never trained, nothing comes before it."""
    return [i > 0 and weight > 0 for i, weight in enumerate(sequence.weights)]


def _marked(sequence: TokenSequence, trained: list[bool], renderer: Renderer, coloured: bool) -> Text:
    """The decoded text; runs of one kind are decoded together, so that characters of several tokens stay whole."""
    from rich.text import Text

    text = Text()
    for is_trained, run in itertools.groupby(zip(sequence.tokens, trained, strict=True), key=lambda pair: pair[1]):
        decoded = renderer.decode([token for token, _ in run])
        if is_trained and not coloured:
            decoded = f"[[{decoded}]]"
        text.append(decoded, style=TRAINED_STYLE if is_trained else "")
    return text
