"""Decode steps as CUDA graphs: a step of an 8B model is some hundred small kernels, and starting them one by one costs more
than running them.

A graph has a fixed number of rows; what changes between steps (tokens, positions, pages, which row is whose) is copied into
its inputs, and adapters of a kind take turns in the same tensors (core/stacked.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.decoder import Decoder
from core.inference import run
from core.paged import PagedDecode, Pages
from core.stacked import Stack, StackedRows

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # rows; larger steps are not captured
MOST_KEPT = 64  # graphs


class Step:
    """One captured pass of `size` rows."""

    def __init__(self, decoder: Decoder, memory: Pages, size: int, width: int, stacks: Sequence[Stack], pool: object) -> None:
        device = decoder.device
        self.tokens, self.positions = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
        self.table = torch.zeros(size, width, dtype=torch.int32, device=device)
        self.stacks = list(stacks)
        self.masks = [torch.zeros(size, len(s.members) * s.rank, dtype=s.dtype, device=device) for s in stacks]
        self.work = PagedDecode(memory, self.table, self.positions)
        self._decoder = decoder
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # kernels are built and workspaces made before the capture
            self._pass()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):  # pyright: ignore[reportArgumentType]
            self.x = self._pass()

    def _pass(self) -> torch.Tensor:
        self.work.ready(self._decoder.dtype)
        return run(self._decoder, self.tokens, self.positions, self._add, [self.work])

    def _add(self, x: torch.Tensor, y: torch.Tensor, name: str) -> None:
        """As StackedRows.add, with the masks of every row among the graph's inputs."""
        for stack, mask in zip(self.stacks, self.masks, strict=True):
            site = stack.sites.get(name)
            if site is None:
                continue
            u = x @ site.a
            u.view(len(u), -1, mask.shape[1]).mul_(mask.unsqueeze(1))
            for b, inner, out in site.b:
                y[:, out].addmm_(u[:, inner], b)

    def load(self, table: torch.Tensor, adapters: Sequence[StackedRows]) -> None:
        """Other sequences: table [n, width], n at most the step's rows; those left over write to the page of nobody."""
        self.positions.zero_()
        self.table.zero_()
        self.table[: len(table)] = table
        for mask, rows in zip(self.masks, adapters, strict=True):
            mask.zero_()
            mask[rows.rows] = rows.mask


class Steps:
    """The captured steps of one decoder."""

    def __init__(self, decoder: Decoder, memory: Pages) -> None:
        self.decoder, self.memory = decoder, memory
        self._made: dict[tuple[int, ...], Step] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._loaded: tuple[Step, PagedDecode] | None = None

    def run(
        self, tokens: torch.Tensor, positions: torch.Tensor, work: PagedDecode, adapters: Sequence[StackedRows]
    ) -> torch.Tensor | None:
        """The residual stream [n, d] as core.inference.run gives it, good until the next call; None: too many rows."""
        n = len(tokens)
        size = next((size for size in SIZES if size >= n), None)
        if size is None:
            return None
        if self._loaded is None or self._loaded[1] is not work:
            step = self._step(size, work.table.shape[1], [rows.stack for rows in adapters])
            step.load(work.table, adapters)
            self._loaded = step, work
        step = self._loaded[0]
        step.tokens[:n] = tokens
        step.positions[:n] = positions
        step.graph.replay()
        return step.x[:n]

    def _step(self, size: int, width: int, stacks: Sequence[Stack]) -> Step:
        key = (size, width, *(id(stack) for stack in stacks))
        if key not in self._made:
            while len(self._made) >= MOST_KEPT:
                del self._made[next(iter(self._made))]
            self._made[key] = Step(self.decoder, self.memory, size, width, stacks, self._pool)
        self._made[key] = step = self._made.pop(key)  # the newest last
        return step
