"""The JSON bodies of Tinker's protocol, checked; fields that are not named here are ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Seq = Field(ge=0, lt=2**63)
METADATA_BYTES = 1 << 16  # what a client may add to a session, training run or checkpoint, as JSON: the index keeps it
T = TypeVar("T")


def _small(value: T) -> T:
    if (size := len(json.dumps(value))) > METADATA_BYTES:
        raise ValueError(f"has {size:,} bytes, expected at most {METADATA_BYTES:,}")
    return value


Metadata = Annotated[dict[str, str] | None, AfterValidator(_small)]


class Body(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), allow_inf_nan=False)


class CreateSession(Body):
    tags: Annotated[list[str], AfterValidator(_small)] = []
    user_metadata: Annotated[dict[str, Any] | None, AfterValidator(_small)] = None
    project_id: Annotated[str | None, AfterValidator(_small)] = None
    display_name: Annotated[str | None, AfterValidator(_small)] = None


class Heartbeat(Body):
    session_id: str


class Finish(Body):
    reason: dict[str, Any] = {}
    detail: str | None = None


class RetrieveFuture(Body):
    request_id: str


class SamplesOf(Body):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: int = Field(default=0, ge=0, lt=2**63)


class RetrieveFutures(Body):
    target: SamplesOf
    prev_cursor: int = Field(default=0, ge=0)
    timeout: float | None = Field(default=None, ge=0)
    retrieved_request_ids: list[str] = []


class LoraSpec(Body):
    rank: int = Field(default=32, ge=1)
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(Body):
    session_id: str
    model_seq_id: int = Seq
    base_model: str
    user_metadata: Metadata = None
    lora_config: LoraSpec = LoraSpec()
    optimizer_config: dict[str, Any] | None = None


class GetInfo(Body):
    model_id: str


class Adam(Body):
    learning_rate: float = Field(default=1e-4, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-12, ge=0)
    weight_decay: float = 0.0
    grad_clip_norm: float = Field(default=0.0, ge=0)


class OptimStep(Body):
    model_id: str
    seq_id: int = Seq
    adam_params: Adam | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(Body):
    model_id: str
    path: str
    seq_id: int = Seq
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: Metadata = None
    age_encryption_recipients: list[str] | None = None


class SaveForSampler(Body):
    model_id: str
    seq_id: int = Seq
    kind: Literal["snapshot", "inflight"] = "snapshot"
    path: str | None = None
    sampling_session_seq_id: int | None = Field(default=None, ge=0, lt=2**63)
    ttl_seconds: int | None = None
    user_metadata: Metadata = None


class LoadWeights(Body):
    path: str
    optimizer: bool = False
    session_id: str | None = None
    model_seq_id: int | None = Field(default=None, ge=0, lt=2**63)
    model_id: str | None = None
    seq_id: int | None = Field(default=None, ge=0, lt=2**63)
    base_model: str | None = None
    user_metadata: Metadata = None
    optimizer_config: dict[str, Any] | None = None


class CreateSamplingSession(Body):
    session_id: str
    sampling_session_seq_id: int = Seq
    base_model: str | None = None
    model_path: str | None = None


class JoinSamplingSession(Body):
    sampling_session_id: str


class Sampling(Body):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Body):
    sampling_session_id: str
    seq_id: int = Seq
    num_samples: int = Field(default=1, ge=1)
    prompt: dict[str, Any]
    sampling_params: Sampling = Sampling()
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(default=0, ge=0)
    topk_sample_logprobs: int = Field(default=0, ge=0)
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    target_prompt_logprobs: dict[str, Any] | None = None
