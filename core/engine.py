"""One frozen base model, one thread, many adapters.

Exactly one thread touches the modules. When a pass ends it takes what is queued: each client's operations run in the order of
submission, and the forward_backward requests at the heads of different clients' queues share packed micro-batches.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from core.datum import Datum, ForwardBackwardOutput
from core.decoder import Decoder
from core.door import Sequenced
from core.futures import Future
from core.lora import Adapter, ComputeCopies, Geometry, Segment
from core.models import fingerprint, load_base
from core.objective import Objective, Term
from core.packing import Item, cut, lay_out

log = logging.getLogger("cook.engine")
CPU_TOKEN_BUDGET = 1024  # tokens per micro-batch: products run at full speed from about 500 rows, memory grows with it
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
CustomLoss = Callable[[Sequence[Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True)
class EngineOptions:
    """dtype auto: bfloat16 on CUDA and on CPUs with bf16 instructions, else float32. token_budget None: by the machine."""

    dtype: str = "auto"
    device: str = "auto"
    token_budget: int | None = None

    def resolve(self) -> tuple[torch.dtype, torch.device]:
        device = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"engine.device={device}, but this torch sees no CUDA device: use engine.device=cpu")
        name = self.dtype
        if name == "auto":
            fast = device.startswith("cuda") or torch.ops.mkldnn._is_mkldnn_bf16_supported()
            name = "bfloat16" if fast else "float32"
        if name not in ("bfloat16", "float32"):
            raise ValueError(f"engine.dtype={name}, expected auto, bfloat16 or float32")
        return getattr(torch, name), torch.device(device)


@dataclass
class PassRequest:
    """A forward_backward, forward or custom request that passed the door."""

    adapter: Adapter
    data: list[Sequenced]
    loss_fn: str
    config: Mapping[str, float]
    train: bool
    weighted_only: bool
    future: Future[ForwardBackwardOutput]
    custom: CustomLoss | None = None
    source: Sequence[Datum] = ()
    gradients: list[torch.Tensor] | None = None  # per datum [N, K], once a custom loss has been evaluated

    def items(self, number: int) -> list[Item]:
        return [
            Item(number, i, self.adapter, datum.tokens, datum.targets, self._wanted(datum))
            for i, datum in enumerate(self.data)
        ]

    def _wanted(self, datum: Sequenced) -> torch.Tensor | None:
        if not self.weighted_only or "weights" not in datum.inputs:
            return None
        wanted = datum.inputs["weights"] != 0
        if "sequence_ratio_mask" in datum.inputs:  # gspo's ratio also reads positions that are not trained
            wanted = wanted | (datum.inputs["sequence_ratio_mask"] != 0)
        return wanted.any(dim=1).nonzero().squeeze(1)


@dataclass
class Call:
    """Any other operation: runs alone, in its client's order."""

    work: Callable[[], Any]
    future: Future


@dataclass(eq=False)  # two idle tenants are still two
class Tenant:
    """One client's queue."""

    queue: deque[PassRequest | Call] = field(default_factory=deque)
    left: bool = False


