"""One request's samples: admitted, submitted, read as they come or at the end, given up when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request

from cookbook.serving.meter import Operation
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Server
from cookbook.serving.tinker_sampling import top_of_samples
from core import Future, ModelInput, SampleResponse, SamplingClient, SamplingParams, StreamedToken

CLIENT_LEFT = 499  # what web servers log for a client that closed its connection


@dataclass(frozen=True)
class Sampled:
    """A token of choice `index`, or (token None) its end."""

    index: int
    token: int | None
    logprob: float = 0.0
    top: Sequence[tuple[int, float]] | None = None
    stop_reason: str = ""


class Generation:
    """`n` continuations of each prompt; choice p * n + i is sample i of prompt p. Raises Refusal 400 and 429."""

    def __init__(
        self, server: Server, owner: str, client: SamplingClient, prompts: Sequence[ModelInput],
        n: int, params: Sequence[SamplingParams], top: int, live: bool,
    ) -> None:  # fmt: skip
        if n * len(prompts) > server.limits.num_samples:
            asked = f"{n} samples of {len(prompts)} prompts"
            raise Refusal(400, f"{asked}: expected at most {server.limits.num_samples} (limits.num_samples)", "n")
        if server.sampling.get(owner, 0) + len(prompts) > server.limits.samples:
            raise Refusal(
                429, f"at most {server.limits.samples} samples in flight (limits.samples)", None, "rate_limit_exceeded"
            )
        self.server, self.owner, self.client, self.prompts, self.n = server, owner, client, list(prompts), n
        self.params, self.top = list(params), top
        self.live = live and not top  # the likeliest tokens take a pass over the finished sequence
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Sampled | int] = asyncio.Queue()  # tokens, and numbers of prompts that are done
        self._futures: list[Future[SampleResponse]] = []
        self._operations: list[Operation] = []
        self.num_sampled = 0  # tokens that were read
        server.sampling[owner] = server.sampling.get(owner, 0) + len(prompts)
        try:
            self._futures = [self._submit(number) for number in range(len(prompts))]
            self._operations = [server.meter.begin("sample", owner, future) for future in self._futures]
        except ValueError as error:
            self.close()
            raise Refusal(400, str(error), None, _code(str(error))) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up what is not sampled yet."""
        if not self.closed:
            self.closed = True
            self.server.sampling[self.owner] -= len(self.prompts)
            for future in self._futures:
                future.cancel()
            for operation in self._operations:
                self.server.meter.end(operation)
            if self._operations:
                num_prompt = sum(prompt.length for prompt in self.prompts)
                self.server.meter.count_sample(self.owner, self.client.engine.base_model, num_prompt, self.num_sampled)

    async def read(self) -> AsyncIterator[Sampled]:
        """Tokens in the order in which they were sampled, where `live`; else by choice."""
        waiting = len(self.prompts)
        while waiting:
            news = await self._news.get()
            if self.closed:
                raise Refusal(CLIENT_LEFT, "the client has left")
            if isinstance(news, Sampled):
                self.num_sampled += 1
                yield news
                continue
            waiting -= 1
            response = self._futures[news].result()
            for found in await self._all_of(news, response):
                yield found

    async def _all_of(self, number: int, response: SampleResponse) -> list[Sampled]:
        found: list[Sampled] = []
        tables = None
        if self.top:
            temperature = self.params[number].temperature
            tables = await top_of_samples(self.client, self.prompts[number], response, self.top, temperature)
        for i, sequence in enumerate(response.sequences):
            index = number * self.n + i
            if not self.live:
                rows = tables[i] if tables else [None] * len(sequence.tokens)
                self.num_sampled += len(sequence.tokens)
                for token, logprob, row in zip(sequence.tokens, sequence.logprobs, rows, strict=True):
                    found.append(Sampled(index, token, logprob, row))
            found.append(Sampled(index, None, stop_reason=sequence.stop_reason))
        return found

    def _submit(self, number: int) -> Future[SampleResponse]:
        def told(one: StreamedToken) -> None:
            self._tell(Sampled(number * self.n + one.sequence, one.token, one.logprob))

        on_token: Callable[[StreamedToken], None] | None = told if self.live else None
        future = self.client.sample(self.prompts[number], self.n, self.params[number], on_token=on_token)
        future.add_done_callback(lambda: self._tell(number))
        return future

    def _tell(self, news: Sampled | int) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)


@contextlib.asynccontextmanager
async def watched(request: Request, generation: Generation) -> AsyncIterator[None]:
    """Close `generation` at the end, or as soon as the client has gone away."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        generation.close()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        generation.close()


def _code(message: str) -> str | None:
    return "context_length_exceeded" if "context" in message else None
