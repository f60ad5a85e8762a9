"""`cook export`: write beside the target, reload, compare with the engine, and only then rename into place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cookbook.errors import UsageError
from cookbook.exporting.subject import Subject, base_directory, find_subject

if TYPE_CHECKING:
    from rich.console import Console

    from cookbook.exporting.gguf_file import Quantize
    from cookbook.exporting.verify import Difference
    from cookbook.renderers import Renderer

Format: TypeAlias = Literal["peft", "merged", "gguf"]
AS_IT_IS: dict[str, Any] = {
    "markup": False,
    "emoji": False,
    "highlight": False,
    "soft_wrap": True,
}  # of a print: paths have :train:


@dataclass(frozen=True)
class Exported:
    subject: Subject
    folder: Path
    files: dict[str, int]  # name -> bytes
    difference: Difference | None  # None: not checked


def export(
    target: str, to: Path, form: Format, console: Console, checkpoint: str = "newest",
    quantize: Quantize | None = None, verify: bool = True,
) -> Exported:  # fmt: skip
    """Everything in `to`, or nothing. UsageError for a folder with something in it, and for an export that computes another."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"--to {to}: there is something already; name a new or empty folder")
    if quantize and form != "gguf":
        raise UsageError(f"--quantize {quantize} goes with --format gguf, not {form}: add --format gguf, or leave it out")
    subject = find_subject(target, checkpoint)
    try:
        done = _export(subject, to, form, console, quantize or "f16", verify)
    except ValueError as error:  # a base without safetensors, an adapter of another model, a damaged checkpoint
        if isinstance(error, UsageError):
            raise
        raise UsageError(" ".join(str(error).split())) from error
    for name, size in done.files.items():
        console.print(f"  {name}  {size / 1e6:,.1f} MB", **AS_IT_IS)
    console.print(f"exported {subject.name} to {to}", **AS_IT_IS)
    return done


def _export(subject: Subject, to: Path, form: Format, console: Console, quantize: Quantize, verify: bool) -> Exported:
    from cookbook.exporting import verify as checks
    from cookbook.renderers import load_renderer
    from core.checkpoints import write_atomically
    from core.merge import Merged

    base = base_directory(subject.model.name)
    merged = Merged(base, subject.adapter)
    renderer = load_renderer(subject.model)
    if verify:
        checks.check_memory(merged)
    found = checks.reference(subject, renderer) if verify else None
    if merged.untied and form != "peft":
        console.print("the adapter changes the output head: it gets weights of its own, apart from the embedding", **AS_IT_IS)
    difference: Difference | None = None

    def fill(folder: Path) -> None:
        nonlocal difference
        load, allowed = _write(subject, merged, renderer, folder, form, quantize)
        _write_card(subject, folder, form)
        if found is not None:
            difference = checks.compare(found, load, allowed)
            if not difference.passed:
                raise UsageError(f"the export is wrong, nothing is kept: {difference}")

    write_atomically(to, fill)
    console.print(str(difference) if difference else "not checked (--no-verify)", **AS_IT_IS)
    files = {path.name: path.stat().st_size for path in sorted(to.iterdir())}
    return Exported(subject, to, files, difference)


def _write(subject: Subject, merged, renderer: Renderer, folder: Path, form: Format, quantize: Quantize):
    """Write it; how to load it again, and how far its logprobs may be off."""
    from cookbook.exporting import verify as checks
    from cookbook.exporting.gguf_file import write_gguf
    from cookbook.exporting.model_dirs import write_merged, write_peft
    from core.models import gguf_file

    if form == "peft":
        write_peft(subject, renderer, folder)
        return partial(checks.load_peft, folder, merged.base), checks.ALLOWED["exact"]
    if form == "merged":
        write_merged(merged, renderer, folder)
        return partial(checks.load_merged, folder), checks.ALLOWED[merged.rounding]
    file = folder / gguf_name(subject, quantize)
    write_gguf(merged, renderer, file, file.stem, quantize, gguf_file(subject.model.name))
    return partial(checks.load_gguf, file, merged.config), max(checks.ALLOWED[quantize], checks.ALLOWED[merged.rounding])


def gguf_name(subject: Subject, quantize: Quantize) -> str:
    """my-run-000040-f16.gguf"""
    name = subject.run.name.replace("/", "-") if subject.run else subject.adapter.name
    step = f"-{subject.step:06d}" if subject.step is not None else ""
    return f"{name}{step}-{quantize}.gguf"


def _write_card(subject: Subject, folder: Path, form: Format) -> None:
    from cookbook.exporting.card import card

    (folder / "README.md").write_text(card(subject, form), encoding="utf-8")
