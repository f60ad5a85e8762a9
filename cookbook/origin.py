"""What a run starts from, settled when it begins: a copy of the adapter that `init_from` meant then, or its URI on a server.

The run that it came from may train on, prune that checkpoint or be deleted; references and evaluations stay where they were.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook import records
from cookbook.errors import UsageError
from cookbook.remote_adapter import fetched
from cookbook.service import start_of

if TYPE_CHECKING:
    from cookbook.config import LoraConfig
    from cookbook.run import Run
    from cookbook.run_reader import PastRun
    from cookbook.service import Service

FOLDER = "origin"  # in the run directory
FILES = ("adapter_config.json", "adapter_model.safetensors")
STATE = "state.json"  # only checkpoints of ours have it


def settle(run: Run, service: Service, lora: LoraConfig, init_from: str | None) -> str | None:
    """What the service loads the run's start from, in every session of the run; None: a fresh adapter.

    Ask it once the run has resumed. The adapter's own rank and targets go into the config.yaml of a new run: UsageError where
    others were typed. A run begun by an earlier version kept nothing and looks at `init_from` anew.
    """
    from core.clients import ServiceClient

    if init_from is None:
        return None
    is_local, kept = isinstance(service, ServiceClient), run.dir / FOLDER
    if is_local and kept.is_dir():
        return str(kept)
    known = json.loads((run.dir / "run.json").read_text()).get("origin")
    if known or run.checkpoints.rows:
        return known or init_from
    source = start_of(service, init_from)
    if isinstance(source, Path):
        source = source.absolute()
        _record_lora(run, source, lora, init_from)
        _copy(source, kept, init_from)
    records.amend(run.dir / "run.json", origin=str(source))
    run.note(f"starting from {source}")
    return str(kept if is_local else source)


def _record_lora(run: Run, source: Path, lora: LoraConfig, init_from: str) -> None:
    from cookbook.run_record import typed_keys
    from core.checkpoints import read_lora_config

    typed = typed_keys(run.dir)
    try:
        own = read_lora_config(source)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error
    for name in ("rank", "train_attn", "train_mlp", "train_unembed"):
        key, asked, has = f"lora.{name}", getattr(lora, name), getattr(own, name)
        if asked != has and key in typed:
            raise UsageError(f"{key}={asked}, but init_from={init_from} has {has}, which it keeps: leave {key} out")
        if asked != has:
            run.record(key, has)


def _copy(source: Path, kept: Path, init_from: str) -> None:
    from core.checkpoints import write_atomically

    def fill(directory: Path) -> None:
        for name in [*FILES, *([STATE] if (source / STATE).exists() else [])]:
            shutil.copyfile(source / name, directory / name)

    try:
        write_atomically(kept, fill)
    except OSError as error:
        raise UsageError(f"init_from={init_from}: {source} cannot be copied to {kept}: {error.strerror}") from error


def adapter_of(past: PastRun) -> str | None:
    """The adapter that the run started from, on this machine; one on a server is fetched. None: the base model."""
    init_from, known, kept = past.config.get("init_from"), past.run.get("origin"), past.directory / FOLDER
    if init_from is None:
        return None
    if kept.is_dir():
        return str(kept)
    if str(known).startswith("tinker://"):
        return str(fetched(past.directory, past.config.get("service"), str(known), kept))
    return str(init_from)


def of_rerun(past: PastRun) -> str | None:
    """The `init_from` with which another run starts where this one did."""
    kept = past.directory / FOLDER
    is_local = past.config.get("service", "local") == "local"
    return str(kept) if is_local and kept.is_dir() else past.run.get("origin") or past.config.get("init_from")
