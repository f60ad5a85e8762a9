"""LoRA: W' = W + (32 / rank) B A, every adapter one fp32 matrix [num_rows, rank].

The rows of all factors are stacked: a site (matrices that read the same input) holds the A's as d_in * m rows, laid out
[d_in, m, rank], and then each B as d_out rows [d_out, rank]. Adapters of any ranks are thus concatenated for a mixed batch
by one torch.cat along the last axis, and the clip norm, AdamW and a checkpoint are a handful of operations on one buffer.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from core import native_lora
from core.datum import AdamParams, LoraConfig
from core.exact import tiled

ALPHA = 32.0


@dataclass(frozen=True)
class Matrix:
    """A frozen weight W [d_out, d_in] that can be adapted; `name` is its module path in the base model."""

    name: str
    d_out: int


@dataclass(frozen=True)
class Site:
    """Matrices that read the same input [T, d_in], computed as one; kind is attn, mlp or unembed."""

    name: str
    kind: str
    d_in: int
    matrices: tuple[Matrix, ...]

    @property
    def num_rows(self) -> int:
        return self.d_in * len(self.matrices) + sum(matrix.d_out for matrix in self.matrices)

    @property
    def d_out(self) -> int:
        return sum(matrix.d_out for matrix in self.matrices)


@dataclass(frozen=True)
class SiteRows:
    """Where a site's factors lie among the rows of an adapter."""

    site: Site
    a: slice
    b: tuple[slice, ...]
    out: tuple[slice, ...]  # columns of each matrix in the site's output [T, d_out]


@dataclass(frozen=True)
class Geometry:
    """Which sites are trained, and the row of each factor; independent of rank."""

    sites: dict[str, SiteRows]
    num_rows: int

    @classmethod
    def of(cls, all_sites: Sequence[Site], config: LoraConfig) -> Geometry:
        wanted = {"attn": config.train_attn, "mlp": config.train_mlp, "unembed": config.train_unembed}
        if not any(wanted.values()):
            raise ValueError("train_attn, train_mlp and train_unembed are all false: nothing to train")
        rows, start = {}, 0
        for site in all_sites:
            if not wanted[site.kind]:
                continue
            a = slice(start, start + site.d_in * len(site.matrices))
            bs, outs, row, column = [], [], a.stop, 0
            for matrix in site.matrices:
                bs.append(slice(row, row + matrix.d_out))
                outs.append(slice(column, column + matrix.d_out))
                row, column = row + matrix.d_out, column + matrix.d_out
            rows[site.name] = SiteRows(site, a, tuple(bs), tuple(outs))
            start = row
        return cls(rows, start)


@dataclass(eq=False)
class Weights:
    """An adapter's parameters at one moment; they never change. Equal `key`s mean equal numbers."""

    key: tuple[int, int]  # adapter, version
    config: LoraConfig
    geometry: Geometry
    params: torch.Tensor  # [num_rows, rank] fp32

    @property
    def scale(self) -> float:
        return ALPHA / self.config.rank


def fresh_params(config: LoraConfig, geometry: Geometry) -> torch.Tensor:
    """Parameters [num_rows, rank] of a new adapter, on the CPU: A uniform in +-1/sqrt(d_in) by the seed, B zero."""
    params = torch.zeros(geometry.num_rows, config.rank, dtype=torch.float32)
    generator = torch.Generator().manual_seed(config.seed)
    for rows in geometry.sites.values():
        bound = rows.site.d_in**-0.5
        params[rows.a].uniform_(-bound, bound, generator=generator)
    return params


_serials = itertools.count()


