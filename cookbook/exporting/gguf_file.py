"""The merged model as one GGUF file (F16 or Q8_0) for llama.cpp and what builds on it; Llama, Qwen2 and Qwen3 kinds.

Written tensor by tensor. llama.cpp rotates neighbouring pairs in the Llama kind, transformers two halves: rows of its
q and k are moved accordingly (the Qwen kinds rotate halves in both).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from cookbook.errors import UsageError
from cookbook.exporting.gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    from cookbook.renderers import Renderer
    from core.merge import Merged, TensorInfo

Quantize: TypeAlias = Literal["f16", "q8_0"]

KINDS = ("llama", "qwen2", "qwen3")
BLOCK = 32  # values that share a scale in Q8_0


def write_gguf(merged: Merged, renderer: Renderer, file: Path, name: str, quantize: Quantize, source: Path | None) -> None:
    """`source` is the GGUF file that the base came from, whose tokenizer is copied. Raises UsageError for what cannot be."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    kind, config = check_kind(merged.config), merged.config
    num_layers = int(config["num_hidden_layers"])
    arch = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}[kind]
    names = get_tensor_name_map(arch, num_layers)
    writer = GGUFWriter(file, kind)
    try:
        writer.add_name(name)
        _write_shapes(writer, config, kind, quantize)
        write_tokenizer(writer, renderer, int(config["vocab_size"]), source)
        for info in merged.tensors:
            theirs = names.get_name(info.name, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise UsageError(f"--format gguf: the {kind} kind of GGUF has no place for {info.name}")
            dtype = _dtype(info, quantize)
            writer.add_tensor_info(theirs, *_layout(info, dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for info in merged.tensors:
            weight = _permuted(merged.read(info.name).float(), info.name, config) if kind == "llama" else merged.read(info.name)
            writer.write_tensor_data(_packed(weight.float(), info.name, _dtype(info, quantize)))
    finally:
        writer.close()


def check_kind(config: dict) -> str:
    """The model type, if a GGUF of it would compute the same. Raises UsageError that names what would be lost."""
    kind = config.get("model_type", "")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        raise UsageError(f"--format gguf writes the kinds {', '.join(KINDS)}, not {kind}: take --format merged")
    if rope_type != "default":
        raise UsageError(f"--format gguf does not write rope_type={rope_type}: take --format merged, and llama.cpp's converter")
    if config.get("mlp_bias"):
        raise UsageError("--format gguf does not write mlp_bias=true: take --format merged")
    return kind


def _write_shapes(writer: GGUFWriter, config: dict, kind: str, quantize: Quantize) -> None:
    from gguf import LlamaFileType

    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if quantize == "q8_0" else LlamaFileType.MOSTLY_F16)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if kind == "llama":
        writer.add_vocab_size(int(config["vocab_size"]))


def _rope_theta(config: dict) -> float:
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _dtype(info: TensorInfo, quantize: Quantize) -> GGMLQuantizationType:
    """Vectors (norms, biases) stay F32; rows that are no whole number of blocks stay F16."""
    from gguf import GGMLQuantizationType

    if len(info.shape) == 1:
        return GGMLQuantizationType.F32
    whole = info.shape[-1] % BLOCK == 0
    return GGMLQuantizationType.Q8_0 if quantize == "q8_0" and whole else GGMLQuantizationType.F16


def _layout(info: TensorInfo, dtype: GGMLQuantizationType) -> tuple:
    """Shape, numpy dtype, size in bytes and raw dtype as `add_tensor_info` wants them (of packed rows: their bytes)."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    if dtype == GGMLQuantizationType.Q8_0:
        shape = quant_shape_to_byte_shape(info.shape, dtype)
        return shape, np.dtype(np.uint8), int(np.prod(shape)), dtype
    kind = np.dtype(np.float32 if dtype == GGMLQuantizationType.F32 else np.float16)
    return info.shape, kind, int(np.prod(info.shape)) * kind.itemsize, dtype


def _packed(weight: torch.Tensor, name: str, dtype: GGMLQuantizationType) -> np.ndarray:
    from gguf import GGMLQuantizationType, quantize

    largest = float(weight.abs().max())
    if dtype != GGMLQuantizationType.F32 and not largest <= np.finfo(np.float16).max:
        raise UsageError(f"--format gguf: {name} reaches {largest:g}, which F16 cannot hold: take --format merged")
    return quantize(weight.numpy(), dtype)


def _permuted(weight: torch.Tensor, name: str, config: dict) -> torch.Tensor:
    """Rows of each head from [half, pair] to [pair, half]; weights [heads * size, d_in] and biases [heads * size]."""
    if ".q_proj." in name:
        heads = int(config["num_attention_heads"])
    elif ".k_proj." in name:
        heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    else:
        return weight
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
