"""Adapters that PEFT wrote, as this engine holds them: kinds and ranks from the file's tensors, the scale moved into B.

PEFT computes W + s B A with s = lora_alpha / r (use_rslora: lora_alpha / sqrt(r)), this engine W + (32 / rank) B A. So B is
multiplied by s rank / 32 in fp32: exact where that is a power of two, else rounded once. Matrices of a kind that the file
leaves out, and rows above a matrix's own r, get B = 0 and a fresh A. The function is then that of PEFT.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from safetensors import safe_open

from core.datum import LoraConfig
from core.lora import Adapter, fresh_params

log = logging.getLogger("cook.engine")
PREFIX = "base_model.model."
BAD_JSON = (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError)
_KIND_OF = {
    "q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "o_proj": "attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp", "lm_head": "unembed",
}  # fmt: skip
_NOT_PLAIN = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alpha_pattern", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_ON_THE_BASE_AS_IT_IS = (True, False, "gaussian", "eva", "orthogonal")  # other values of init_lora_weights change its weights


class DamagedCheckpoint(ValueError):
    """Files are missing or unreadable."""


def read_peft_config(directory: Path) -> dict:
    """adapter_config.json of a plain LoRA. Raises DamagedCheckpoint, or ValueError naming what is not plain."""
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
        expected = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _ON_THE_BASE_AS_IT_IS}
        for key, plain in expected.items():
            if config.get(key, plain[0]) not in plain:
                raise ValueError(f"{directory} is not plain LoRA: {key}={config[key]!r}")
        for key in _NOT_PLAIN:
            if config.get(key):
                raise ValueError(f"{directory} is not plain LoRA: {key}={config[key]!r:.60}")
        scale_of(config, config["r"])
        return config
    except (OSError, AttributeError, ZeroDivisionError, *BAD_JSON) as error:
        raise DamagedCheckpoint(f"{directory} is no adapter directory: adapter_config.json: {error!r}") from error


def scale_of(config: dict, rank: int) -> float:
    """s in W + s B A of a matrix whose A has `rank` rows."""
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_geometry(directory: Path) -> LoraConfig:
    """The kinds that the file adapts, and the largest of its ranks."""
    factors = _read_factors(directory)
    kinds = {_KIND_OF[name.rpartition(".")[2]] for name in factors}
    rank = max(len(a) for a, _ in factors.values())
    return LoraConfig(rank, train_attn="attn" in kinds, train_mlp="mlp" in kinds, train_unembed="unembed" in kinds)


def read_params(adapter: Adapter, directory: Path, base_model: str) -> torch.Tensor:
    """The file's factors as parameters of `adapter` [num_rows, rank], on the CPU. Raises ValueError if they do not fit it."""
    config, theirs = read_peft_config(directory), _read_factors(directory)
    params = fresh_params(adapter.config, adapter.geometry)
    for name, a, b in adapter.factors(params):
        if name not in theirs:
            continue
        their_a, their_b = theirs.pop(name)
        rank = len(their_a)
        for key, found, shape in (("A", their_a, [rank, a.shape[1]]), ("B", their_b, [b.shape[0], rank])):
            if list(found.shape) != shape:
                raise ValueError(f"{directory}: {name} lora_{key} is {list(found.shape)}, {base_model} needs {shape}")
        a[:rank] = their_a
        b[:, :rank] = their_b.float() * (scale_of(config, rank) / adapter.scale)
    if theirs:
        raise ValueError(f"{directory} adapts {min(theirs)}, which {base_model} does not have")
    _tell_of_another_base(directory, str(config.get("base_model_name_or_path")), base_model)
    return params


def _tell_of_another_base(directory: Path, theirs: str, ours: str) -> None:
    if theirs != ours and Path(theirs).resolve() != Path(ours).resolve():
        log.warning("%s was made on %s: whether %s has the same weights cannot be checked", directory, theirs, ours)


def _read_factors(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module path -> (A [r, d_in], B [d_out, r])."""
    config, tensors = read_peft_config(directory), read_tensors(directory / "adapter_model.safetensors")
    modules = {key: key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in sorted(tensors)}
    names = [name for name in dict.fromkeys(modules.values()) if name]
    if foreign := [name for name in names if name.rpartition(".")[2] not in _KIND_OF]:
        raise ValueError(f"{directory} adapts {foreign[0]}; this engine adapts {', '.join(_KIND_OF)}")
    for key, name in modules.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            hint = "" if name else "; to leave the base's own out, save it with save_embedding_layers=False"
            raise ValueError(f"{directory} holds {key}, which is no factor of a plain LoRA{hint}")
    try:
        factors = {name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]) for name in names}
    except KeyError as error:
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: adapter_model.safetensors lacks {error}") from error
    if not factors:
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: adapter_model.safetensors holds no factors")
    ranks = {config["r"], *(config.get("rank_pattern") or {}).values()}
    for name, (a, _) in factors.items():
        if len(a) not in ranks:
            raise ValueError(f"{directory}: {name} has rank {len(a)}, adapter_config.json says {sorted(ranks)}")
    return factors


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as reader:
            return {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own, OSError or a Rust panic's RuntimeError
        raise DamagedCheckpoint(f"checkpoint {file.parent} is damaged: {file.name}: {error}") from error
