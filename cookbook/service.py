"""Where training happens: the engine in this process. A server's URL will give the same verbs over the wire."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cookbook import records
from cookbook.config import EngineConfig, LoraConfig, ModelConfig
from cookbook.errors import UsageError

if TYPE_CHECKING:
    from core import Future, ModelInfo, ServiceClient, TrainingClient


def connect(service: str, store: Path, engine: EngineConfig) -> ServiceClient:
    """The service of a run; `store` is where its checkpoints go."""
    if service != "local":
        raise UsageError(f"service={service}: only service=local exists in this version")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  two threads at it meet half a module

    from core import EngineOptions, ServiceClient

    for key, least in (("token_budget", 1), ("kv_tokens", 64)):
        if (value := getattr(engine, key)) is not None and value < least:
            raise UsageError(f"engine.{key}={value}: expected at least {least}, or null (by machine)")
    if not 0 < engine.train_share <= 1:
        raise UsageError(f"engine.train_share={engine.train_share:g}: expected more than 0 and at most 1")
    options = EngineOptions(
        engine.dtype, engine.device, engine.token_budget, engine.kv_tokens, engine.train_share, engine.cuda_graphs,
        engine.exact,
    )  # fmt: skip
    try:
        _, device = options.resolve()
    except ValueError as error:
        raise UsageError(str(error)) from error
    except RuntimeError as error:  # torch's list of two dozen kinds
        raise UsageError(f"engine.device={engine.device}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"engine.device={engine.device}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0")
    return ServiceClient(store, options)


def new_trainer(
    service: ServiceClient, model: ModelConfig, lora: LoraConfig, seed: int, init_from: str | None
) -> Future[TrainingClient]:
    """A fresh adapter, or one that starts from another run's weights (with that adapter's own rank and targets)."""
    if init_from is None:
        return service.create_lora_training_client(
            model.name, lora.rank, seed, lora.train_mlp, lora.train_attn, lora.train_unembed
        )
    return service.create_training_client_from_state(adapter_directory(init_from), model.name)


def adapter_directory(init_from: str) -> Path:
    """The adapter that `init_from` means: a run (its newest checkpoint), a checkpoint's URI in ./runs, or a directory."""
    if init_from.startswith("tinker://"):
        tail = init_from.removeprefix("tinker://")
        stores = (store for place in ("*", "*/*") for store in Path("runs").glob(f"{place}/checkpoints"))  # of sweeps too
        there = (store / tail for store in stores)
        found = sorted(path for path in there if (path / "adapter_config.json").exists())
        if not found:
            raise UsageError(f"init_from={init_from}: no run under ./runs holds this checkpoint; give its directory")
        return found[-1]
    directory = next((path for path in (Path(init_from).expanduser(), Path("runs") / init_from) if path.is_dir()), None)
    if directory is None:
        raise UsageError(f"init_from={init_from}: no such directory, and no such run under ./runs")
    if (directory / "adapter_config.json").exists():
        return directory
    rows = records.read_rows(directory / "checkpoints.jsonl")
    for row in reversed(rows):
        checkpoint = directory / str(row["path"])
        if (checkpoint / "adapter_config.json").exists():
            return checkpoint
    raise UsageError(f"init_from={init_from}: neither a run with a checkpoint nor an adapter directory")


def check_context(max_length: int, info: ModelInfo) -> None:
    """Refuse sequences that the model has no positions for, before a long row comes up in the middle of the run."""
    if max_length > info.max_length:
        raise UsageError(
            f"max_length={max_length}, but the context of {info.base_model} is {info.max_length} tokens:"
            f" set max_length={info.max_length} or less"
        )


def opened(trainer: Future[TrainingClient]) -> TrainingClient:
    """Wait for the client; what the engine refuses becomes the user's one line."""
    try:
        return trainer.result()
    except ValueError as error:  # unknown model, unsupported architecture, a checkpoint of another base
        raise UsageError(" ".join(str(error).split())) from error