class Engine:
    """See the module's docstring. Clients submit from any thread."""

    def __init__(self, base_model: str, options: EngineOptions) -> None:
        _keep_freed_memory()
        dtype, device = options.resolve()
        self.base_model, self.dtype, self.device = base_model, dtype, device
        model = load_base(base_model, dtype, device)
        self.fingerprint = fingerprint(model)
        self.decoder = Decoder(model, dtype, device)
        self.copies = ComputeCopies(dtype)
        self.token_budget = options.token_budget or default_token_budget(self.decoder)
        self.recompute = False
        self._geometries: dict[tuple[bool, bool, bool], Geometry] = {}
        self._tenants: list[Tenant] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name=f"engine {base_model}", daemon=True)
        self._thread.start()

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

    def submit(self, tenant: Tenant, operation: PassRequest | Call) -> None:
        with self._wake:
            if tenant.left or self._stopping:
                raise RuntimeError("this training client is closed")
            tenant.queue.append(operation)
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
        self.stop()
        self._thread.join()

    def _serve(self) -> None:
        while self._serve_heads():
            pass

    def _serve_heads(self) -> bool:
        """Wait for work and do the first operation of every queue; False at the end. (No local outlives it: adapters are large.)"""
        with self._wake:
            while not any(tenant.queue for tenant in self._tenants):
                if self._stopping:
                    return False
                self._wake.wait()
            heads = [tenant.queue.popleft() for tenant in self._tenants if tenant.queue]
        calls = [operation for operation in heads if isinstance(operation, Call)]
        requests = [operation for operation in heads if isinstance(operation, PassRequest)]
        for call in calls:
            call.future.resolve(call.work)
        customs = [request for request in requests if request.custom is not None]
        for request in customs:
            self._guard([request], lambda request=request: self._run_custom(request))
        plain = [request for request in requests if request.custom is None]
        if plain:
            self._guard(plain, lambda plain=plain: self._run_pass(plain))
        return True

    def _guard(self, requests: list[PassRequest], run: Callable[[], None]) -> None:
        """A pass that fails midway leaves no half-summed gradient behind."""
        try:
            run()
        except BaseException as error:
            for request in requests:
                if request.train and not request.future.done():
                    request.adapter.clear_grad()
                request.future.set_exception(error)

    def _run_pass(self, requests: list[PassRequest]) -> None:
        outputs: list[list[torch.Tensor]] = [[torch.empty(0)] * len(request.data) for request in requests]
        sums = [0.0] * len(requests)
        for train in (True, False):
            items = [item for n, request in enumerate(requests) if request.train is train for item in request.items(n)]
            self._run_items(requests, items, train, outputs, sums)
        for request, logprobs, total in zip(requests, outputs, sums, strict=True):
            results = [{"logprobs": lp.reshape(d.shape)} for lp, d in zip(logprobs, request.data, strict=True)]
            request.future.set_result(ForwardBackwardOutput(results, {"loss:sum": total}))

    def _run_items(
        self, requests: list[PassRequest], items: list[Item], train: bool, outputs: list[list[torch.Tensor]], sums: list[float]
    ) -> None:
        waiting = deque(cut(items, self.token_budget))
        while waiting:
            batch = waiting.popleft()
            try:
                self._run_micro_batch(requests, batch, train, outputs, sums)
            except torch.OutOfMemoryError as error:
                self._shrink(batch, error)
                waiting.extendleft(reversed(cut(batch, self.token_budget)))

    def _shrink(self, batch: list[Item], error: torch.OutOfMemoryError) -> None:
        """Answer to an out-of-memory: half the budget; below one sequence, recomputation; then the end."""
        longest, tokens = max(item.length for item in batch), sum(item.length for item in batch)
        if tokens > longest:
            self.token_budget = max(longest, min(self.token_budget, tokens) // 2)
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

    def _run_micro_batch(
        self, requests: list[PassRequest], batch: list[Item], train: bool, outputs: list[list[torch.Tensor]], sums: list[float]
    ) -> None:
        rows, ordered = lay_out(batch, self.copies, self.device, with_grad=train)
        objective = Objective(self._terms(requests, ordered), rows.targets.shape, self.device)
        if rows.targets.shape[0] == 0:  # every weight is 0: so is the gradient
            logprobs = rows.targets.float()
            for item in ordered if train else ():
                item.adapter.has_grad = True
        elif train:
            logprobs = self.decoder.train(rows, objective, self.recompute)
        else:
            logprobs = self.decoder.logprobs(rows)
            objective.gradient(slice(0, len(logprobs)), logprobs)
        if len(logprobs) and _overflowed(rows.segments, logprobs):
            for adapter in {id(item.adapter): item.adapter for item in batch}.values():
                alone = [item for item in batch if item.adapter is adapter]
                self._run_micro_batch(requests, alone, train, outputs, sums)
            return
        if train and len(logprobs):
            for segment in rows.segments:
                segment.fold()
        logprobs, losses, start = logprobs.cpu(), objective.losses.cpu(), 0
        for item in ordered:
            span = slice(start, start + item.num_wanted)
            start = span.stop
            sums[item.request] += float(losses[span].sum(dtype=torch.float64))
            full = logprobs[span]
            if item.wanted is not None:
                full = torch.zeros(item.targets.shape).index_copy_(0, item.wanted, full)
            outputs[item.request][item.index] = full

    def _terms(self, requests: list[PassRequest], ordered: list[Item]) -> list[Term]:
        terms, start = [], 0
        for item in ordered:
            request, datum = requests[item.request], requests[item.request].data[item.index]
            chosen = slice(None) if item.wanted is None else item.wanted
            span = slice(start, start + item.num_wanted)
            start = span.stop
            if request.gradients is not None:
                given = request.gradients[item.index][chosen].to(self.device)
                terms.append(Term(span, request.loss_fn, {}, {}, given))
            else:
                inputs = {key: value[chosen].to(self.device) for key, value in datum.inputs.items()}
                terms.append(Term(span, request.loss_fn, request.config, inputs))
        return terms

    def _run_custom(self, request: PassRequest) -> None:
        """Logprobs, the caller's loss on them, then its gradient through an ordinary pass."""
        outputs: list[list[torch.Tensor]] = [[torch.empty(0)] * len(request.data)]
        batches = cut(request.items(0), self.token_budget)
        assert request.custom is not None
        if len(batches) == 1 and request.train:
            try:
                self._run_custom_at_once(request, batches[0], outputs)
                return
            except torch.OutOfMemoryError as error:
                self._shrink(batches[0], error)
        self._run_items([request], request.items(0), False, outputs, [0.0])
        loss, metrics, request.gradients = evaluate_custom(request, outputs[0])
        if request.train:
            self._run_items([request], request.items(0), True, outputs, [0.0])
        _finish_custom(request, outputs[0], loss, metrics)

    def _run_custom_at_once(self, request: PassRequest, batch: list[Item], outputs: list[list[torch.Tensor]]) -> None:
        """One forward and one backward: the loss is evaluated between the head's two runs."""
        rows, ordered = lay_out(batch, self.copies, self.device, with_grad=True)
        objective = _Custom(request, ordered, rows.targets.shape, self.device)
        logprobs = self.decoder.train(rows, objective, self.recompute)
        for segment in rows.segments:
            segment.fold()
        for item, lp in zip(ordered, logprobs.cpu().split([item.length for item in ordered]), strict=True):
            outputs[0][item.index] = lp
        _finish_custom(request, outputs[0], objective.loss, objective.metrics)


def _overflowed(segments: Sequence[Segment], logprobs: torch.Tensor) -> bool:
    """Whether a tenant has diverged in a segment that it shares: 0 * inf is NaN, so its neighbours must be computed again."""
    shared = [segment for segment in segments if len(segment.columns) > 1]
    finite = bool(torch.isfinite(logprobs).all()) if shared else True
    return not finite or any(s.grad is not None and not bool(torch.isfinite(s.grad.sum())) for s in shared)


class _Custom(Objective):
    """A caller's loss over the whole micro-batch."""

    def __init__(self, request: PassRequest, ordered: list[Item], shape: torch.Size, device: torch.device) -> None:
        super().__init__([], shape, device)
        self.request, self.ordered, self.per_token = request, ordered, False
        self.loss, self.metrics = 0.0, {}

    def gradient(self, rows: slice, logprobs: torch.Tensor) -> torch.Tensor:
        by_datum: list[torch.Tensor] = [torch.empty(0)] * len(self.ordered)
        for item, lp in zip(self.ordered, logprobs.cpu().split([item.length for item in self.ordered]), strict=True):
            by_datum[item.index] = lp
        self.loss, self.metrics, gradients = evaluate_custom(self.request, by_datum)
        return torch.cat([gradients[item.index] for item in self.ordered]).to(logprobs.device)


def evaluate_custom(
    request: PassRequest, logprobs: list[torch.Tensor]
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """(loss, metrics, d loss / d logprobs per datum as [N, K]). Raises ValueError when the loss is not a finite scalar."""
    assert request.custom is not None
    leaves = [lp.detach().reshape(d.shape).requires_grad_() for lp, d in zip(logprobs, request.data, strict=True)]
    with torch.enable_grad():
        loss, metrics = request.custom(request.source, leaves)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(f"the custom loss returned {loss!r:.80}, expected (scalar tensor, metrics)")
    if not bool(torch.isfinite(loss.detach()).all()):
        raise ValueError(f"the custom loss is {float(loss.detach())}, expected a finite number")
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    if loss.requires_grad:
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients = [zero if g is None else g for g, zero in zip(found, gradients, strict=True)]
    shaped = [g.reshape(len(g), -1) for g in gradients]
    return float(loss.detach()), dict(metrics), shaped


def _finish_custom(request: PassRequest, logprobs: list[torch.Tensor], loss: float, metrics: dict[str, float]) -> None:
    results = [{"logprobs": lp.reshape(d.shape)} for lp, d in zip(logprobs, request.data, strict=True)]
    request.future.set_result(ForwardBackwardOutput(results, {"loss:sum": loss, **metrics}))


def default_token_budget(decoder: Decoder) -> int:
    """Tokens per micro-batch: a constant on CPU; on CUDA what activations can take of the free memory."""
    if decoder.device.type == "cpu":
        return CPU_TOKEN_BUDGET
    heads, d = decoder.heads, decoder.embedding.shape[1]
    intermediate = decoder.layers[0].down.weight.shape[1]
    element = decoder.dtype.itemsize
    per_layer = 2 * 4 * d + element * (2 * heads.total * heads.size + heads.q * heads.size + 2 * intermediate + 256)
    free, _ = torch.cuda.mem_get_info(decoder.device)
    fits = int(0.6 * free / (per_layer * len(decoder.layers)))
    return max(256, min(16_384, fits // 256 * 256))


def _keep_freed_memory() -> None:
    """Keep freed activations in the process: glibc would return them to the kernel and fault every page in again.

    One arena, because those of other threads are unmapped when they empty; 32 MB is the largest threshold glibc accepts.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 1 << 25), (_M_TRIM_THRESHOLD, (1 << 31) - 1)):
            libc.mallopt(option, value)
    except (OSError, AttributeError):  # another libc: nothing to set
        return
