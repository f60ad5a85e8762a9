"""forward_backward and forward requests under way, and the micro-batches that they fall into next.

A request joins between two micro-batches and is answered when its own sequences are done. Whose rows come first: the tenant
that has been served the fewest rows, then the smaller request. A tenant that was away catches up with the least served one
present, so nobody saves up.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from core.datum import ForwardBackwardOutput
from core.lora import Adapter
from core.objective import Term
from core.packing import Item, cut, in_order
from core.request import Call, PassRequest

EXPRESS = 4  # requests of at most a 4th of the budget share no rows with larger ones: neither waits for the other to be done


@dataclass(eq=False)  # two idle tenants are still two
class Tenant:
    """One client's queue. `busy`: a pass request of its own is under way."""

    queue: deque[PassRequest | Call] = field(default_factory=deque)
    left: bool = False
    busy: bool = False
    served: float = 0.0  # rows so far, on the clock of Passes
    adapter: Adapter | None = None
    used: float = field(default_factory=time.monotonic)

    @property
    def ready(self) -> bool:
        return bool(self.queue) and not self.busy


@dataclass(eq=False)
class Progress:
    """A request, and what has been computed of it."""

    request: PassRequest
    outputs: list[torch.Tensor]  # per sequence [N, K] logprobs
    loss: float = 0.0
    pending: dict[int, tuple[Item, int]] = field(default_factory=dict)  # by index, with what it costs; ordered once

    @classmethod
    def of(cls, request: PassRequest, share_rows: bool, number: int = 0) -> Progress:
        items = {item.index: (item, cost) for item, cost in in_order(request.items(number), share_rows)}
        return cls(request, [torch.empty(0)] * len(request.data), pending=items)

    @property
    def rows(self) -> int:
        return sum(item.length for item, _ in self.pending.values())

    def take(self, item: Item, logprobs: torch.Tensor, loss: float) -> None:
        self.outputs[item.index] = item.spread(logprobs)
        self.loss += loss
        self.pending.pop(item.index, None)

    def finish(self) -> None:
        results = [{"logprobs": lp.reshape(d.shape)} for lp, d in zip(self.outputs, self.request.data, strict=True)]
        self.request.future.set_result(ForwardBackwardOutput(results, {"loss:sum": self.loss}))


def terms(progress: Mapping[int, Progress], ordered: Sequence[Item], device: torch.device) -> list[Term]:
    """What each item's rows are trained towards."""
    found, start = [], 0
    for item in ordered:
        request = progress[item.request].request
        datum = request.data[item.index]
        chosen = slice(None) if item.wanted is None else item.wanted
        span = slice(start, start + item.num_wanted)
        start = span.stop
        if request.gradients is not None:
            given = request.gradients[item.index][chosen].to(device)
            found.append(Term(span, request.loss_fn, {}, {}, given))
        else:
            inputs = {key: value[chosen].to(device) for key, value in datum.inputs.items()}
            found.append(Term(span, request.loss_fn, request.config, inputs))
    return found


class Passes:
    """See the module's docstring. For the engine's thread alone."""

    def __init__(self, share_rows: bool) -> None:
        self._share_rows = share_rows
        self.progress: dict[int, Progress] = {}
        self._tenants: dict[int, Tenant] = {}
        self._numbers = itertools.count()
        self._clock = 0.0
        self._plan: deque[list[Item]] = deque()
        self._budget = 0  # that the plan was made for; 0: make one

    def __bool__(self) -> bool:
        return bool(self.progress)

    def add(self, request: PassRequest, tenant: Tenant) -> None:
        number = next(self._numbers)
        self.progress[number] = Progress.of(request, self._share_rows, number)
        self._tenants[number] = tenant
        tenant.busy = True
        tenant.served = max(tenant.served, self._clock)
        self._budget = 0

    def next(self, token_budget: int) -> tuple[list[Item], bool]:
        """(the next micro-batch, whether it trains)."""
        if self._budget != token_budget or not self._plan:
            self._plan, self._budget = deque(self._batches(token_budget)), token_budget
        batch = self._plan.popleft()
        return batch, self.progress[batch[0].request].request.train

    def put_back(self) -> None:
        """The last batch was not computed: plan anew."""
        self._budget = 0

    def settle(self, batch: Sequence[Item]) -> None:
        """After a micro-batch: who has been served what, and the answers that are complete."""
        for item in batch:
            self._tenants[item.request].served += item.length
        present = [tenant.served for tenant in self._tenants.values()]
        for number in {item.request: None for item in batch}:
            if not self.progress[number].pending:
                self._remove(number).finish()
        still = [tenant.served for tenant in self._tenants.values()]
        self._clock = max(self._clock, min(still) if still else max(present))

    def fail(self, batch: Sequence[Item], error: BaseException) -> None:
        """The requests of a batch that could not be computed leave no half-summed gradient behind."""
        for number in {item.request: None for item in batch}:
            progress = self._remove(number)
            if isinstance(progress.request.adapter, Adapter) and progress.request.train:
                progress.request.adapter.clear_grad()
            progress.request.future.set_exception(error)
        self._plan.clear()  # it holds their adapters
        self._budget = 0

    def fail_all(self, error: BaseException) -> None:
        for progress in self.progress.values():
            progress.request.future.set_exception(error)

    def _remove(self, number: int) -> Progress:
        self._tenants.pop(number).busy = False
        return self.progress.pop(number)

    def _batches(self, token_budget: int) -> list[list[Item]]:
        rows = {number: progress.rows for number, progress in self.progress.items()}
        standing = {number: (self._tenants[number].served, rows[number]) for number in rows}
        small = [number for number in rows if rows[number] * EXPRESS <= token_budget]
        batches: list[tuple[float, int, list[Item]]] = []
        for train in (True, False):
            mine = [number for number in rows if self.progress[number].request.train is train]
            for group in ([n for n in mine if n in small], [n for n in mine if n not in small]):
                items = [pair for number in group for pair in self.progress[number].pending.values()]
                batches += self._placed(cut(items, token_budget, standing), rows) if items else []
        return [batch for *_, batch in sorted(batches, key=lambda found: found[:2])]

    def _placed(self, batches: list[list[Item]], rows: Mapping[int, int]) -> list[tuple[float, int, list[Item]]]:
        """Each batch with what its least served tenant will have been served before it, and with that one's request's rows."""
        served = {number: tenant.served for number, tenant in self._tenants.items()}
        found = []
        for batch in batches:
            found.append((*min((served[item.request], rows[item.request]) for item in batch), batch))
            for item in batch:
                served[item.request] += item.length
        return found
