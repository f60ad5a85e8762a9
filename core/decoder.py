"""A Llama-, Qwen2- or Qwen3-like transformers model, run by the engine's own passes over packed rows.

The base's modules hold the weights (concatenated in place where matrices read the same input); which matrices there are is
read from the module tree, not from a list of model names. What the passes do not honour (sliding windows, soft caps, sinks,
extra norms, hybrid layers) is refused by name, and a last check compares the logits with the model's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.attention import Extent, Heads, attend, make_layout
from core.elementwise import Norm, normalise, normalise_backward
from core.exact import attend_extents
from core.fused import (
    AttentionInput,
    AttentionOutput,
    Batch,
    Layer,
    Linear,
    Mlp,
)
from core.head import UNEMBED, Head, Part, run_head
from core.lora import Geometry, Matrix, Segment, Site
from core.objective import Objective

_BACKBONE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_UNHONOURED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
)
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


class UnsupportedModel(ValueError):
    """The base model has a part that the engine does not compute; the message names it."""


@dataclass
class Rows:
    """A packed micro-batch on the device: T rows, the positions whose logprobs are asked for, and who serves them."""

    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], from 0 in each sequence
    extents: list[Extent]
    segments: list[Segment]
    selected: torch.Tensor | None  # [n] row indices, some perhaps twice; None: every row
    targets: torch.Tensor  # [n, K]
    parts: list[Part]


class Decoder:
    """Forward and backward of one frozen base model in one dtype on one device."""

    def __init__(
        self,
        model: Any,  # a transformers causal LM: its parts are found by name
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = False,
    ) -> None:
        self.model, self.dtype, self.device, self.exact = model, dtype, device, exact
        config = model.config
        self.refuse_unhonoured(type(model).__name__, config)
        backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        _expect(type(model).__name__, backbone, _BACKBONE)
        _expect_layer(f"{type(model).__name__} layer 0", backbone.layers[0])
        _unmap(model.get_input_embeddings())
        self.embedding = model.get_input_embeddings().weight
        self.rotary = backbone.rotary_emb
        self.vocab_size = self.embedding.shape[0]
        self.max_length = config.max_position_embeddings
        attention = backbone.layers[0].self_attn
        size = attention.head_dim
        self.heads = Heads(attention.q_proj.out_features // size, attention.k_proj.out_features // size, size)
        self.scaling = float(attention.scaling)
        names = {id(module): name for name, module in model.named_modules()}
        self.sites: list[Site] = []
        self.layers = [self._layer(i, layer, names) for i, layer in enumerate(backbone.layers)]
        self.final_norm = _norm(backbone.norm, names)
        head = model.get_output_embeddings()
        self.head = Head(head.weight, head.bias)
        self.sites.append(Site(UNEMBED, UNEMBED, head.in_features, (Matrix(names[id(head)], head.out_features),)))
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._compare_with_model()

    @staticmethod
    def refuse_unhonoured(kind: str, config) -> None:
        """UnsupportedModel when the configuration of a model of that class asks for what the passes do not compute."""
        kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
        if kinds:
            raise UnsupportedModel(f"{kind}: layers of type {sorted(kinds)} are not supported (full attention only)")
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
            raise UnsupportedModel(f"{kind}: sliding_window={window} is not supported (full attention only)")
        for key in _UNHONOURED:
            if getattr(config, key, None) not in (None, 1, 1.0):
                raise UnsupportedModel(f"{kind}: {key}={getattr(config, key)} is not supported")
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        if rope in _BATCH_DEPENDENT_ROPE:
            raise UnsupportedModel(
                f"{kind}: rope_type={rope} is not supported (angles that depend on the longest sequence of a batch)"
            )
        if not all(getattr(config, "no_rope_layers", None) or [True]):  # 0: a layer without rotary embedding
            raise UnsupportedModel(f"{kind}: layers without rotary embedding (no_rope_layers) are not supported")
        if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
            raise UnsupportedModel(f"{kind}: hidden_act={config.hidden_act} is not supported (silu only)")

    def _layer(self, index: int, layer: Any, names: dict[int, str]) -> Layer:
        where = f"{type(self.model).__name__} layer {index}"
        _expect_layer(where, layer)
        attention, mlp = layer.self_attn, layer.mlp
        if any(True for _ in attention.parameters(recurse=False)):
            raise UnsupportedModel(f"{where}: self_attn has parameters of its own (attention sinks?)")

        def fuse(name: str, kind: str, modules: Sequence[nn.Linear]) -> Linear:
            site = Site(f"layers.{index}.{name}", kind, modules[0].in_features,
                        tuple(Matrix(names[id(m)], m.out_features) for m in modules))  # fmt: skip
            self.sites.append(site)
            return _fuse(site.name, modules)

        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        if q_norm is not None and q_norm.weight.shape[-1] != self.heads.size:
            raise UnsupportedModel(
                f"{where}: q_norm over {q_norm.weight.shape[-1]} values, expected one head's {self.heads.size}"
            )
        return Layer(
            attention_norm=_norm(layer.input_layernorm, names),
            qkv=fuse("qkv", "attn", [attention.q_proj, attention.k_proj, attention.v_proj]),
            q_norm=_norm(q_norm, names) if q_norm is not None else None,
            k_norm=_norm(k_norm, names) if k_norm is not None else None,
            output=fuse("output", "attn", [attention.o_proj]),
            mlp_norm=_norm(layer.post_attention_layernorm, names),
            gate_up=fuse("gate_up", "mlp", [mlp.gate_proj, mlp.up_proj]),
            down=fuse("down", "mlp", [mlp.down_proj]),
        )

    @torch.no_grad()
    def _compare_with_model(self) -> None:
        """Refuse a model whose own forward disagrees: there is a part that the walk over the tree did not see."""
        tokens = torch.arange(24, device=self.device) * 7 % self.vocab_size
        theirs = self.model(tokens.unsqueeze(0), use_cache=False).logits[0].float()
        theirs = torch.log_softmax(theirs, -1).gather(1, tokens.roll(-1).unsqueeze(1))
        rows = Rows(tokens, torch.arange(24, device=self.device), [Extent(0, 24)], [], None, tokens.roll(-1).unsqueeze(1), [])
        ours = self.logprobs(rows)
        difference = float((ours - theirs).abs().mean())
        limit = 1e-3 if self.dtype == torch.float32 else 0.3
        if not difference < limit:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: logprobs differ from the model's own forward by {difference:.3g} nats"
                f" (limit {limit}): it has a part that the engine does not compute"
            )

    def rotary_tables(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions [T], each [T, 1, size / 2] in the compute dtype."""
        cos, sin = self.rotary(x, position_ids=positions.unsqueeze(0))
        if cos.shape[-1] != self.heads.size:
            raise UnsupportedModel(
                f"rotary embedding over {cos.shape[-1]} of {self.heads.size} values of a head is not supported"
            )
        half = self.heads.size // 2
        cos, sin = (t[0, :, None, :half].to(self.dtype).contiguous() for t in (cos, sin))
        return cos, sin

    def backbone(self, rows: Rows, recompute: bool = False) -> torch.Tensor:
        """The residual stream after the last layer, [T, d] fp32."""
        x = torch.nn.functional.embedding(rows.tokens, self.embedding).float()
        if torch.is_grad_enabled():
            x.requires_grad_()
        cos, sin = self.rotary_tables(x, rows.positions)
        layout = None if self.exact else make_layout(rows.extents, self.heads, self.device, self.dtype)
        batch = Batch(self.heads, rows.extents, layout, rows.segments, cos, sin, self.dtype, self.scaling)
        for layer in self.layers:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(_run_layer, x, layer, batch, use_reentrant=False)
            else:
                x = _run_layer(x, layer, batch)
        return x

    @torch.no_grad()
    def logprobs(self, rows: Rows) -> torch.Tensor:
        """Logprobs of the targets, [n, K] fp32."""
        return self.logprobs_of(self.backbone(rows), rows)

    def logprobs_of(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The same for a residual stream x [T, d] that is there already."""
        h, _, _ = self._head_input(x, rows)
        return run_head(self.head, h, rows.targets, self._parts(rows), None, self.exact)[0]

    def train(self, rows: Rows, objective: Objective, recompute: bool = False) -> torch.Tensor:
        """Forward and backward; gradients go to the segments' `grad`. Returns the logprobs [n, K] fp32.

        `recompute` keeps only each layer's input and runs the layer again in backward.
        """
        with torch.enable_grad():
            x = self.backbone(rows, recompute)
        with torch.no_grad():
            h, selected, inverse = self._head_input(x.detach(), rows)
            parts, gradient_of = self._parts(rows), objective.gradient
            if not objective.per_token:
                logprobs, _ = run_head(self.head, h, rows.targets, parts, None, self.exact)
                gradient = objective.gradient(slice(0, len(logprobs)), logprobs)
                gradient_of = lambda chunk, _: gradient[chunk]  # noqa: E731
            logprobs, dh = run_head(self.head, h, rows.targets, parts, gradient_of, self.exact)
            assert dh is not None
            dx = normalise_backward(dh, selected, inverse, self.final_norm)
            if rows.selected is not None:
                dx = torch.zeros_like(x).index_add_(0, rows.selected, dx)
        torch.autograd.backward(x, dx)
        return logprobs

    def _head_input(self, x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        selected = x if rows.selected is None else x.index_select(0, rows.selected)
        h, inverse = normalise(selected, self.final_norm, self.dtype)
        return h, selected, inverse

    def _parts(self, rows: Rows) -> list[Part]:
        if rows.parts:
            return rows.parts
        none = Segment(0, len(rows.tokens), Geometry({}, 0), rows.tokens.new_empty(0, 0), 1.0, None)
        return [Part(slice(0, len(rows.targets)), none, 1.0)]


def _run_layer(x: torch.Tensor, layer: Layer, batch: Batch) -> torch.Tensor:
    qkv = AttentionInput.apply(x, layer, batch)
    if batch.layout is None:
        attended = attend_extents(qkv, batch.extents, batch.heads, batch.scaling)
    else:
        attended = attend(qkv, batch.layout, batch.scaling)
    x = AttentionOutput.apply(x, attended, layer, batch)
    return Mlp.apply(x, layer, batch)


def _expect_layer(where: str, layer: Any) -> None:
    _expect(where, layer, _LAYER)
    _expect(f"{where} self_attn", layer.self_attn, _ATTENTION, optional=frozenset({"q_norm", "k_norm", "rotary_fn"}))
    _expect(f"{where} mlp", layer.mlp, _MLP)


def _expect(where: str, module: nn.Module, names: set[str], optional: frozenset[str] = frozenset()) -> None:
    found = {name for name, _ in module.named_children()}
    if missing := names - found:
        raise UnsupportedModel(f"{where} ({type(module).__name__}) lacks {sorted(missing)}: not a Llama-like decoder")
    if extra := found - names - optional:
        raise UnsupportedModel(f"{where} ({type(module).__name__}) has {sorted(extra)}, which the engine does not compute")


def _norm(module: Any, names: dict[int, str]) -> Norm:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        raise UnsupportedModel(f"{names[id(module)]} ({type(module).__name__}) is not an RMSNorm")
    _unmap(module)
    return Norm(module.weight.detach().float(), float(eps))


def _fuse(site: str, modules: Sequence[nn.Linear]) -> Linear:
    """Concatenate the weights into one buffer and make the modules' own parameters views of it."""
    if len(modules) == 1:
        module = modules[0]
        _unmap(module)
        return Linear(site, module.weight.detach(), None if module.bias is None else module.bias.detach())
    weight = torch.cat([m.weight.detach() for m in modules])
    for module, part in zip(modules, weight.split([m.out_features for m in modules]), strict=True):
        module.weight.data = part
    biases = [m.bias for m in modules if m.bias is not None]
    if biases and len(biases) != len(modules):
        raise UnsupportedModel(f"{site}: only some of its matrices have a bias")
    return Linear(site, weight, torch.cat([b.detach() for b in biases]) if biases else None)


def _unmap(module: Any) -> None:
    """On a CPU, copy the weight out of the mapped file: fused weights are copies already, and the last reader unmaps it."""
    weight = module.weight
    if isinstance(weight, torch.Tensor) and weight.device.type == "cpu":
        weight.data = weight.data.clone()