class Adapter:
    """One tenant's adapter: parameters, accumulated gradient and AdamW moments, each fp32 [num_rows, rank]."""

    def __init__(self, config: LoraConfig, geometry: Geometry, device: torch.device) -> None:
        self.config, self.geometry = config, geometry
        self.params = fresh_params(config, geometry).to(device)
        self._grad = torch.empty_like(self.params)
        self._grad_is_zero = True  # whatever the buffer holds: clearing it costs nothing, and the first addition is a copy
        self.exp_avg = torch.zeros_like(self.params)
        self.exp_avg_sq = torch.zeros_like(self.params)
        self.step = 0
        self.serial = next(_serials)
        self.version = 0  # grows whenever params change
        self.has_grad = False
        self._lent: list[tuple[weakref.ref[Weights], torch.Tensor]] = []
        self._home: torch.device | None = None  # where a parked adapter goes back to

    @property
    def parked(self) -> bool:
        return self._home is not None

    def park(self) -> None:
        """Into host memory, with moments and any accumulated gradient, until `unpark`. Snapshots stay where they are."""
        self._home = self.params.device
        self._lent = [(weights, buffer) for weights, buffer in self._lent if weights() is not None]
        self._move(torch.device("cpu"))

    def unpark(self) -> None:
        assert self._home is not None
        self._move(self._home)
        self._home = None

    def _move(self, device: torch.device) -> None:
        for name in ("params", "exp_avg", "exp_avg_sq"):
            setattr(self, name, getattr(self, name).to(device, copy=True))
        if self._grad_is_zero:
            self._grad = torch.empty_like(self.params) if self._home == device else self._grad.new_empty(0)
        else:
            self._grad = self._grad.to(device, copy=True)

    @property
    def scale(self) -> float:
        return ALPHA / self.config.rank

    @property
    def key(self) -> tuple[int, int]:
        return self.serial, self.version

    def snapshot(self) -> Weights:
        """The parameters as they are now, without a copy: what changes them next does so elsewhere."""
        for weights, buffer in self._lent:
            if buffer is self.params and (found := weights()) is not None and found.key == self.key:
                return found
        made = Weights(self.key, self.config, self.geometry, self.params)
        self._lent.append((weakref.ref(made), self.params))
        return made

    def make_own(self) -> None:
        """Before parameters change in place: leave the buffer to the snapshots that hold it, and go on in another one."""
        self._lent = [(weights, buffer) for weights, buffer in self._lent if weights() is not None or buffer is not self.params]
        held = [(weights, buffer) for weights, buffer in self._lent if weights() is not None]
        if any(buffer is self.params for _, buffer in held):
            taken = {id(buffer) for _, buffer in held}
            spare = next((buffer for _, buffer in self._lent if id(buffer) not in taken), None)
            fresh = torch.empty_like(self.params) if spare is None else spare
            self.params = fresh.copy_(self.params)
            kept = [(weights, buffer) for weights, buffer in self._lent if buffer is not spare]
            self._lent = kept[-4:] if len(kept) > 8 else kept  # a few dead ones stay as spares

    @property
    def grad(self) -> torch.Tensor:
        """The accumulated gradient, [num_rows, rank]."""
        if self._grad_is_zero:
            self._grad.zero_()
            self._grad_is_zero = False
        return self._grad

    def add_grad(self, part: torch.Tensor) -> None:
        if self._grad_is_zero:
            self._grad.copy_(part)
        else:
            self._grad.add_(part)
        self._grad_is_zero, self.has_grad = False, True

    def clear_grad(self) -> None:
        self._grad_is_zero, self.has_grad = True, False

    def optim_step(self, adam: AdamParams) -> dict[str, float]:
        """AdamW on the accumulated gradient, then clear it. Raises FloatingPointError, moving nothing, if it is not finite."""
        norm = float(torch.linalg.vector_norm(self.grad))
        if not norm < float("inf"):
            self.clear_grad()
            raise FloatingPointError(
                f"the gradient of optimizer step {self.step + 1} is not finite (norm {norm}); weights unmoved"
            )
        if adam.grad_clip_norm > 0 and norm > adam.grad_clip_norm:
            self.grad.mul_(adam.grad_clip_norm / norm)
        self.make_own()
        self.step += 1
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            [self.params], [self.grad], [self.exp_avg], [self.exp_avg_sq], [],
            [torch.tensor(float(self.step), dtype=torch.float32, device=self.params.device)],
            lr=adam.learning_rate, beta1=adam.beta1, beta2=adam.beta2, weight_decay=adam.weight_decay, eps=adam.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        self.version += 1
        self.clear_grad()
        return {"grad_norm:mean": norm}

    def factors(self, params: torch.Tensor | None = None) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(module path, A [rank, d_in], B [d_out, rank]) of every adapted matrix, as views of `params` (None: its own)."""
        params = self.params if params is None else params
        for rows in self.geometry.sites.values():
            stacked_a = params[rows.a].view(rows.site.d_in, len(rows.site.matrices), -1)
            for i, (matrix, b) in enumerate(zip(rows.site.matrices, rows.b, strict=True)):
                yield matrix.name, stacked_a[:, i].T, params[b]


@dataclass
class Segment:
    """Rows [start, end) of a micro-batch and the adapters that serve them, concatenated along the rank axis."""

    start: int
    end: int
    geometry: Geometry
    factors: torch.Tensor  # [num_rows, R] in the compute dtype
    scale: torch.Tensor | float  # float for one adapter; [end - start, R] (zero outside a row's own columns) for several
    grad: torch.Tensor | None  # [num_rows, R]: this micro-batch's gradient, written once per site (unembed: added to)
    columns: list[tuple[Adapter | Weights, slice]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.factors.shape[1]

    def a(self, rows: SiteRows, source: torch.Tensor) -> torch.Tensor:
        return source[rows.a].view(rows.site.d_in, -1)  # [d_in, m * R]

    def scale_(self, u: torch.Tensor) -> torch.Tensor:
        """Multiply [t, m * R] by alpha / rank and by the row's adapter mask, in place."""
        if isinstance(self.scale, torch.Tensor):
            u.view(u.shape[0], -1, self.rank).mul_(self.scale.unsqueeze(1))
        elif self.scale != 1.0:
            u.mul_(self.scale)
        return u

    def unembed(self, h: torch.Tensor) -> tuple[slice, torch.Tensor, torch.Tensor] | None:
        """(all rows of h, scaled h A^T [n, R], B [V, R]) of the unembedding, for one adapter; None: it is not adapted."""
        rows = self.geometry.sites.get("unembed")
        if rows is None:
            return None
        return slice(0, len(h)), self.scale_(h @ self.a(rows, self.factors)), self.factors[rows.b[0]]

    def fold(self) -> None:
        """Add the micro-batch's gradient to the accumulators of its adapters."""
        assert self.grad is not None
        for adapter, columns in self.columns:
            assert isinstance(adapter, Adapter)
            adapter.add_grad(self.grad[:, columns])


