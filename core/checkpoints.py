"""Adapters on disk: PEFT's two files, the optimizer's moments and a state.json; written aside, synced, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from core import peft_adapter
from core.datum import LoraConfig
from core.lora import ALPHA, Adapter
from core.peft_adapter import BAD_JSON, PREFIX, DamagedCheckpoint, read_tensors

FORMAT = 1
KINDS = ("weights", "sampler_weights", "external_weights")


def resolve(path: str | Path, store: Path) -> Path:
    """The directory of a tinker://<training_run_id>/<kind>/<name> URI in `store`, or of a directory given as such."""
    text = str(path)
    if not text.startswith("tinker://"):
        directory = Path(text).expanduser()
        if not directory.is_dir():
            raise ValueError(f"no checkpoint directory at {directory}")
        return directory
    parts = text.removeprefix("tinker://").split("/")
    if len(parts) != 3 or parts[1] not in KINDS or any(not p or p.startswith(".") for p in parts):
        raise ValueError(f"'{text}' is not of the form tinker://<training_run_id>/<{'|'.join(KINDS)}>/<name>")
    directory = store.joinpath(*parts)
    if not directory.is_dir():
        raise ValueError(f"no checkpoint {text} in {store}")
    return directory


def check_name(name: str) -> None:
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        said = "must be one path segment of printable characters that does not start with a dot"
        raise ValueError(f"checkpoint name {name!r} {said}")


def write_atomically(target: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a directory beside `target`, sync it, rename it; on any error nothing is left behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    old = aside.with_name(aside.name + ".old")
    try:
        aside.chmod(0o755)
        fill(aside)
        for file in [*aside.iterdir(), aside]:
            _sync(file)
        if target.exists():  # moved, then removed: whatever the moment of a crash, `target` is whole or not there
            target.rename(old)
        aside.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(adapter: Adapter, target: Path, base_model: str, base_fingerprint: str, with_optimizer: bool = True) -> None:
    """weights/<name>: adapter_config.json, adapter_model.safetensors, optimizer.safetensors if asked for, state.json."""

    def fill(directory: Path) -> None:
        write_peft(adapter, directory, base_model)
        if with_optimizer:
            moments = {"exp_avg": adapter.exp_avg, "exp_avg_sq": adapter.exp_avg_sq}
            if adapter.has_grad:
                moments["grad"] = adapter.grad
            save_file(moments, directory / "optimizer.safetensors")
        state = {
            "format": FORMAT,
            "step": adapter.step,
            "lora": asdict(adapter.config),
            "base_model": base_model,
            "base_fingerprint": base_fingerprint,
        }
        (directory / "state.json").write_text(json.dumps(state, indent=2))

    write_atomically(target, fill)


def write_peft(adapter: Adapter, directory: Path, base_model: str) -> None:
    """The files that `PeftModel.from_pretrained` reads as they are."""
    tensors, modules = {}, set()
    for name, a, b in adapter.factors():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
        modules.add(name.rsplit(".", 1)[-1])
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.config.rank,
        "lora_alpha": int(ALPHA),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))


def read_state(directory: Path) -> dict:
    """state.json, checked for our format. Raises DamagedCheckpoint."""
    try:
        state = json.loads((directory / "state.json").read_text())
        if state["format"] != FORMAT:
            raise ValueError(f"{directory} has checkpoint format {state['format']}, this version reads {FORMAT}")
        state["lora"] = LoraConfig(**state["lora"])
        return {**state, "step": int(state["step"]), "base_fingerprint": str(state["base_fingerprint"])}
    except (OSError, *BAD_JSON) as error:
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: state.json: {error!r}") from error


def read_lora_config(directory: Path) -> LoraConfig:
    """The geometry of a checkpoint of ours, or of a PEFT adapter's directory."""
    if (directory / "state.json").exists():
        return read_state(directory)["lora"]
    return peft_adapter.read_geometry(directory)


def read_base_model(directory: Path) -> str:
    """The name of the base model that an adapter directory was trained on."""
    try:
        return str(json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"])
    except (OSError, *BAD_JSON) as error:
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: adapter_config.json: {error!r}") from error


def load(adapter: Adapter, directory: Path, base_model: str, base_fingerprint: str, with_optimizer: bool) -> None:
    """Fill `adapter`, which must have the checkpoint's geometry; what it had accumulated is dropped.

    Raises DamagedCheckpoint, or ValueError with both sides, before anything is changed. PEFT's directories say only a name
    of their base: another one is told in the log.
    """
    ours = (directory / "state.json").exists()
    if ours:
        state = read_state(directory)
        if state["base_fingerprint"] != base_fingerprint:
            raise ValueError(
                f"checkpoint {directory} was trained on {state['base_model']} ({state['base_fingerprint']}),"
                f" this engine holds {base_model} ({base_fingerprint})"
            )
    elif with_optimizer:
        raise ValueError(f"{directory} has no optimizer state (no state.json): load its weights alone")
    params = _read_params(adapter, directory) if ours else peft_adapter.read_params(adapter, directory, base_model)
    moments = _read_moments(directory, adapter) if with_optimizer else {}
    adapter.make_own()
    adapter.params.copy_(params)
    adapter.version += 1
    adapter.clear_grad()
    if with_optimizer:
        adapter.exp_avg.copy_(moments["exp_avg"])
        adapter.exp_avg_sq.copy_(moments["exp_avg_sq"])
        if "grad" in moments:
            adapter.grad.copy_(moments["grad"])
            adapter.has_grad = True
        adapter.step = state["step"]
    else:
        adapter.exp_avg.zero_()
        adapter.exp_avg_sq.zero_()
        adapter.step = 0


def _read_params(adapter: Adapter, directory: Path) -> torch.Tensor:
    """The parameters [num_rows, rank] of a checkpoint of ours, which has every tensor of `adapter` and no other."""
    tensors = read_tensors(directory / "adapter_model.safetensors")
    expected = {f"{PREFIX}{name}.lora_{x}.weight" for name, _, _ in adapter.factors() for x in "AB"}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise ValueError(f"checkpoint {directory} and this adapter differ in {len(odd)} tensors, first {odd[0]}")
    params = torch.empty(adapter.params.shape, dtype=torch.float32)
    for name, a, b in adapter.factors(params):
        for view, key in ((a, "A"), (b, "B")):
            tensor = tensors[f"{PREFIX}{name}.lora_{key}.weight"]
            if tensor.shape != view.shape:
                raise ValueError(
                    f"checkpoint {directory}: {name} lora_{key} is {list(tensor.shape)}, this adapter has {list(view.shape)}"
                )
            view.copy_(tensor)
    return params


def _read_moments(directory: Path, adapter: Adapter) -> dict[str, torch.Tensor]:
    file = directory / "optimizer.safetensors"
    if directory.parent.name == "sampler_weights" and not file.exists():
        raise ValueError(
            f"checkpoint {directory} is for sampling, without the optimizer's moments: load its weights alone, or one that"
            " save_state wrote"
        )
    moments = read_tensors(file)
    shapes = {key: list(tensor.shape) for key, tensor in moments.items()}
    if not {"exp_avg", "exp_avg_sq"} <= shapes.keys() or any(s != list(adapter.params.shape) for s in shapes.values()):
        expected = f"exp_avg and exp_avg_sq of {list(adapter.params.shape)}"
        raise DamagedCheckpoint(f"checkpoint {directory} is damaged: optimizer.safetensors holds {shapes}, expected {expected}")
    return moments
