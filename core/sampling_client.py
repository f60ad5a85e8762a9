"""Sampling from one adapter as it was at one moment, or from the base model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from core.datum import ModelInput, SampleResponse, SamplingParams
from core.door import LARGEST, Sequenced
from core.futures import Future
from core.lora import Weights
from core.request import Call, PassRequest, SampleRequest
from core.stops import ends_at
from core.token_stream import StreamedToken, TokenStream

if TYPE_CHECKING:
    from core.engine import Engine, Tenant


class SamplingClient:
    """An immutable snapshot: later optim_steps do not change what it samples. Bad requests raise ValueError here."""

    def __init__(self, engine: Engine, weights: Weights, tenant: Tenant, release: Callable[[], None]) -> None:
        self.engine, self.weights, self.tenant = engine, weights, tenant
        self._finalizer = weakref.finalize(self, release)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Leave the engine; what has been submitted still runs."""
        self._finalizer()

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        on_token: Callable[[StreamedToken], None] | None = None,
    ) -> Future[SampleResponse]:
        """`num_samples` continuations of `prompt`. The future can be cancelled; what was begun is then given up.

        `on_token` is called with each token as it is sampled, in the engine's thread: it must return at once, as a queue's
        `put` or a loop's `call_soon_threadsafe` does. What it raises becomes the request's error.
        """
        params = sampling_params or SamplingParams()
        tokens = self._checked(prompt)
        max_tokens = self._checked_params(params, len(tokens))
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        if topk_prompt_logprobs < 0:
            raise ValueError(f"topk_prompt_logprobs is {topk_prompt_logprobs}, expected 0 or more")
        ends = ends_at(params.stop, self.engine.base_model)
        future: Future[SampleResponse] = Future(cancellable=True)
        request = SampleRequest(tokens, num_samples, params, max_tokens, self.weights, ends, future, on_token)
        if not (include_prompt_logprobs or topk_prompt_logprobs):
            self.engine.submit(self.tenant, request)
            return future

        def begin() -> None:
            request.prompt_logprobs = self.engine.prompt_logprobs(tokens, self.weights, topk_prompt_logprobs)
            self.engine.sampler.submit(request)

        started: Future[None] = Future()
        started.add_error_callback(future.set_exception)
        self.engine.submit(self.tenant, Call(begin, started))
        return future

    def stream(self, prompt: ModelInput, num_samples: int = 1, sampling_params: SamplingParams | None = None) -> TokenStream:
        """The same continuations, token by token: `for found in sampler.stream(prompt): found.token`."""
        return TokenStream(lambda put: self.sample(prompt, num_samples, sampling_params, on_token=put))

    def together(self) -> AbstractContextManager[None]:
        """Requests made inside begin at one moment, when it ends: their batches do not depend on how fast they came."""
        return self.engine.hold_arrivals()

    def compute_logprobs(self, prompt: ModelInput) -> Future[list[float | None]]:
        """The logprob (T = 1) of each prompt token given those before it; None for the first. Equal to the trainer's."""
        tokens = torch.tensor(self._checked(prompt))
        if len(tokens) == 1:
            return Future.completed([None])
        datum = Sequenced(tokens[:-1], tokens[1:, None], {}, tokens[1:].shape)
        request = PassRequest(self.weights, [datum], "cross_entropy", {}, False, False, Future())
        self.engine.submit(self.tenant, request)
        return request.future.then(lambda output: [None, *output.loss_fn_outputs[0]["logprobs"].tolist()])

    def target_logprobs(self, prompt: ModelInput, targets: torch.Tensor) -> Future[torch.Tensor]:
        """Logprobs (T = 1) of any tokens: targets [len(prompt) - 1, K], row i for position i + 1; -1 asks for nothing: 0.0."""
        tokens = torch.tensor(self._checked(prompt))
        is_whole = not targets.is_floating_point() and targets.dtype != torch.bool
        if targets.dim() != 2 or targets.shape[0] != len(tokens) - 1 or not is_whole:
            raise ValueError(
                f"targets are {targets.dtype} of shape {list(targets.shape)}, expected whole numbers [{len(tokens) - 1}, K]"
            )
        if targets.numel() == 0:
            return Future.completed(torch.zeros(targets.shape, dtype=torch.float32))
        low, high, most = int(targets.min()), int(targets.max()), self.engine.decoder.vocab_size - 1
        if low < -1 or high > most:
            raise ValueError(f"targets run from {low} to {high}, expected -1 to {most}")
        datum = Sequenced(tokens[:-1], targets.long().clamp(min=0), {}, targets.shape)
        request = PassRequest(self.weights, [datum], "cross_entropy", {}, False, False, Future())
        self.engine.submit(self.tenant, request)
        asked = targets >= 0
        return request.future.then(lambda output: torch.where(asked, output.loss_fn_outputs[0]["logprobs"], 0.0))

    def top_logprobs(
        self, tokens: ModelInput, k: int, temperature: float = 1.0
    ) -> Future[list[list[tuple[int, float]] | None]]:
        """The k likeliest (token, logprob) at each position, likeliest first; None for the first position."""
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        if not 0 < temperature <= LARGEST:
            raise ValueError(f"temperature is {temperature}, expected more than 0")
        checked = self._checked(tokens)

        def work() -> list[list[tuple[int, float]] | None]:
            _, table = self.engine.prompt_logprobs(checked, self.weights, k, temperature)
            assert table is not None
            return table

        call = Call(work, Future())
        self.engine.submit(self.tenant, call)
        return call.future

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids at which the base model itself ends a text, from its generation configuration."""
        model = self.engine.decoder.model
        ends = getattr(model.generation_config or model.config, "eos_token_id", None)
        return (ends,) if isinstance(ends, int) else tuple(ends or ())

    def _checked(self, prompt: ModelInput) -> list[int]:
        tokens, decoder = prompt.to_ints(), self.engine.decoder
        if not tokens:
            raise ValueError("the prompt is empty, expected at least one token")
        if odd := [token for token in tokens if not 0 <= token < decoder.vocab_size]:
            raise ValueError(f"the prompt has token {odd[0]}, outside the vocabulary of {decoder.vocab_size}")
        if len(tokens) > decoder.max_length:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the model's context is {decoder.max_length}")
        return tokens

    def _checked_params(self, params: SamplingParams, num_prompt: int) -> int:
        """max_tokens, filled in."""
        context, room = self.engine.decoder.max_length, self.engine.sampler.cache.max_tokens
        max_tokens = context - num_prompt if params.max_tokens is None else params.max_tokens
        if max_tokens < 1:
            asked = f"max_tokens={params.max_tokens}" if params.max_tokens is not None else "no room for a reply"
            raise ValueError(f"{asked} with a prompt of {num_prompt} tokens and a context of {context}: expected at least 1")
        if num_prompt + max_tokens > context:
            raise ValueError(
                f"a prompt of {num_prompt} tokens and max_tokens={max_tokens} make {num_prompt + max_tokens},"
                f" the model's context is {context}"
            )
        needed = self.engine.sampler.cache.capacity_for(num_prompt + max_tokens)
        if needed > room:
            raise ValueError(
                f"a prompt of {num_prompt} tokens and max_tokens={max_tokens} take {needed} tokens of key-value room,"
                f" engine.kv_tokens is {room}"
            )
        if not 0 <= params.temperature <= LARGEST:
            raise ValueError(f"temperature is {params.temperature}, expected 0 or more")
        if not 0 < params.top_p <= 1:
            raise ValueError(f"top_p is {params.top_p}, expected more than 0 and at most 1")
        if params.top_k == 0 or params.top_k < -1:
            raise ValueError(f"top_k is {params.top_k}, expected -1 (all) or at least 1")
        return max_tokens
