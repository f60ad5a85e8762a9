"""The settings of `cook serve`, as key=value words."""

from __future__ import annotations

from dataclasses import dataclass, field

from cookbook.config import EngineConfig


@dataclass
class Limits:
    body_mb: int = 256  # of a request that carries tensors (forward_backward), unpacked too
    json_mb: int = 16  # of any other request
    sessions: int = 1000  # of one owner that are not finished
    training_clients: int = 64  # of one owner at once
    queued: int = 256  # operations of one training client that wait
    queued_mb: int = 1024  # of the bodies of all operations of one owner that wait
    samplers: int = 8  # in memory: of one training client, unsaved snapshots; of one session, other samplers
    samples: int = 4096  # sampling requests of one owner in flight
    num_samples: int = 1024  # of one sampling request
    rank: int = 512
    results_mb: int = 512  # of finished operations, kept for those who have not read them, or may ask again
    session_hours: float = 24.0  # without a sign of life, then its clients leave the engine


@dataclass
class ServeConfig:
    model: str = "smollm2-135m"  # a choice of conf/model, a hub id, a directory or a .gguf file; several with commas
    host: str = "127.0.0.1"  # any other refuses to start without keys
    port: int = 8000  # 0: any free one
    store: str = "serve"  # directory of the index and the weights
    poll_together: bool = False  # the SDK asks once for all samples of a client (retrieve_futures), not once for each
    engine: EngineConfig = field(default_factory=EngineConfig)
    limits: Limits = field(default_factory=Limits)
