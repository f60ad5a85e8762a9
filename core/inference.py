"""New rows of sequences whose earlier keys and values are cached: the forward pass of sampling.

The numbers are those of the training pass (core/fused.py): fp32 residual stream, the same frozen tensors, the same adapter
factors, products in the compute dtype. Nothing is kept for a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from core.attention import BLOCK, Heads
from core.decoder import Decoder
from core.fused import Layer, normalise, rms, rotate
from core.kv_cache import Pool, Slot

KEYS_TO = 32  # keys of a decode step are padded to multiples of this: few distinct shapes


@dataclass
class Decode:
    """One new row for each of n sequences of one pool: slots [low, high), of which `rows` and `slots` are in use."""

    pool: Pool
    low: int
    high: int
    rows: torch.Tensor  # [n] among the rows of the pass
    slots: torch.Tensor  # [n]
    positions: torch.Tensor  # [n]
    dense: bool  # every slot of the range is in use, and the rows are all rows of the pass in slot order
    num_keys: int = 0
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [slots in range, 1, 1, keys]

    def ready(self, dtype: torch.dtype) -> None:
        """Set the mask to the current positions."""
        self.num_keys = -(-(int(self.positions.max()) + 1) // KEYS_TO) * KEYS_TO
        last = torch.zeros(self.high - self.low, dtype=torch.int64, device=self.slots.device)
        last[self.slots - self.low] = self.positions
        hidden = torch.arange(self.num_keys, device=last.device) > last.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=last.device).masked_fill_(hidden, float("-inf"))
        self.mask = mask[:, None, None]

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor) -> None:
        """q [T, heads.q, size], kv [T, 2 * heads.kv, size] (k heads, then v heads); writes rows of out [T, heads.q, size]."""
        k, v = self.pool.k[layer], self.pool.v[layer]
        mine = kv if self.dense else kv.index_select(0, self.rows)
        k[self.slots, :, :, self.positions] = mine[:, : heads.kv]
        v[self.slots, :, self.positions] = mine[:, heads.kv :]
        n = self.high - self.low
        if self.dense:
            spread = q
        else:
            spread = q.new_zeros(n, *q.shape[1:])
            spread[self.slots - self.low] = q.index_select(0, self.rows)
        batch = n * heads.kv
        keys = k[self.low : self.high].view(batch, heads.size, -1)[:, :, : self.num_keys]
        values = v[self.low : self.high].view(batch, -1, heads.size)[:, : self.num_keys]
        scores = torch.bmm(spread.view(batch, heads.group, heads.size), keys)
        view = scores.view(n, heads.kv, heads.group, self.num_keys)
        torch.add(self.mask, view, alpha=scaling, out=view)
        attended = torch.bmm(torch.softmax(scores, dim=-1), values).view(n, heads.q, heads.size)
        if self.dense:
            out.copy_(attended)
        else:
            out.index_copy_(0, self.rows, attended.index_select(0, self.slots - self.low))


@dataclass
class Prefill:
    """Consecutive new rows [start, start + length) of one sequence, whose earlier positions its slot holds."""

    slot: Slot
    start: int
    length: int
    position: int

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor, scaling: float, heads: Heads, out: torch.Tensor) -> None:
        rows, end = slice(self.start, self.start + self.length), self.position + self.length
        k, v = self.slot.pool.k[layer, self.slot.index], self.slot.pool.v[layer, self.slot.index]
        k[:, :, self.position : end] = kv[rows, : heads.kv].permute(1, 2, 0)
        v[:, self.position : end] = kv[rows, heads.kv :].transpose(0, 1)
        grouped = q[rows].view(self.length, heads.kv, heads.group, heads.size).permute(1, 0, 2, 3)
        for start in range(0, self.length, BLOCK):
            stop = min(start + BLOCK, self.length)
            num_keys = self.position + stop
            block = grouped[:, start:stop].reshape(heads.kv, -1, heads.size)
            scores = torch.bmm(block, k[:, :, :num_keys])
            mask = _causal(stop - start, num_keys, heads.group, scores)
            weights = torch.softmax(torch.add(mask, scores, alpha=scaling, out=scores), dim=-1)
            attended = torch.bmm(weights, v[:, :num_keys]).view(heads.kv, stop - start, heads.group, heads.size)
            out[self.start + start : self.start + stop] = attended.transpose(0, 1).reshape(stop - start, heads.q, heads.size)


def _causal(num_queries: int, num_keys: int, group: int, like: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=like.device).triu(num_keys - num_queries + 1)
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, float("-inf")).repeat_interleave(group, 0)


AddAdapters = Callable[[torch.Tensor, torch.Tensor, str], object]  # (x, y, site): y += what the rows' adapters make of x


def run(
    decoder: Decoder,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    add: AddAdapters,
    work: Sequence[Decode] | Sequence[Prefill],
) -> torch.Tensor:
    """The residual stream after the last layer for new rows: tokens [T], positions [T] -> [T, d] fp32."""
    x = F.embedding(tokens, decoder.embedding).float()
    cos, sin = decoder.rotary_tables(x, positions)
    heads, dtype = decoder.heads, decoder.dtype
    q = torch.empty(len(x), heads.q, heads.size, dtype=dtype, device=x.device)
    kv = torch.empty(len(x), 2 * heads.kv, heads.size, dtype=dtype, device=x.device)
    attended = torch.empty_like(q)
    for index, layer in enumerate(decoder.layers):
        _project(x, layer, heads, cos, sin, add, dtype, q, kv)
        for part in work:
            part.attend(index, q, kv, decoder.scaling, heads, attended)
        a = attended.view(len(x), -1)
        y = F.linear(a, layer.output.weight, layer.output.bias)
        add(a, y, layer.output.site)
        x.add_(y)
        _mlp(x, layer, add, dtype)
    return x


def _project(
    x: torch.Tensor, layer: Layer, heads: Heads, cos: torch.Tensor, sin: torch.Tensor, add: AddAdapters,
    dtype: torch.dtype, q: torch.Tensor, kv: torch.Tensor,
) -> None:  # fmt: skip
    """Rotated q, rotated k and v of every row."""
    h = normalise(x, rms(x, layer.attention_norm.eps), layer.attention_norm, dtype)
    y = F.linear(h, layer.qkv.weight, layer.qkv.bias)
    add(h, y, layer.qkv.site)
    y = y.view(-1, heads.total, heads.size)
    raw_q, raw_k = y[:, : heads.q], y[:, heads.q : heads.q + heads.kv]
    if layer.q_norm is not None and layer.k_norm is not None:
        raw_q = normalise(raw_q, rms(raw_q, layer.q_norm.eps), layer.q_norm, dtype)
        raw_k = normalise(raw_k, rms(raw_k, layer.k_norm.eps), layer.k_norm, dtype)
    rotate(raw_q, cos, sin, q)
    rotate(raw_k, cos, sin, kv[:, : heads.kv])
    kv[:, heads.kv :] = y[:, heads.q + heads.kv :]


def _mlp(x: torch.Tensor, layer: Layer, add: AddAdapters, dtype: torch.dtype) -> None:
    h = normalise(x, rms(x, layer.mlp_norm.eps), layer.mlp_norm, dtype)
    gate_up = F.linear(h, layer.gate_up.weight, layer.gate_up.bias)
    add(h, gate_up, layer.gate_up.site)
    gate, up = gate_up.chunk(2, dim=1)
    a = F.silu(gate).mul_(up)
    y = F.linear(a, layer.down.weight, layer.down.bias)
    add(a, y, layer.down.site)
    x.add_(y)
