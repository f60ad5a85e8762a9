"""Decode steps over pages: one pass and the choice of its tokens, on CUDA as a graph.

A step of an 8B model is some hundred small kernels, and starting them one by one costs more than running them. A graph has a
fixed number of rows. Tokens and positions stay in it from step to step; what changes when sequences come and go (pages, which
row is whose, parameters) is copied into its inputs, and adapters of a kind take turns in the same tensors (core/stacked.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from core.datum import SamplingParams
from core.decoder import Decoder
from core.inference import run
from core.paged import PagedDecode, Pages
from core.sampling import Choice, draw, fp32_logits, narrow
from core.stacked import Stack, StackedRows

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # rows; larger steps are not captured
MOST_KEPT = 64  # graphs


@dataclass
class Load:
    """n sequences to decode: tokens and positions [n], pages [n, width]."""

    tokens: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor
    adapters: list[StackedRows]
    choice: Choice


class Flight:
    """A step under way: wait for its tokens and logprobs."""

    def __init__(self, found: torch.Tensor) -> None:
        """`found` [2, n] fp64: tokens, logprobs."""
        self._event = None
        if found.device.type == "cuda":
            self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = found.clone()

    def wait(self) -> tuple[list[int], list[float]]:
        if self._event is not None:
            self._event.synchronize()
        tokens, logprobs = self._host
        return tokens.long().tolist(), logprobs.tolist()


class Step:
    """A pass of `size` rows and its draws. Its inputs are tensors that stay where they are."""

    def __init__(self, decoder: Decoder, memory: Pages, size: int, width: int, stacks: Sequence[Stack]) -> None:
        device = decoder.device
        self.tokens, self.positions = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
        self.uniform = torch.zeros(size, dtype=torch.float64, device=device)
        self.inverse_temperature = torch.ones(size, dtype=torch.float32, device=device)
        self.greedy = torch.zeros(size, dtype=torch.bool, device=device)
        self.found = torch.zeros(2, size, dtype=torch.float64, device=device)
        self.logits = torch.empty(0)  # [size, V] fp32, times the inverse temperature
        self.stacks = list(stacks)
        self.masks = [torch.zeros(size, len(s.members) * s.rank, dtype=s.dtype, device=device) for s in stacks]
        self.work = PagedDecode(memory, torch.zeros(size, width, dtype=torch.int32, device=device), self.positions)
        self._decoder = decoder
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, pool: object, stream: torch.cuda.Stream) -> None:
        """From now on, steps replay a graph. Before any sequence is loaded: the rows write to the page of nobody."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self._pass()  # kernels are built and workspaces made before the capture
            torch.cuda.synchronize(stream.device)
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # pyright: ignore[reportArgumentType]
            try:
                self._pass()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        self._graph = graph

    def load(self, load: Load) -> None:
        n = len(load.tokens)
        for mine, theirs in ((self.tokens, load.tokens), (self.positions, load.positions), (self.work.table, load.table)):
            mine.zero_()  # rows left over write to the page of nobody
            mine[:n] = theirs
        self.inverse_temperature[:n] = 1.0 if load.choice.inverse_temperature is None else load.choice.inverse_temperature
        self.greedy[:n] = False if load.choice.greedy is None else load.choice.greedy
        for mask, rows in zip(self.masks, load.adapters, strict=True):
            mask.zero_()
            mask[rows.rows] = rows.mask

    def go(self, uniform: Sequence[float], choice: Choice) -> Flight:
        """One more token for each of the sequences loaded."""
        n, on_cuda = len(uniform), self._decoder.device.type == "cuda"
        numbers = torch.tensor(uniform, dtype=torch.float64, pin_memory=on_cuda)
        self.uniform[:n].copy_(numbers, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._pass()
        for row, params in choice.narrowed:
            self._narrow(row, params, uniform[row])
        return Flight(self.found[:, :n])

    def _narrow(self, row: int, params: SamplingParams, uniform: float) -> None:
        """A row's draw with top_k or top_p, in place of the free one."""
        token = narrow(self.logits[row], replace(params, temperature=1.0), uniform)
        self.tokens[row] = token
        self.found[0, row] = token
        self.found[1, row] = (self.logits[row, token] - torch.logsumexp(self.logits[row], 0)).double()

    def _pass(self) -> None:
        self.work.ready(self._decoder.dtype)
        x = run(self._decoder, self.tokens, self.positions, self._add, [self.work])
        adapters = [(s.unembed, mask) for s, mask in zip(self.stacks, self.masks, strict=True) if s.unembed is not None]
        self.logits = fp32_logits(self._decoder, x, adapters).mul_(self.inverse_temperature.unsqueeze(1))
        tokens, logprobs = draw(self.logits, self.greedy, self.uniform)
        self.tokens.copy_(tokens)
        self.positions.add_(1)
        self.found[0].copy_(tokens)
        self.found[1].copy_(logprobs)

    def _add(self, x: torch.Tensor, y: torch.Tensor, name: str) -> None:
        """As StackedRows.add, for all rows."""
        for stack, mask in zip(self.stacks, self.masks, strict=True):
            site = stack.sites.get(name)
            if site is None:
                continue
            u = x @ site.a
            u.view(len(u), -1, mask.shape[1]).mul_(mask.unsqueeze(1))
            for b, inner, out in site.b:
                y[:, out].addmm_(u[:, inner], b)


class Steps:
    """The steps of one decoder."""

    def __init__(self, decoder: Decoder, memory: Pages, capture: bool) -> None:
        self.decoder, self.memory, self.capture = decoder, memory, capture
        self._made: dict[tuple[int, ...], Step] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream(decoder.device) if capture else None

    def loaded(self, load: Load) -> Step:
        """A step with these sequences in it."""
        n, stacks = len(load.tokens), [rows.stack for rows in load.adapters]
        captured = self.capture and n <= SIZES[-1]
        size = next(itertools.dropwhile(lambda size: size < n, SIZES)) if captured else n
        width = load.table.shape[1]
        key = (size, width, *(id(stack) for stack in stacks))
        step = self._made.pop(key, None)
        if step is None:
            step = Step(self.decoder, self.memory, size, width, stacks)
            if captured and self._stream is not None:
                step.capture(self._pool, self._stream)
        if captured:
            self._made[key] = step  # the newest last
            if len(self._made) > MOST_KEPT:
                del self._made[next(iter(self._made))]
        step.load(load)
        return step

    def forget_others(self, stacks: Sequence[Stack]) -> None:
        """Steps with other stacks than these will not be asked for, and hold the tensors of those."""
        kept = {id(stack) for stack in stacks}
        self._made = {key: step for key, step in self._made.items() if kept.issuperset(map(id, step.stacks))}
