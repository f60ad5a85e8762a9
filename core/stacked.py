"""The adapters of a decode step, made ready once for as long as the same ones are in use.

A step has few rows and many sites, so what counts is the number of operations. Adapters of one rank and geometry are stacked:
rows of many adapters take two to four products per site, whoever owns them. Few columns are computed for every row, and those
of other adapters are masked; many go through batched products, a group of rows for each adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from core.head import UNEMBED
from core.lora import ComputeCopies, SiteRows, Weights

BLOCK_RANK = 128  # up to here the B's of a site are one block-diagonal factor: one product instead of several
MOST_SPARE = 4  # stacks that nobody uses, kept for others of their kind
CONCAT_RANK = 256  # up to here, all adapters together, masked columns cost less than products of a few rows each


@dataclass(frozen=True)
class StackedSite:
    """A [d_in, m * N * R] and b [N * R, d_out'] side by side, or A [N, d_in, m * R] and b [N, R, d_out'] apart.

    b comes with its columns of x A and those of the site's output; block-diagonal over several outputs where it is small.
    """

    a: torch.Tensor
    b: list[tuple[torch.Tensor, slice, slice]]


class Stack:
    """N adapters of one rank and geometry in the compute dtype."""

    def __init__(self, members: Sequence[Weights], copies: ComputeCopies, stays: bool) -> None:
        """`stays`: its tensors are inputs of steps that outlive the adapters, and always side by side."""
        self.members, self.scale, self.copies = list(members), members[0].scale, copies
        self.dtype, self.stays = copies.dtype, stays
        self.concat = stays or len(members) == 1 or len(members) * self.rank <= CONCAT_RANK
        self.place: dict[tuple[int, int], int] = {}
        self.sites: dict[str, StackedSite] = {}
        self.unembed: tuple[torch.Tensor, torch.Tensor] | None = None  # A [d, N * R], B [V, N * R]
        self._fill(members)

    @property
    def rank(self) -> int:
        return self.members[0].config.rank

    def refill(self, members: Sequence[Weights]) -> None:
        """Other adapters of the same kind in the same tensors: what refers to these stays valid."""
        assert len(members) == len(self.members) and _alike(members[0], self.members[0])
        old_sites, old_unembed = self.sites, self.unembed
        self._fill(members)
        for name, old in old_sites.items():
            new = self.sites[name]
            old.a.copy_(new.a)
            for (mine, _, _), (theirs, _, _) in zip(old.b, new.b, strict=True):
                mine.copy_(theirs)
        if old_unembed is not None and self.unembed is not None:
            for mine, theirs in zip(old_unembed, self.unembed, strict=True):
                mine.copy_(theirs)
        self.sites, self.unembed = old_sites, old_unembed

    def _fill(self, members: Sequence[Weights]) -> None:
        self.members = list(members)
        self.place = {weights.key: i for i, weights in enumerate(members)}
        self.sites, self.unembed = {}, None
        self.factors = [self.copies.get([weights]) for weights in members]  # once: making one casts a whole adapter
        rows = members[0].geometry.sites.get(UNEMBED)
        if rows is not None:
            self.unembed = torch.cat(self._a(rows), dim=2).squeeze(1), torch.cat([f[rows.b[0]] for f in self.factors], dim=1)
        if self.stays:
            for name in members[0].geometry.sites:
                self.site(name)
            self.factors = []

    def _a(self, rows: SiteRows) -> list[torch.Tensor]:
        """The members' A's of a site, each [d_in, m, R]."""
        return [f[rows.a].view(rows.site.d_in, -1, self.rank) for f in self.factors]

    def site(self, name: str) -> StackedSite | None:
        """Of a layer, made when it is first asked for; None: it is not adapted."""
        rows = self.members[0].geometry.sites.get(name)
        if rows is not None and name != UNEMBED and name not in self.sites:
            self.sites[name] = self._stacked(rows)
        return self.sites.get(name)

    def _stacked(self, rows: SiteRows) -> StackedSite:
        factors, a = self.factors, self._a(rows)
        if self.concat:
            wide, joined = len(factors) * self.rank, torch.cat(a, dim=2).view(rows.site.d_in, -1)
            bs = [torch.cat([f[b].T for f in factors]) for b in rows.b]
        else:
            wide, joined = self.rank, torch.stack([one.reshape(rows.site.d_in, -1) for one in a])
            bs = [torch.stack([f[b].T for f in factors]) for b in rows.b]
        spans = [(slice(i * wide, (i + 1) * wide), out) for i, out in enumerate(rows.out)]
        if len(bs) > 1 and len(bs) * wide <= BLOCK_RANK:
            block = bs[0].new_zeros(*bs[0].shape[:-2], len(bs) * wide, rows.site.d_out)
            for b, (inner, out) in zip(bs, spans, strict=True):
                block[..., inner, out] = b
            bs, spans = [block], [(slice(0, len(spans) * wide), slice(0, rows.site.d_out))]
        return StackedSite(joined, [(b, *span) for b, span in zip(bs, spans, strict=True)])


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
        mask = torch.zeros(self.rows.stop - start, n, dtype=torch.float32)
        at = 0
        for weights, rows in owners:
            place = stack.place[weights.key]
            gather[place, :rows] = torch.arange(at, at + rows)
            scatter[at : at + rows] = place * self.most + torch.arange(rows)
            mask[at : at + rows, place] = stack.scale
            at += rows
        self.gather, self.scatter = gather.view(-1).to(device), scatter.to(device)
        rank = stack.members[0].config.rank
        self.mask = mask.repeat_interleave(rank, 1).to(device, stack.dtype)  # [rows, N * R]

    def add(self, x: torch.Tensor, y: torch.Tensor, name: str) -> None:
        """y [T, d_out] += s (x A^T) B^T for these rows."""
        site = self.stack.site(name)
        if site is None:
            return
        x, y = x[self.rows], y[self.rows]
        if self.stack.concat:
            u = x @ site.a
            if len(self.stack.members) > 1:
                u.view(len(u), -1, self.mask.shape[1]).mul_(self.mask.unsqueeze(1))
            elif self.stack.scale != 1.0:
                u.mul_(self.stack.scale)
            for b, inner, out in site.b:
                y[:, out].addmm_(u[:, inner], b)
            return
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

    def __init__(self, copies: ComputeCopies, stay: bool) -> None:
        self.copies, self.stay = copies, stay
        self._made: dict[tuple, Stack] = {}
        self._spare: list[Stack] = []  # of those that stay

    @property
    def kept(self) -> list[Stack]:
        """In use or spare: no other will be used again."""
        return [*self._made.values(), *self._spare]

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
        self._keep(stack for stack in self._made.values() if stack not in used.values())
        self._made = used
        return found

    def clear(self) -> None:
        """Let go of the adapters."""
        self._keep(self._made.values())
        self._made = {}

    def _keep(self, stacks: Iterable[Stack]) -> None:
        """The tensors, not the adapters."""
        for stack in stacks if self.stay else ():
            stack.members = [_nobody(weights) for weights in stack.members]
            self._spare.append(stack)
        self._spare = self._spare[-MOST_SPARE:]

    def _stack(self, members: list[Weights]) -> Stack:
        """One that was in use a step ago and holds all of them, else a spare one with other adapters, else a new one."""
        keys = {weights.key for weights in members}
        for stack in self._made.values():
            if keys <= stack.place.keys() and len(stack.members) <= 2 * len(keys):
                return stack
        for stack in self._spare:
            if len(stack.members) == len(members) and _alike(stack.members[0], members[0]):
                self._spare.remove(stack)
                stack.refill(members)
                return stack
        return Stack(members, self.copies, self.stay)


def _nobody(weights: Weights) -> Weights:
    """The kind of an adapter without its parameters."""
    return Weights(weights.key, weights.config, weights.geometry, weights.params.new_empty(0, 0))


def _alike(a: Weights, b: Weights) -> bool:
    return a.config.rank == b.config.rank and a.geometry == b.geometry
