"""What is exported: the adapter that a word on the command line names, its base model, and the run it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook.config import ModelConfig
from cookbook.errors import UsageError
from cookbook.run_reader import PastRun, read_run
from cookbook.service import adapter_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from cookbook.renderers import Renderer


@dataclass(frozen=True)
class Subject:
    """An adapter and its base. `run` is None for an adapter directory that belongs to no run."""

    name: str  # what to call it: "my-run, step 40"
    model: ModelConfig
    adapter: Path
    run: PastRun | None = None
    step: int | None = None


def find_subject(target: str, checkpoint: str = "newest") -> Subject:
    """The adapter of a run (its newest, best or given checkpoint), of a tinker:// URI, or of an adapter directory."""
    if target.startswith("tinker://"):
        adapter = adapter_directory(target).absolute()
    elif (Path(target) / "adapter_config.json").is_file():
        adapter = Path(target).absolute()
    else:
        run = read_run(target)
        return _of_run(run, run.adapter(_which(checkpoint)))
    directory = next((parent for parent in adapter.parents if (parent / "checkpoints.jsonl").is_file()), None)
    if directory is not None:
        return _of_run(read_run(directory), adapter)
    from core import checkpoints

    try:
        return Subject(target, ModelConfig(name=checkpoints.read_base_model(adapter)), adapter)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _which(checkpoint: str):
    if checkpoint in ("newest", "best"):
        return checkpoint
    if not checkpoint.isdigit():
        raise UsageError(f"--checkpoint {checkpoint}: expected newest, best, or the step of a checkpoint")
    return int(checkpoint)


def _of_run(run: PastRun, adapter: Path) -> Subject:
    section = run.config.get("model")
    known = {field.name for field in fields(ModelConfig)}
    values = {key: value for key, value in section.items() if key in known} if isinstance(section, Mapping) else {}
    if not values.get("name"):
        raise UsageError(f"{run.name}: its config.yaml names no model, so there is no base to add its adapter to")
    rows = ((row["step"], run.directory / str(row["path"])) for row in run.checkpoints)
    step = next((step for step, path in rows if path.resolve() == adapter.resolve()), None)
    going = " of a run still going" if run.state == "running" else ""
    return Subject(f"{run.name}, step {step}{going}", ModelConfig(**values), adapter, run, step)


def base_directory(name: str) -> Path:
    """Where the base's files lie; those of a hub id are fetched when they are not here. Raises UsageError."""
    from core.models import ModelNotFound, hub_answers, local_model

    try:
        source = local_model(name)
    except ModelNotFound as error:
        raise UsageError(str(error)) from error
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json", "*.jinja"]
        return Path(snapshot_download(source, allow_patterns=wanted, local_files_only=not hub_answers()))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UsageError(
            f"model '{name}' is not on this machine and could not be fetched: {str(error).splitlines()[0]}"
        ) from error


def tokenizer_of(renderer: Renderer) -> PreTrainedTokenizerFast:
    """The base's tokenizer with the chat template, thinking switch included, that the adapter was trained with."""
    import copy

    tokenizer = copy.copy(renderer.tokenizer)
    template = renderer.template or tokenizer.get_chat_template()
    if renderer.thinking is not None:
        value = str(renderer.thinking).lower()
        template = f"{{%- if enable_thinking is not defined %}}{{%- set enable_thinking = {value} %}}{{%- endif %}}{template}"
    tokenizer.chat_template = template
    return tokenizer
