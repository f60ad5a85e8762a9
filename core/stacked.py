"""The adapters of a decode step, made ready once for as long as the same ones are in use.

A step has few rows and many sites, so what counts is the number of operations. Adapters of one rank and geometry are stacked:
rows of many adapters take two or three batched products per site, whoever owns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.head import UNEMBED
from core.lora import ComputeCopies, Weights

BLOCK_RANK = 128  # up to here the B's of a site are one block-diagonal factor: one product instead of several


@dataclass(frozen=True)
class StackedSite:
    """A [N, d_in, m * R]; b [N, R', d_out'] with the columns of the site's output that each covers."""

    a: torch.Tensor
    b: list[tuple[torch.Tensor, slice, slice]]  # factor, its columns of x A, its columns of the output


class Stack:
    """N adapters of one rank and geometry in the compute dtype."""

    def __init__(self, members: Sequence[Weights], copies: ComputeCopies) -> None:
        self.members, self.scale = list(members), members[0].scale
        self.place = {weights.key: i for i, weights in enumerate(members)}
        factors = [copies.get([weights]) for weights in members]
        rank = members[0].config.rank
        self.sites: dict[str, StackedSite] = {}
        self.unembed: tuple[torch.Tensor, torch.Tensor] | None = None  # A [d, N * R], B [V, N * R]
        for name, rows in members[0].geometry.sites.items():
            a = [f[rows.a].view(rows.site.d_in, -1) for f in factors]
            if name == UNEMBED:
                self.unembed = torch.cat(a, dim=1), torch.cat([f[rows.b[0]] for f in factors], dim=1)
                continue
            spans = [(slice(i * rank, (i + 1) * rank), out) for i, out in enumerate(rows.out)]
            bs = [torch.stack([f[b].T for f in factors]) for b in rows.b]
            if len(bs) > 1 and len(bs) * rank <= BLOCK_RANK:
                block = bs[0].new_zeros(len(factors), len(bs) * rank, rows.site.d_out)
                for b, (inner, out) in zip(bs, spans, strict=True):
                    block[:, inner, out] = b
                bs, spans = [block], [(slice(0, len(spans) * rank), slice(0, rows.site.d_out))]
            self.sites[name] = StackedSite(torch.stack(a), [(b, *span) for b, span in zip(bs, spans, strict=True)])


class StackedRows:
    """Rows [start, end) of a step, sorted by adapter, and their stack."""

    def __init__(self, stack: Stack, start: int, owners: Sequence[tuple[Weights, int]], device: torch.device) -> None:
        """`owners` are the adapters in row order, with their number of rows."""
        self.stack, self.rows = stack, slice(start, start + sum(rows for _, rows in owners))
        self.single = stack.place[owners[0][0].key] if len(owners) == 1 else None
        self.most = max(rows for _, rows in owners)
        n = len(stack.members)
        self.even = len(owners) == n and all(rows == self.most for _, rows in owners)
        gather = torch.zeros(n, self.most, dtype=torch.int64)  # padding: row 0
        scatter = torch.empty(self.rows.stop - start, dtype=torch.int64)
        mask = torch.zeros(self.rows.stop - start, n)
        at = 0
        for weights, rows in owners:
            place = stack.place[weights.key]
            gather[place, :rows] = torch.arange(at, at + rows)
            scatter[at : at + rows] = place * self.most + torch.arange(rows)
            mask[at : at + rows, place] = stack.scale
            at += rows
        self.gather, self.scatter = gather.view(-1).to(device), scatter.to(device)
        rank = stack.members[0].config.rank
        self.mask = mask.repeat_interleave(rank, 1).to(device)  # [rows, N * R]

    def add(self, x: torch.Tensor, y: torch.Tensor, name: str) -> None:
        """y [T, d_out] += s (x A^T) B^T for these rows."""
        site = self.stack.sites.get(name)
        if site is None:
            return
        x, y = x[self.rows], y[self.rows]
        if self.single is not None:
            u = x @ site.a[self.single]
            if self.stack.scale != 1.0:
                u.mul_(self.stack.scale)
            for b, inner, out in site.b:
                y[:, out].addmm_(u[:, inner], b[self.single])
            return
        grouped = (x if self.even else x.index_select(0, self.gather)).view(len(self.stack.members), self.most, -1)
        u = torch.bmm(grouped, site.a)
        if self.stack.scale != 1.0:
            u.mul_(self.stack.scale)
        for b, inner, out in site.b:
            added = torch.bmm(u[:, :, inner], b).view(-1, b.shape[2])
            y[:, out].add_(added if self.even else added.index_select(0, self.scatter))

    def unembed(self, h: torch.Tensor) -> tuple[slice, torch.Tensor, torch.Tensor] | None:
        """(rows, h A^T masked to each row's own adapter [n, N * R], B [V, N * R])."""
        if self.stack.unembed is None:
            return None
        a, b = self.stack.unembed
        return self.rows, (h[self.rows] @ a).mul_(self.mask), b


class Stacks:
    """Stacks by their members' keys: a step's adapters stay the same for many steps while rows come and go."""

    def __init__(self, copies: ComputeCopies) -> None:
        self.copies = copies
        self._made: dict[tuple, Stack] = {}

    def rows_of(self, owners: Sequence[tuple[Weights, int]], device: torch.device) -> list[StackedRows]:
        """`owners` in row order, like ranks and geometries side by side; adapters without a geometry get nothing."""
        found, start, i = [], 0, 0
        used: dict[tuple, Stack] = {}
        while i < len(owners):
            first, j = owners[i][0], i
            while j < len(owners) and _alike(owners[j][0], first):
                j += 1
            group = owners[i:j]
            if first.geometry.sites:
                stack = self._stack([weights for weights, _ in group])
                used[tuple(weights.key for weights in stack.members)] = stack
                found.append(StackedRows(stack, start, group, device))
            start += sum(rows for _, rows in group)
            i = j
        self._made = used
        return found

    def clear(self) -> None:
        """Let go of the adapters."""
        self._made = {}

    def _stack(self, members: list[Weights]) -> Stack:
        """One that was in use a step ago and holds all of them, else a new one."""
        keys = {weights.key for weights in members}
        for stack in self._made.values():
            if keys <= stack.place.keys() and len(stack.members) <= 2 * len(keys):
                return stack
        return Stack(members, self.copies)


def _alike(a: Weights, b: Weights) -> bool:
    return a.config.rank == b.config.rank and a.geometry == b.geometry
