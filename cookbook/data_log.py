"""rollouts/<name>-<step>.jsonl of a run without rollouts: some sequences token by token, for the report to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook import records

if TYPE_CHECKING:
    from cookbook.token_texts import TokenTexts
    from core import Datum, ForwardBackwardOutput

ROWS = 8  # of one file
TOKENS = 4096  # of them together; longer rows are cut


def write_data(
    run_dir: Path,
    step: int,
    name: str,
    data: Sequence[Datum],
    output: ForwardBackwardOutput | None,
    texts_of: TokenTexts,
    about: Sequence[Mapping[str, object]] = (),
) -> Path:
    """The first few of `data` with the trained tokens marked, and their logprobs where `output` has them.

    `about` adds to each row what else is known of it, such as {"pair": 0, "side": "chosen"}. Resume cuts files of later
    steps.
    """
    file = run_dir / "rollouts" / f"{name}-{step:06d}.jsonl"
    file.parent.mkdir(exist_ok=True)
    rows, room = [], TOKENS
    for index, datum in enumerate(data[:ROWS]):
        if room <= 0:
            break
        logprobs = output.loss_fn_outputs[index]["logprobs"].tolist() if output else None
        shown = _row(datum, logprobs, texts_of, room)
        rows.append({**(about[index] if about else {}), **shown})
        room -= len(shown["tokens"])
    records.write_rows(file, rows)
    return file


def _row(datum: Datum, logprobs: Sequence[float] | None, texts_of: TokenTexts, room: int) -> records.Row:
    """Whole tokens: the inputs and the last target. `logprobs` are of trained tokens only, null elsewhere."""
    targets, weights = (datum.loss_fn_inputs[key] for key in ("target_tokens", "weights"))
    tokens = [*datum.model_input.to_ints(), int(targets[-1])]
    trained = [0, *(int(weight != 0) for weight in weights.tolist())]
    texts = texts_of(tokens[:room])
    row: records.Row = {"length": len(tokens), "tokens": tokens[:room], "texts": texts, "trained": trained[:room]}
    if logprobs is not None:
        row["logprobs"] = [round(lp, 3) if is_trained else None
                           for lp, is_trained in zip([0.0, *logprobs], trained, strict=True)][:room]  # fmt: skip
    return row