class ComputeCopies:
    """Adapters in the compute dtype, concatenated for the segments that need them; made anew when one has changed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._copies: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}

    def get(self, adapters: Sequence[Adapter | Weights]) -> torch.Tensor:
        """[num_rows, sum of ranks] of adapters of one geometry."""
        if len(adapters) == 1 and adapters[0].params.dtype == self.dtype:
            return adapters[0].params
        key = tuple(adapter.key for adapter in adapters)
        made = self._copies.get(key)
        if made is None:
            self._forget_older({serial for serial, _ in key})
            ranks, first = [adapter.config.rank for adapter in adapters], adapters[0].params
            made = torch.empty(len(first), sum(ranks), dtype=self.dtype, device=first.device)
            for part, adapter in zip(made.split(ranks, dim=1), adapters, strict=True):
                part.copy_(adapter.params)
            self._copies[key] = made
        return made

    def _forget_older(self, serials: set[int]) -> None:
        """Keep the newest copy of these adapters beside the one to come (a snapshot may be sampled while another trains)."""
        for serial in serials:
            theirs = [key for key in self._copies if any(s == serial for s, _ in key)]
            for key in theirs[:-1]:
                del self._copies[key]
        while len(self._copies) > 16:
            del self._copies[next(iter(self._copies))]

    def forget(self, adapter: Adapter) -> None:
        self._copies = {key: made for key, made in self._copies.items() if all(s != adapter.serial for s, _ in key)}


def mm_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out = left @ right; where `out` is fp32 and the inputs are not (CUDA), the product is rounded only once."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_lora(
    x: torch.Tensor, y: torch.Tensor, name: str, segments: Sequence[Segment], exact: bool = False
) -> list[torch.Tensor | None]:
    """y [T, d_out] += s (x A^T) B^T for each segment's rows; returns the scaled x A^T [t, m * R] of each for backward."""
    if not exact and native_lora.takes(x, name, segments):
        return native_lora.add(x, y, name, segments)
    kept: list[torch.Tensor | None] = []
    for segment in segments:
        rows = segment.geometry.sites.get(name)
        if rows is None:
            kept.append(None)
            continue
        x_segment, y_segment = x[segment.start : segment.end], y[segment.start : segment.end]
        a = segment.a(rows, segment.factors)
        u = segment.scale_(tiled(x_segment, a.T) if exact else x_segment @ a)
        for u_i, b, out in zip(u.split(segment.rank, dim=1), rows.b, rows.out, strict=True):
            if exact:
                y_segment[:, out] += tiled(u_i, segment.factors[b])
            else:
                y_segment[:, out].addmm_(u_i, segment.factors[b].T)
        kept.append(u)
    return kept


