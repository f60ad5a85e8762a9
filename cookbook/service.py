"""Where training happens: the engine in this process, or a Tinker server with the same verbs over the wire."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

from cookbook import records
from cookbook.config import EngineConfig, LoraConfig, ModelConfig
from cookbook.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from cookbook.checkpoints import CheckpointRow
    from cookbook.remote import RemoteSampler, RemoteService, RemoteTrainer
    from cookbook.run import Run
    from core import Future, ModelInfo, SamplingClient, ServiceClient, TrainingClient

    Service: TypeAlias = ServiceClient | RemoteService
    Trainer: TypeAlias = TrainingClient | RemoteTrainer
    Sampler: TypeAlias = SamplingClient | RemoteSampler


@overload
def connect(service: Literal["local"], store: Path, engine: EngineConfig) -> ServiceClient: ...
@overload
def connect(service: str, store: Path, engine: EngineConfig) -> Service: ...
def connect(service: str, store: Path, engine: EngineConfig) -> Service:
    """The service of a run; `store` is where the checkpoints of one in process go."""
    return connect_local(store, engine) if service == "local" else connect_remote(service, engine)


def connect_remote(service: str, engine: EngineConfig) -> RemoteService:
    """The server behind a URL, or the hosted Tinker. Of `engine`, which is the server's, only token_budget counts."""
    from cookbook.remote_server import Server

    _check_counts(engine)
    server = Server.named(service)
    try:
        from cookbook.remote import RemoteService
    except ImportError as error:
        add = "uv sync --extra remote, or pip install 'cook-post-training[remote]'"
        raise UsageError(f"service={service} needs the tinker SDK: {add}") from error
    return RemoteService(server, engine.token_budget)


def connect_local(store: Path, engine: EngineConfig) -> ServiceClient:
    """The engine in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  two threads at it meet half a module

    from core import EngineOptions, ServiceClient

    _check_counts(engine)
    if not 0 < engine.train_share <= 1:
        raise UsageError(f"engine.train_share={engine.train_share:g}: expected more than 0 and at most 1")
    options = EngineOptions(
        engine.dtype, engine.device, engine.token_budget, engine.kv_tokens, engine.train_share, engine.cuda_graphs,
        engine.exact, engine.park_after,
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


def _check_counts(engine: EngineConfig) -> None:
    for key, least in (("token_budget", 1), ("kv_tokens", 64), ("park_after", 1)):
        if (value := getattr(engine, key)) is not None and value < least:
            raise UsageError(f"engine.{key}={value}: expected at least {least}, or null (by machine)")


def resumed(run: Run, service: Service) -> tuple[CheckpointRow, Trainer] | None:
    """The run's newest checkpoint that loads, with a client of it. A session on a server ends with the run, and checkpoints
    there go when the run lets go of them.
    """
    from core.clients import ServiceClient

    if not isinstance(service, ServiceClient):
        run.checkpoints.let_go = service.delete_checkpoint
        run.at_end.callback(service.close)
    return run.resume(lambda row: service.create_training_client_from_state_with_optimizer(run.location(row)).result())


def new_trainer(
    service: Service, model: ModelConfig, lora: LoraConfig, seed: int, init_from: str | None
) -> Future[TrainingClient] | Future[RemoteTrainer]:
    """A fresh adapter, or one that starts from another run's weights (with that adapter's own rank and targets)."""
    if init_from is None:
        return service.create_lora_training_client(
            model.name, lora.rank, seed, lora.train_mlp, lora.train_attn, lora.train_unembed
        )
    return service.create_training_client_from_state(start_of(service, init_from), model.name)


def start_of(service: Service, init_from: str) -> Path | str:
    """What the service loads `init_from` from."""
    from core.clients import ServiceClient

    return adapter_directory(init_from) if isinstance(service, ServiceClient) else service.start_of(init_from)


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
    if rows and rows[-1]["path"] is None:
        from cookbook.run_reader import read_run

        return read_run(directory).adapter()
    raise UsageError(f"init_from={init_from}: neither a run with a checkpoint nor an adapter directory")


def check_context(max_length: int, info: ModelInfo) -> None:
    """Refuse sequences that the model has no positions for, before a long row comes up in the middle of the run."""
    check_length(max_length, info.base_model, info.max_length)


def check_length(max_length: int, base_model: str, context: int) -> None:
    if max_length > context:
        raise UsageError(
            f"max_length={max_length}, but the context of {base_model} is {context} tokens: set max_length={context} or less"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, info: ModelInfo) -> None:
    """Refuse a tokenizer with ids beyond the embedding, before one of them comes up in a row. Nothing is padded here."""
    last = max(number for token, number in tokenizer.get_vocab().items() if token != tokenizer.pad_token)
    if last >= info.vocab_size:
        raise UsageError(
            f"the tokenizer of {info.base_model} has token ids up to {last}, but its embedding has {info.vocab_size} rows:"
            " they are not of one model, or the embedding was not resized; fetch or convert it again"
        )


def opened(trainer: Future[TrainingClient] | Future[RemoteTrainer] | None) -> Trainer:
    """Wait for the client; what the engine refuses becomes the user's one line."""
    assert trainer is not None
    try:
        return trainer.result()
    except ValueError as error:  # unknown model, unsupported architecture, a checkpoint of another base
        raise UsageError(" ".join(str(error).split())) from error
