"""A run that was trained on a server, sampled there: no weights are read here. For `cook chat` and `cook sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from cookbook.config import EngineConfig, ModelConfig
from cookbook.errors import UsageError
from cookbook.past_policy import PastPolicy, model_of, name_of, open_policy, which
from cookbook.run_reader import PastRun, read_run
from cookbook.service import connect_remote

if TYPE_CHECKING:
    from rich.console import Console

    from cookbook.remote import RemoteSampler, RemoteService
    from cookbook.renderers import Renderer


@dataclass
class ServedPolicy:
    """What chat and sample use of a PastPolicy."""

    name: str
    model: ModelConfig
    service: RemoteService
    renderer: Renderer
    sampler: RemoteSampler
    context: int
    run: PastRun | None

    def base(self) -> ServedPolicy:
        """The model it was trained from, on the same server."""
        sampler = self.service.create_sampling_client(None, self.model.name).result()
        return ServedPolicy("base", self.model, self.service, self.renderer, sampler, self.context, None)


Speaker: TypeAlias = PastPolicy | ServedPolicy


def open_speaker(target: str, checkpoint: str, notes: Console) -> Speaker:
    """On the server that a run was trained on, where the checkpoint lies there and it answers; else here, which is said."""
    past = _trained_elsewhere(target)
    if past is None:
        return open_policy(target, checkpoint)
    service = str(past.config["service"])
    try:
        served = _served(past, checkpoint, service)
    except UsageError as error:
        notes.print(f"not on the server, but here: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        served = None
    return served or open_policy(target, checkpoint)


def _trained_elsewhere(target: str) -> PastRun | None:
    if target.startswith(("model=", "tinker://")) or (Path(target) / "adapter_config.json").is_file():
        return None
    past = read_run(target)
    return past if past.config.get("service", "local") != "local" else None


def _served(past: PastRun, checkpoint: str, service: str) -> ServedPolicy | None:
    """None for a checkpoint that lies here: the run was in process before."""
    from cookbook.renderers import load_renderer

    asked, model = which(checkpoint), model_of(past)
    row = past.checkpoint(asked)
    if row.get("path") is not None:
        return None
    remote = connect_remote(service, EngineConfig())
    sampler = remote.create_sampling_client(row["uri"], model.name).result()
    name, context = f"{name_of(past, row['step'], asked)}, at {service}", remote.info_of(model.name).max_length
    return ServedPolicy(name, model, remote, load_renderer(model), sampler, context, past)
