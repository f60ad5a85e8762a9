"""What travels between a recipe and the engine: token sequences, loss inputs, parameters. Names and fields are Tinker's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

TensorLike: TypeAlias = "torch.Tensor | Sequence[float] | Sequence[int]"


@dataclass(frozen=True)
class EncodedTextChunk:
    """A run of token ids."""

    tokens: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ModelInput:
    """The input of one sequence, as chunks in order (text only for now)."""

    chunks: tuple[EncodedTextChunk, ...]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        return cls((EncodedTextChunk(tuple(tokens)),))

    @classmethod
    def empty(cls) -> ModelInput:
        return cls(())

    def to_ints(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True)
class Datum:
    """One sequence of N tokens with its loss inputs.

    Every value of `loss_fn_inputs` has length N; position i speaks of the token that follows input i.
    `target_tokens` is int64 [N] or [N, K]; the others are float32 of the shape the loss asks for (see core/losses.py).
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, TensorLike]


@dataclass(frozen=True)
class AdamParams:
    """One AdamW step (decoupled weight decay, bias-corrected); grad_clip_norm 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class LoraConfig:
    """The geometry of an adapter. alpha is fixed at 32: W' = W + (32 / rank) B A."""

    rank: int = 32
    seed: int = 0
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass
class ForwardBackwardOutput:
    """`loss_fn_outputs[i]["logprobs"]` has the shape of datum i's target_tokens; `metrics` holds "loss:sum"."""

    loss_fn_outputs: list[dict[str, torch.Tensor]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class OptimStepOutput:
    """`metrics` holds "grad_norm:mean", the norm of the summed gradient before clipping."""

    metrics: dict[str, float] = field(default_factory=dict)


COLDEST = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. top_k -1 and top_p 1 mean the whole distribution; temperature 0 the likeliest token.

    A temperature above 0 and below COLDEST becomes 0: its inverse times the rounding of a logit would decide.

    `stop`: strings, token ids, or None; the text or token that ends a sequence is part of it. With a `seed`, sample i of a
    request depends on (seed, i) alone.
    """

    max_tokens: int | None = None  # None: up to the model's context
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if 0 < self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)


@dataclass
class SampledSequence:
    """`logprobs[i]` is log_softmax(logits / temperature) at tokens[i], not renormalised over top-k or top-p."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str  # "stop" | "length"


@dataclass
class SampleResponse:
    """`prompt_logprobs[i]` is the logprob (T = 1) of prompt token i given those before it; None for the first.

    `topk_prompt_logprobs[i]`: (token, logprob) pairs at that position, likeliest first; None for the first.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None


@dataclass
class ModelInfo:
    """What a recipe may want to know of the base model and the engine that holds it."""

    base_model: str
    model_type: str
    hidden_size: int
    vocab_size: int
    max_length: int  # context, in tokens
    num_parameters: int | None  # None: a server did not say
    dtype: str
    device: str
    token_budget: int  # tokens per micro-batch


@dataclass
class SaveOutput:
    """`path` is the tinker:// URI; `directory` the same place on this machine's disk, None if it lies on a server."""

    path: str
    directory: str | None
