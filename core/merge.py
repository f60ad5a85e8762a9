"""An adapter added into its base, tensor by tensor: W + (alpha / rank) B A in fp32, rounded once to the base's dtype.

Nothing holds the whole model: tensors are named and sized from the files' headers, then read, merged and let go one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from core.checkpoints import DamagedCheckpoint, read_lora_config
from core.peft_adapter import read_peft_config, scale_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the merged model, before it is made."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int


class Merged:
    """The weights of the model directory `base` with those of the adapter directory added (None: the base itself).

    Raises ValueError when the base is not in safetensors files, or has no weight for a matrix of the adapter.
    """

    def __init__(self, base: Path, adapter: Path | None) -> None:
        self.base, self.adapter = base, adapter
        self.config: dict = json.loads((base / "config.json").read_text(encoding="utf-8"))
        self._file_of = _files(base)
        if adapter:
            read_lora_config(adapter)  # refuses what is no plain LoRA
            self._peft_config = read_peft_config(adapter)
        self._adapted = _adapted(adapter) if adapter else set()
        self.tied = bool(self.config.get("tie_word_embeddings")) and "lm_head" not in self._adapted
        lacking = sorted(name for name in self._adapted if self._source(f"{name}.weight") not in self._file_of)
        if lacking:
            raise ValueError(f"{base} has no weight for {len(lacking)} matrices of the adapter, first {lacking[0]}")

    @property
    def untied(self) -> bool:
        """Whether the base shares its embedding with the head, and the adapter needs a head of its own."""
        return bool(self.config.get("tie_word_embeddings")) and not self.tied

    @property
    def rounding(self) -> str:
        """What merged weights are rounded to: bf16, f16, or exact for fp32."""
        with safe_open(self._file_of[EMBEDDING], "pt") as opened:
            dtype = opened.get_slice(EMBEDDING).get_dtype()
        return {"BF16": "bf16", "F16": "f16"}.get(dtype, "exact")

    @cached_property
    def tensors(self) -> list[TensorInfo]:
        """All of them in the order of the base's files; a head that was shared comes last."""
        names = [name for name in self._file_of if not (self.tied and name == HEAD)]
        if self.untied and HEAD not in names:
            names.append(HEAD)
        found = []
        for file in dict.fromkeys(self._file_of[self._source(name)] for name in names):
            with safe_open(file, "pt") as opened:
                for name in (name for name in names if self._file_of[self._source(name)] == file):
                    part = opened.get_slice(self._source(name))
                    shape = tuple(part.get_shape())
                    found.append(TensorInfo(name, shape, _BYTES[part.get_dtype()] * torch.Size(shape).numel()))
        return sorted(found, key=lambda info: info.name == HEAD and self.untied)

    def read(self, name: str) -> torch.Tensor:
        """The merged tensor in the base's dtype, in memory of its own."""
        source = self._source(name)
        with safe_open(self._file_of[source], "pt") as opened:
            weight = opened.get_tensor(source)
            module = name.removesuffix(".weight")
            if module not in self._adapted:
                return weight.clone()
            a, b = self._factors(module)
            if (b.shape[0], a.shape[1]) != tuple(weight.shape):
                raise ValueError(f"{name} is {list(weight.shape)} in {self.base}, the adapter's is {[b.shape[0], a.shape[1]]}")
            return weight.float().addmm_(b.float(), a.float(), alpha=scale_of(self._peft_config, len(a))).to(weight.dtype)

    def _factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.adapter is not None
        with safe_open(self.adapter / "adapter_model.safetensors", "pt") as opened:
            a, b = (opened.get_tensor(f"{_PREFIX}{module}.lora_{which}.weight").clone() for which in "AB")
        return a, b

    def _source(self, name: str) -> str:
        """Where the base keeps it: a shared head is the embedding."""
        return EMBEDDING if name == HEAD and self.config.get("tie_word_embeddings") else name


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}


def in_shards(tensors: Sequence[TensorInfo], max_bytes: int) -> Iterator[list[TensorInfo]]:
    """Consecutive tensors of at most `max_bytes` together; a larger one is alone."""
    shard: list[TensorInfo] = []
    for info in tensors:
        if shard and sum(other.num_bytes for other in shard) + info.num_bytes > max_bytes:
            yield shard
            shard = []
        shard.append(info)
    yield shard


def _files(base: Path) -> dict[str, Path]:
    """Tensor name -> its file, in order."""
    index = base / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: base / file for name, file in names.items()}
    else:
        single = base / "model.safetensors"
        if not single.is_file():
            raise ValueError(f"{base} holds neither model.safetensors nor its index: only safetensors can be merged")
        with safe_open(single, "pt") as opened:
            files = dict.fromkeys(opened.keys(), single)
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise ValueError(f"{base} lacks {len(missing)} of its files, first {missing[0]}")
    return files


def _adapted(adapter: Path) -> set[str]:
    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as opened:
            keys = list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"checkpoint {adapter} is damaged: adapter_model.safetensors: {error}") from error
    return {key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in keys}
