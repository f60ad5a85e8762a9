"""A sampling client that answers from a script: a function from the prompt's text (and the request) to the reply's text."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from cookbook.renderers import Renderer
from core import Future, ModelInput, SampledSequence, SampleResponse, SamplingParams
from tests.tiny import tiny_tokenizer

CUT = "…"  # a reply that ends on this has no stop token: it was cut at max_tokens


class ScriptedSampler:
    """`answer(prompt, params)` gives a reply's text, or raises. Replies are stopped unless they end on CUT or are too long.

    `requests` are (prompt, params) in the order in which they came; the logprob of every token is `logprob`.
    """

    def __init__(
        self, answer: Callable[[str, SamplingParams], str], renderer: Renderer, *, logprob: float = -0.5, seconds: float = 0.0
    ) -> None:
        self.answer, self.renderer, self.logprob, self.seconds = answer, renderer, logprob, seconds
        self.requests: list[tuple[list[int], SamplingParams]] = []

    def sample(
        self, prompt: ModelInput, num_samples: int = 1, sampling_params: SamplingParams | None = None
    ) -> Future[SampleResponse]:
        params = sampling_params or SamplingParams()
        self.requests.append((prompt.to_ints(), params))
        text = self.renderer.decode(prompt.to_ints())
        future: Future[SampleResponse] = Future()

        def respond() -> None:
            future.resolve(lambda: SampleResponse([self._sequence(text, params) for _ in range(num_samples)]))

        if self.seconds:
            threading.Timer(self.seconds, respond).start()
        else:
            respond()
        return future

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _sequence(self, prompt: str, params: SamplingParams) -> SampledSequence:
        reply = self.answer(prompt, params)
        tokens = self.renderer.tokenizer.encode(reply.removesuffix(CUT), add_special_tokens=False)
        if not reply.endswith(CUT):
            tokens.append(self.renderer.stop[0])
        tokens = tokens[: params.max_tokens]
        stopped = bool(tokens) and tokens[-1] == self.renderer.stop[0]
        return SampledSequence(tokens, [self.logprob] * len(tokens), "stop" if stopped else "length")


def tiny_renderer(template: str | None = None) -> Renderer:
    """One token per byte, ChatML; `template` is another Jinja source."""
    return Renderer(tiny_tokenizer(), template)
