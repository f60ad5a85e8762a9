"""What is exported: the adapter that a word on the command line names, its base model, and the run it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook.config import ModelConfig
from cookbook.errors import UsageError
from cookbook.past_policy import find_policy
from cookbook.run_reader import PastRun

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
    found = find_policy(target, checkpoint)
    if found.adapter is None:
        raise UsageError(f"{target}: a base model has no adapter to take away; name a run, a tinker:// URI, an adapter")
    name = f"{found.run.name}, step {found.step}" if found.run else found.name
    return Subject(name, found.model, found.adapter, found.run, found.step)


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