def add_lora_backward(
    x: torch.Tensor,
    dy: torch.Tensor,
    dx: torch.Tensor,
    kept: Sequence[torch.Tensor | None],
    name: str,
    segments: Sequence[Segment],
    exact: bool = False,
) -> None:
    """dx [T, d_in] += the adapters' part; dA and dB go to each segment's `grad`."""
    add_a_gradient(x, lora_input_gradient(dy, dx, kept, name, segments, exact), name, segments, exact)


def lora_input_gradient(
    dy: torch.Tensor, dx: torch.Tensor, kept: Sequence[torch.Tensor | None], name: str, segments: Sequence[Segment],
    exact: bool = False,
) -> list[torch.Tensor | None]:
    """The part of the above that does not need x; returns d (x A^T) [t, m * R] of each segment."""
    if not exact and native_lora.takes(dx, name, segments):
        return native_lora.input_gradient(dy, dx, kept, name, segments)
    found: list[torch.Tensor | None] = []
    for segment, u in zip(segments, kept, strict=True):
        rows = segment.geometry.sites.get(name)
        if rows is None or u is None:
            found.append(None)
            continue
        dy_segment, du = dy[segment.start : segment.end], torch.empty_like(u)
        parts = zip(u.split(segment.rank, dim=1), du.split(segment.rank, dim=1), rows.b, rows.out, strict=True)
        for u_i, du_i, b, out in parts:
            torch.mm(dy_segment[:, out], segment.factors[b], out=du_i)
            if segment.grad is not None:
                mm_into(segment.grad[b], dy_segment[:, out].T, u_i)
        found.append(segment.scale_(du))
        dx[segment.start : segment.end].addmm_(du, segment.a(rows, segment.factors).T)
    return found


def add_a_gradient(
    x: torch.Tensor, dus: Sequence[torch.Tensor | None], name: str, segments: Sequence[Segment], exact: bool = False
) -> None:
    """dA of each segment, for x [T, d_in]."""
    if not exact and native_lora.takes(x, name, segments):
        native_lora.a_gradient(x, dus, name, segments)
        return
    for segment, du in zip(segments, dus, strict=True):
        if du is not None and segment.grad is not None:
            rows = segment.geometry.sites[name]
            mm_into(segment.a(rows, segment.grad), x[segment.start : segment.end].T, du)
