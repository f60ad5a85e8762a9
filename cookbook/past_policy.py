"""A trained policy opened again: a run's checkpoint, a tinker:// URI, an adapter directory, or a base model by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cookbook.config import EngineConfig, ModelConfig
from cookbook.errors import UsageError
from cookbook.run_reader import PastRun, read_run
from cookbook.service import adapter_directory, connect, opened

if TYPE_CHECKING:
    from cookbook.renderers import Renderer
    from core import SamplingClient, ServiceClient, TrainingClient

Which: TypeAlias = Literal["newest", "best"] | int

TRIES = 3  # a run that goes on may drop its newest checkpoint while it is being read


@dataclass
class PastPolicy:
    """Weights to sample from, with the renderer that they were trained with. `adapter` None: the base model."""

    name: str  # what to call it: "my-run, step 40"
    model: ModelConfig
    service: ServiceClient
    renderer: Renderer
    sampler: SamplingClient
    adapter: Path | None
    run: PastRun | None = None
    step: int | None = None

    @property
    def context(self) -> int:
        return self.sampler.engine.decoder.max_length

    def trainer(self) -> TrainingClient:
        """A client that computes losses with these weights; it is never stepped. The caller closes it."""
        if self.adapter is None:
            return opened(self.service.create_lora_training_client(self.model.name, rank=1))  # B = 0: the base
        return opened(self.service.create_training_client_from_state(self.adapter, self.model.name))

    def base(self) -> PastPolicy:
        """The model it was trained from, in the same engine."""
        sampler = opened_sampler(self.service, None, self.model.name)
        return PastPolicy("base", self.model, self.service, self.renderer, sampler, None)

    def close(self) -> None:
        self.sampler.close()


@dataclass(frozen=True)
class Found:
    """What a word on the command line means, before any weights are read."""

    model: ModelConfig
    engine: EngineConfig
    adapter: Path | None = None
    run: PastRun | None = None
    step: int | None = None
    name: str = field(default="base")


def which(checkpoint: str) -> Which:
    """ "newest", "best" or "40" of --checkpoint."""
    if checkpoint in ("newest", "best"):
        return checkpoint
    if not checkpoint.isdigit():
        raise UsageError(f"--checkpoint {checkpoint}: expected newest, best, or the step of a checkpoint")
    return int(checkpoint)


def open_policy(target: str, checkpoint: str = "newest", service: ServiceClient | None = None) -> PastPolicy:
    """The policy that `target` names: RUN, a tinker:// URI, an adapter directory, or model=NAME for a base model."""
    from cookbook.renderers import load_renderer

    for left in reversed(range(TRIES)):
        found = find_policy(target, checkpoint)
        mine = service or connect("local", Path("checkpoints"), found.engine)
        try:
            sampler = opened_sampler(mine, found.adapter, found.model.name)
            renderer = load_renderer(found.model)
            return PastPolicy(found.name, found.model, mine, renderer, sampler, found.adapter, found.run, found.step)
        except UsageError:
            if not left or found.adapter is None or found.adapter.is_dir():
                raise
    raise AssertionError("the last try returns or raises")


def find_policy(target: str, checkpoint: str = "newest") -> Found:
    if target.startswith("model="):
        return Found(_model_named(target.removeprefix("model=")), EngineConfig(), name=target.removeprefix("model="))
    adapter = None
    if target.startswith("tinker://"):
        adapter = adapter_directory(target)
    elif (Path(target) / "adapter_config.json").is_file():
        adapter = Path(target).absolute()
    if adapter is None:
        return _of_run(read_run(target), which(checkpoint))
    run_dir = next((parent for parent in adapter.parents if (parent / "checkpoints.jsonl").is_file()), None)
    if run_dir is None:
        from core import checkpoints

        try:
            return Found(ModelConfig(name=checkpoints.read_base_model(adapter)), EngineConfig(), adapter, name=target)
        except ValueError as error:
            raise UsageError(" ".join(str(error).split())) from error
    past = read_run(run_dir)
    row = next((row for row in past.checkpoints if past.directory_of(row) == adapter), None)
    return Found(model_of(past), engine_of(past), adapter, past, row["step"] if row else None, name=target)


def _of_run(past: PastRun, asked: Which) -> Found:
    adapter = past.adapter(asked)
    row = next(row for row in past.checkpoints if past.directory_of(row) == adapter)
    return Found(model_of(past), engine_of(past), adapter, past, row["step"], name_of(past, row["step"], asked))


def name_of(past: PastRun, step: int, asked: Which) -> str:
    if past.state == "running":
        return f"{past.name}, step {step}, which is still going"
    return f"{past.name}, step {step} ({past.state}{f', {asked}' if isinstance(asked, str) else ''})"


def model_of(past: PastRun) -> ModelConfig:
    """The run's model section; keys that this version does not have are left out."""
    values = _known(ModelConfig, past.config.get("model"))
    if not values.get("name"):
        raise UsageError(
            f"{past.name}: its config.yaml names no model ({'; '.join(past.unreadable) or 'model.name is missing'})"
        )
    return ModelConfig(**values)


def engine_of(past: PastRun) -> EngineConfig:
    """The run's dtype and exactness, on whatever device this machine has."""
    values = _known(EngineConfig, past.config.get("engine"))
    kept = {key: values[key] for key in ("dtype", "kv_tokens", "exact", "cuda_graphs") if key in values}
    device = "cpu" if values.get("device") == "cpu" else "auto"
    return EngineConfig(**kept, device=device)


def _known(config_type: type, section: object) -> dict[str, Any]:
    names = [one.name for one in fields(config_type)]
    return {key: value for key, value in section.items() if key in names} if isinstance(section, Mapping) else {}


def _model_named(name: str) -> ModelConfig:
    """A file of conf/model, or what model.name takes."""
    from cookbook.compose import compose
    from cookbook.keys import group_files

    word = f"model={name}" if name in group_files("model", None) else f"model.name={name}"
    return compose("sft", [word]).config.model


def opened_sampler(service: ServiceClient, adapter: Path | None, base_model: str) -> SamplingClient:
    """Wait for the client; what the engine refuses becomes the user's one line."""
    try:
        return service.create_sampling_client(adapter, base_model).result()
    except (ValueError, OSError) as error:  # unknown model, a damaged checkpoint, one of another base
        raise UsageError(" ".join(str(error).split())) from error
