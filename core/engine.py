"""One frozen base model, one thread, many adapters.

Exactly one thread touches the modules. Between two micro-batches it takes what is queued: each client's operations run in the
order of submission, and the forward_backward requests at the heads of different clients' queues share packed micro-batches.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from core.machine import (
    EngineOptions,
    default_kv_tokens,
    default_token_budget,
    release_workers,
)  # first: it sets the allocator up before torch's threads

import torch  # isort: skip

from core.custom import CustomObjective, evaluate_custom, finish_custom
from core.datum import LoraConfig
from core.decoder import Decoder
from core.futures import Future
from core.lora import Adapter, ComputeCopies, Geometry, Segment, Weights
from core.models import fingerprint, load_base
from core.objective import Objective
from core.packing import Item, cut, in_order, lay_out, shares_rows
from core.passes import Passes, Progress, Tenant, terms
from core.request import Call, PassRequest, SampleRequest
from core.sampler import Sampler
from core.sampling import top_logprobs

IDLE_SECONDS = 600.0  # after which an adapter leaves a GPU
LINGER = 0.02  # of a micro-batch's time: how long the next one waits for a further client's request
CALLS_PER_ROUND = 8  # of one client, between two micro-batches of others
log = logging.getLogger("cook.engine")
PromptLogprobs = tuple[list[float | None], list[list[tuple[int, float]] | None] | None]


class Engine:
    """See the module's docstring. Clients submit from any thread."""

    def __init__(self, base_model: str, options: EngineOptions) -> None:
        dtype, device = options.resolve()
        self.base_model, self.dtype, self.device = base_model, dtype, device
        model = load_base(base_model, dtype, device)
        self.fingerprint = fingerprint(model)
        self.decoder = Decoder(model, dtype, device, options.exact)
        self.copies = ComputeCopies(dtype)
        self.token_budget = options.token_budget or default_token_budget(self.decoder)
        self.recompute = False
        self.base = Weights((-1, 0), LoraConfig(rank=1), Geometry({}, 0), torch.empty(0, 1, dtype=dtype, device=device))
        kv_tokens = options.kv_tokens or default_kv_tokens(self.decoder)
        self.sampler = Sampler(self.decoder, self.copies, kv_tokens, capture=options.cuda_graphs)
        self.train_share = options.train_share
        self._arrivals: deque[SampleRequest] = deque()
        self._holds = 0  # while above 0, arrivals wait
        self._geometries: dict[tuple[bool, bool, bool], Geometry] = {}
        self._tenants: list[Tenant] = []
        self._share_rows = shares_rows(device, options.exact)
        self._passes = Passes(self._share_rows)
        self.micro_batch_seconds = 0.0  # of the last one
        self.park_after = options.park_after or (IDLE_SECONDS if device.type == "cuda" else None)
        self._park_check = self.park_after and self.park_after / 4  # seconds between two looks; None: no look
        self._next_park = 0.0
        self._wake = threading.Condition()
        self._stopping = self._dropped = False
        self._thread = threading.Thread(target=self._serve, name=f"engine {base_model}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread still serves the queues."""
        return self._thread.is_alive()

    def geometry(self, config) -> Geometry:
        key = (config.train_attn, config.train_mlp, config.train_unembed)
        if key not in self._geometries:
            self._geometries[key] = Geometry.of(self.decoder.sites, config)
        return self._geometries[key]

    def join(self) -> Tenant:
        tenant = Tenant()
        with self._wake:
            self._tenants.append(tenant)
        return tenant

    def leave(self, tenant: Tenant, adapter: Adapter | None) -> None:
        """What the client has submitted still runs; then its slot goes."""

        def forget() -> None:
            with self._wake:
                self._tenants.remove(tenant)
            if adapter is not None:
                self.copies.forget(adapter)

        with self._wake:
            tenant.left = True
            tenant.queue.append(Call(forget, Future()))
            self._wake.notify()

    def submit(self, tenant: Tenant, operation: PassRequest | Call | SampleRequest) -> None:
        release_workers()
        with self._wake:
            if tenant.left or self._stopping:
                raise RuntimeError("this client is closed")
            if isinstance(operation, SampleRequest):
                self._arrivals.append(operation)
            else:
                tenant.queue.append(operation)
            self._wake.notify()

    @contextlib.contextmanager
    def hold_arrivals(self) -> Iterator[None]:
        """What is submitted meanwhile, by anyone, begins when this ends."""
        with self._wake:
            self._holds += 1
        try:
            yield
        finally:
            with self._wake:
                self._holds -= 1
                self._wake.notify()

    def stop(self) -> None:
        """End the thread once its queues are empty."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def drop_queue(self) -> None:
        """At exit: forget what waits, let the running pass end."""
        with self._wake:
            for tenant in self._tenants:
                tenant.queue.clear()
            self._arrivals.clear()
        self._dropped = True
        self.stop()
        self._thread.join()

    def _serve(self) -> None:
        try:
            while self._round():
                pass
        except BaseException as error:  # nobody may wait for an engine that is gone
            log.exception("the engine of %s has ended", self.base_model)
            with self._wake:
                self._stopping = True
                waiting = [*self._arrivals, *(operation for tenant in self._tenants for operation in tenant.queue)]
            for operation in waiting:
                operation.future.set_exception(error)
            self._passes.fail_all(error)
            self.sampler.fail_all(error)

    def _round(self) -> bool:
        """Wait, take up what is queued, compute one micro-batch and sample; False at the end.

        No local outlives it: adapters are large.
        """
        self._park_idle()
        with self._wake:
            while not (self._passes or self._ready or self._arrived or self.sampler.busy):
                if self._stopping and (self._dropped or not self._arrivals):
                    return False
                if not self._wake.wait(self._park_check):
                    return True
            if self._dropped and not self._passes:
                return False
            self._linger()
        for _ in range(CALLS_PER_ROUND):
            self._take_up_heads()
        self._sample(self._run_next() * (1 / self.train_share - 1))
        return True

    def _linger(self) -> None:
        """Clients that submit one after another share a micro-batch; else the first one's rows go alone, time after time."""
        while not (self._passes or self._arrived or self.sampler.busy or self._stopping):
            ready = self._ready
            idle = any(tenant.adapter is not None and not tenant.ready for tenant in self._tenants)
            if not idle or not any(isinstance(tenant.queue[0], PassRequest) for tenant in ready):
                return

            def woken(ready: list[Tenant] = ready) -> bool:
                return self._ready != ready or self._arrived or self._stopping

            if not self._wake.wait_for(woken, LINGER * self.micro_batch_seconds):
                return

    @property
    def _ready(self) -> list[Tenant]:
        return [tenant for tenant in self._tenants if tenant.ready]

    def _park_idle(self) -> None:
        """Adapters that nobody has used for `park_after` seconds go to host memory."""
        if self.park_after is not None and (now := time.monotonic()) >= self._next_park:
            self._next_park = now + self.park_after / 4
            with self._wake:
                tenants = list(self._tenants)
            for tenant in tenants:
                idle = not tenant.queue and not tenant.busy and now - tenant.used > self.park_after
                if idle and tenant.adapter is not None and not tenant.adapter.parked:
                    self.copies.forget(tenant.adapter)
                    tenant.adapter.park()

    def _take_up_heads(self) -> None:
        """An operation of each client's. The locals end without the lock: the last to hold a client may be among them."""
        with self._wake:
            heads = [(tenant, tenant.queue.popleft()) for tenant in self._ready]
        for tenant, operation in heads:
            try:
                self._take_up(tenant, operation)
            except BaseException as error:  # no memory, say: others may have what they need
                operation.future.set_exception(error)

    def _take_up(self, tenant: Tenant, operation: PassRequest | Call) -> None:
        tenant.used = time.monotonic()
        if tenant.adapter is not None and tenant.adapter.parked:
            tenant.adapter.unpark()
        if isinstance(operation, Call):
            operation.future.resolve(operation.work)
        elif operation.custom is None:
            self._passes.add(operation, tenant)
        else:
            self._guard(operation)

    @property
    def _arrived(self) -> bool:
        return bool(self._arrivals) and self._holds == 0

    def _sample(self, seconds: float) -> None:
        """Steps of the sampler for about so long, one at least, if it has anything to do."""
        end = time.monotonic() + seconds
        while True:
            with self._wake:
                arrivals = list(self._arrivals) if self._arrived else []
                if arrivals:
                    self._arrivals.clear()
            for request in arrivals:
                try:
                    self.sampler.submit(request)
                except Exception as error:
                    request.future.set_exception(error)
            if not self.sampler.busy:
                return
            try:
                self.sampler.step()
            except Exception as error:  # the requests are told; training goes on
                self.sampler.fail_all(error)
            if time.monotonic() >= end:
                return

    def _guard(self, request: PassRequest) -> None:
        """A custom pass that fails midway leaves no half-summed gradient behind."""
        request.future.begin()
        try:
            self._run_custom(request)
        except BaseException as error:
            if isinstance(request.adapter, Adapter) and request.train and not request.future.done():
                request.adapter.clear_grad()
            request.future.set_exception(error)

    def _run_next(self) -> float:
        """One micro-batch of the passes under way, if there are any; how many seconds it took."""
        if not self._passes:
            return 0.0
        start = time.monotonic()
        batch, train = self._passes.next(self.token_budget)
        try:
            self._run_micro_batch(self._passes.progress, batch, train)
        except torch.OutOfMemoryError as error:
            self._passes.put_back()
            try:
                self._shrink(batch, error)
            except torch.OutOfMemoryError as hopeless:
                self._passes.fail(batch, hopeless)
        except BaseException as error:
            self._passes.fail(batch, error)
        else:
            self.micro_batch_seconds = time.monotonic() - start
            self._passes.settle(batch)
        return time.monotonic() - start

    def _run_alone(self, progress: Progress, ordered: Sequence[tuple[Item, int]], train: bool) -> None:
        """All of a custom request's micro-batches, sampling in between."""
        waiting = deque(cut(ordered, self.token_budget))
        while waiting:
            batch, start = waiting.popleft(), time.monotonic()
            try:
                self._run_micro_batch({0: progress}, batch, train)
            except torch.OutOfMemoryError as error:
                self._shrink(batch, error)
                waiting.extendleft(reversed(cut(in_order(batch, self._share_rows), self.token_budget)))
            self._sample((time.monotonic() - start) * (1 / self.train_share - 1))

    def _shrink(self, batch: list[Item], error: torch.OutOfMemoryError) -> None:
        """Answer to an out-of-memory: half the budget; below one sequence, recomputation; then the end."""
        longest, tokens = max(item.length for item in batch), sum(item.length for item in batch)
        if tokens > longest:
            self.token_budget = max(1, min(self.token_budget, tokens) // 2)
            log.warning("out of memory at %d tokens: token_budget is now %d", tokens, self.token_budget)
        elif not self.recompute:
            self.recompute = True
            log.warning("out of memory at one sequence of %d tokens: layers are recomputed in backward from now on", longest)
        else:
            free, total = torch.cuda.mem_get_info(self.device) if self.device.type == "cuda" else (0, 0)
            raise torch.OutOfMemoryError(
                f"one sequence of {longest} tokens does not fit even with recomputation"
                f" ({free / 2**30:.1f} of {total / 2**30:.1f} GB free): lower max_length"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run_micro_batch(self, passes: Mapping[int, Progress], batch: list[Item], train: bool) -> None:
        for item in batch:
            passes[item.request].request.future.begin()
        rows, ordered = lay_out(batch, self.copies, self.device, train, self.decoder.exact)
        objective = Objective(terms(passes, ordered, self.device), rows.targets.shape, self.device)
        if rows.targets.shape[0] == 0:  # every weight is 0: so is the gradient
            logprobs = rows.targets.float()
            for adapter in (item.adapter for item in ordered if train):
                assert isinstance(adapter, Adapter)
                adapter.has_grad = True
        elif train:
            logprobs = self.decoder.train(rows, objective, self.recompute)
        else:
            logprobs = self.decoder.logprobs(rows)
            objective.gradient(slice(0, len(logprobs)), logprobs)
        if len(logprobs) and _overflowed(rows.segments, logprobs):
            for adapter in {id(item.adapter): item.adapter for item in batch}.values():
                alone = [item for item in batch if item.adapter is adapter]
                self._run_micro_batch(passes, alone, train)
            return
        if train and len(logprobs):
            for segment in rows.segments:
                segment.fold()
        logprobs, losses, start = logprobs.cpu(), objective.losses.cpu(), 0
        for item in ordered:
            span = slice(start, start + item.num_wanted)
            start = span.stop
            passes[item.request].take(item, logprobs[span], float(losses[span].sum(dtype=torch.float64)))

    @torch.no_grad()
    def prompt_logprobs(self, prompt: list[int], weights: Weights, top_k: int, temperature: float = 1.0) -> PromptLogprobs:
        """Logprobs (T = 1) of a prompt's tokens and, if asked for, the likeliest ones (at `temperature`).

        For the engine's thread.
        """
        if len(prompt) == 1:
            return [None], [None] if top_k else None
        tokens = torch.tensor(prompt)
        item = Item(0, 0, weights, tokens[:-1], tokens[1:, None], None)
        rows, _ = lay_out([item], self.copies, self.device, False, self.decoder.exact)
        x = self.decoder.backbone(rows)
        assert rows.selected is not None
        logprobs: list[float | None] = [None, *self.decoder.logprobs_of(x, rows).squeeze(1).tolist()]
        if not top_k:
            return logprobs, None
        return logprobs, [None, *top_logprobs(self.decoder, x[rows.selected], rows.segments[0], top_k, temperature)]

    def _run_custom(self, request: PassRequest) -> None:
        """Logprobs, the caller's loss on them, then its gradient through an ordinary pass."""
        progress = Progress.of(request, self._share_rows)
        ordered = list(progress.pending.values())
        batches = cut(ordered, self.token_budget)
        assert request.custom is not None
        if len(batches) == 1 and request.train and any(item.num_wanted for item in batches[0]):
            try:
                self._run_custom_at_once(progress, batches[0])
                return
            except torch.OutOfMemoryError as error:
                self._shrink(batches[0], error)
        self._run_alone(progress, ordered, train=False)
        loss, metrics, request.gradients = evaluate_custom(request, progress.outputs)
        if request.train:
            self._run_alone(progress, ordered, train=True)
        finish_custom(request, progress.outputs, loss, metrics)

    def _run_custom_at_once(self, progress: Progress, batch: list[Item]) -> None:
        """One forward and one backward: the loss is evaluated between the head's two runs."""
        rows, ordered = lay_out(batch, self.copies, self.device, True, self.decoder.exact)
        objective = CustomObjective(progress.request, ordered, rows.targets.shape, self.device)
        logprobs = self.decoder.train(rows, objective, self.recompute)
        for segment in rows.segments:
            segment.fold()
        for item, lp in zip(ordered, logprobs.cpu().split([item.num_wanted for item in ordered]), strict=True):
            progress.take(item, lp, 0.0)
        finish_custom(progress.request, progress.outputs, objective.loss, objective.metrics)


def _overflowed(segments: Sequence[Segment], logprobs: torch.Tensor) -> bool:
    """Whether a tenant has diverged in a segment that it shares: 0 * inf is NaN, so its neighbours must be computed again."""
    shared = [segment for segment in segments if len(segment.columns) > 1]
    finite = bool(torch.isfinite(logprobs).all()) if shared else True
    return not finite or any(s.grad is not None and not bool(torch.isfinite(s.grad.sum())) for s in shared)
