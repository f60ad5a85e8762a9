"""Folders that transformers and PEFT load: the adapter beside a tokenizer, or the merged model in shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook.exporting.subject import Subject, tokenizer_of

if TYPE_CHECKING:
    from cookbook.renderers import Renderer
    from core.merge import Merged

SHARD_BYTES = 2_000_000_000
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_peft(subject: Subject, renderer: Renderer, folder: Path) -> None:
    """The adapter's two files as they are, tokenizer and chat template."""
    for name in ADAPTER_FILES:
        shutil.copyfile(subject.adapter / name, folder / name)
    tokenizer_of(renderer).save_pretrained(folder)


def write_merged(merged: Merged, renderer: Renderer, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """safetensors with their index, one shard in memory at a time; config, generation config, tokenizer, chat template."""
    from safetensors.torch import save_file

    from core.merge import in_shards

    shards = list(in_shards(merged.tensors, shard_bytes))
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({info.name: merged.read(info.name) for info in shard}, folder / file, metadata={"format": "pt"})
        files |= {info.name: file for info in shard}
    if len(shards) > 1:
        total = sum(info.num_bytes for info in merged.tensors)
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
    _write_json(folder / "config.json", {**merged.config, "tie_word_embeddings": merged.tied})
    _write_json(folder / "generation_config.json", _generation(merged, renderer))
    tokenizer_of(renderer).save_pretrained(folder)


def _generation(merged: Merged, renderer: Renderer) -> dict:
    """The base's, ending at the template's stop token too: eos_token alone is often another one."""
    file = merged.base / "generation_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ends = values.get("eos_token_id", merged.config.get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    values["eos_token_id"] = list(dict.fromkeys([*renderer.stop, *ends]))
    return values


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
