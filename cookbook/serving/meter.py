"""What the server has counted and timed since it started, by owner, in a Prometheus registry of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core import Future

KINDS = ("forward_backward", "forward", "optim_step", "save", "load", "sample", "logprobs")
_REQUEST_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # polls are held for 25 s
_ENGINE_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


@dataclass(eq=False)
class Operation:
    """Something that the engine is to do, from its arrival at the server on. The time in the queue ends where work begins."""

    kind: str
    owner: str
    of: str = ""  # the training run or sampling session, where there is one
    future: Future | None = None  # once it is in the engine's queue
    arrived: float = field(default_factory=time.monotonic)

    @property
    def running(self) -> bool:
        return self.future is not None and self.future.begun is not None

    @property
    def over(self) -> bool:
        return self.future is not None and self.future.done()


class Meter:
    """Used from the event loop alone. Every series has an owner, and there are as many as there are owners with keys."""

    def __init__(self, note: Callable[[Operation], None] = lambda _: None) -> None:
        self._note = note  # of an operation that the engine has ended
        self.registry = registry = CollectorRegistry()
        self._under_way: set[Operation] = set()
        self.requests = Histogram(
            "cook_request_seconds", "From a request's arrival to the end of its answer; long polls wait in it.",
            ["endpoint", "status", "owner"], buckets=_REQUEST_SECONDS, registry=registry,
        )  # fmt: skip
        self.queue = Histogram(
            "cook_queue_seconds", "From an operation's arrival until the engine begins it.",
            ["kind", "owner"], buckets=_ENGINE_SECONDS, registry=registry,
        )  # fmt: skip
        self.whole = Histogram(
            "cook_operation_seconds", "From an operation's arrival until the engine has its result.",
            ["kind", "owner"], buckets=_ENGINE_SECONDS, registry=registry,
        )  # fmt: skip
        self.trained = Counter(
            "cook_trained_tokens", "Tokens of forward_backward requests that are done.", ["owner"], registry=registry
        )
        self.prompts = Counter("cook_prompt_tokens", "Tokens of prompts.", ["owner", "model"], registry=registry)
        self.sampled = Counter("cook_sampled_tokens", "Tokens sampled.", ["owner", "model"], registry=registry)

    def begin(self, kind: str, owner: str, future: Future | None = None, of: str = "") -> Operation:
        assert kind in KINDS
        operation = Operation(kind, owner, of, future)
        self._under_way.add(operation)
        return operation

    def end(self, operation: Operation) -> None:
        """It is over, or nobody waits for it any more; what the engine has never begun, or not ended, has no time."""
        self._under_way.discard(operation)
        future = operation.future
        if future is not None and future.begun is not None and future.ended is not None:
            self.queue.labels(operation.kind, operation.owner).observe(future.begun - operation.arrived)
            self.whole.labels(operation.kind, operation.owner).observe(future.ended - operation.arrived)
            self._note(operation)

    @contextlib.contextmanager
    def operation(self, kind: str, owner: str, of: str) -> Iterator[Operation]:
        """To be given its future inside."""
        operation = self.begin(kind, owner, of=of)
        try:
            yield operation
        finally:
            self.end(operation)

    def under_way(self, kind: str, owner: str | None = None) -> tuple[int, int]:
        """How many operations of a kind wait, and how many the engine is at; of one owner or of all."""
        asked = [one for one in self._under_way if one.kind == kind and owner in (None, one.owner) and not one.over]
        running = [one.running for one in asked]
        return len(running) - sum(running), sum(running)

    def count_sample(self, owner: str, model: str, prompt: int, sampled: int) -> None:
        self.prompts.labels(owner, model).inc(prompt)
        self.sampled.labels(owner, model).inc(sampled)

    def figures(self, owner: str) -> dict[tuple[str, str], float]:
        """(name of a series, its kind or model or "") -> value: what `owner` has done since the start."""
        counted = (self.queue, self.whole, self.trained, self.prompts, self.sampled)
        samples = (one for metric in counted for family in metric.collect() for one in family.samples)
        return {
            (one.name, one.labels.get("kind") or one.labels.get("model", "")): one.value
            for one in samples
            if one.labels["owner"] == owner and "le" not in one.labels
        }


class RequestTimes:
    """ASGI middleware: how long requests take, by the route that they matched."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self.app, self.meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begun = 500, time.monotonic()

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            route = scope.get("route")
            endpoint = route.path if isinstance(route, Route) else "other"
            owner = scope.get("state", {}).get("owner", "")  # "": no key, or none that is valid
            self.meter.requests.labels(endpoint, str(status), owner).observe(time.monotonic() - begun)
