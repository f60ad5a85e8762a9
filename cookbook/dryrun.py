"""`--dry-run`: what a run would read, train on and need; no weight is loaded, no run directory made."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cookbook.config import EngineConfig, LoraConfig, OptimConfig, SamplesConfig
from cookbook.data import SupervisedData, load_supervised
from cookbook.data_cli import RecipeConfig, print_sequences
from cookbook.errors import UsageError
from cookbook.eval_samples import check_samples
from cookbook.memory import peak_memory_gb
from cookbook.preferences import UNPAIRED, PreferenceData, load_pairs, load_rated
from cookbook.progress import duration
from cookbook.schedule import check_optim, default_learning_rate, peak_learning_rate, total_steps
from cookbook.service import check_context, check_length, connect, start_of

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedModel

    from core import ModelInfo

EXPECTED_SHARE = 0.6  # of the measured product rate, at 4 FLOP per weight and token: a guess that holds small models too
MEASURED_SECONDS = 0.3
NO_REFERENCE = ("dpo/simpo",)  # recipes of recipes/dpo
STREAM_STEPS = 8  # batches of a stream that are looked at


class EnginesConfig(Protocol):
    """What an estimate of memory reads of a recipe's Config."""

    engine: EngineConfig


class SupervisedConfig(RecipeConfig, Protocol):
    """The keys of a recipe's Config that a dry run needs besides those of its data."""

    steps: int | None
    epochs: float
    learning_rate: float | None
    init_from: str | None
    eval_every: int
    service: str
    lora: LoraConfig
    eval: SamplesConfig
    optim: OptimConfig
    engine: EngineConfig


@dataclass(frozen=True)
class Plan:
    """How much there is to compute, in tokens of model input."""

    num_steps: int
    step_tokens: float  # per optimizer step, on average
    eval_tokens: int  # per evaluation
    num_evals: int
    longest: int  # sequence
    reference_tokens: float = 0  # that a fixed reference reads once

    @property
    def train_tokens(self) -> float:
        return self.num_steps * self.step_tokens


@dataclass(frozen=True)
class Shape:
    """Sizes of a base model and of the adapter asked for, read from modules without storage."""

    num_parameters: int
    num_multiplied: int  # weights of matrix products: the linear layers and the unembedding
    num_adapted: int  # parameters of the adapter
    num_layers: int
    hidden_size: int
    qkv_size: int  # values per token after the joint query, key and value product
    q_size: int
    intermediate_size: int


def dry_run(recipe: str, config: SupervisedConfig, console: Console | None = None) -> int:
    """Print data, one rendered sequence, plan, memory and time. Exit code 0, or UsageError where a run would stop."""
    from rich.console import Console

    from cookbook.renderers import load_renderer
    from core.clients import ServiceClient

    kind = recipe.partition("/")[0]
    if kind not in ("sft", "dpo"):
        raise UsageError("--dry-run knows the recipes of recipes/sft, recipes/rl and recipes/dpo only")
    check_optim(config.learning_rate, config.optim)
    check_samples(config.eval)
    service = connect(config.service, Path("checkpoints"), config.engine)
    if config.init_from is not None:
        start_of(service, config.init_from)
    console = console or Console()
    renderer = load_renderer(config.model)
    sizes = {"seed": config.seed, "batch_size": config.batch_size, "max_length": config.max_length}
    data: SupervisedData | PreferenceData
    if kind == "sft":
        data = load_supervised(config.data, renderer, **sizes, console=console)
    elif recipe in UNPAIRED:
        data = load_rated(config.data, renderer, **sizes, console=console)
    else:
        data = load_pairs(config.data, renderer, **sizes, console=console)
    print_sequences(data.sequences(0)[: 1 if kind == "sft" or recipe in UNPAIRED else 2], renderer, console)
    plan = make_plan(config, data, with_reference=kind == "dpo" and recipe not in NO_REFERENCE)
    if isinstance(service, ServiceClient):
        lines = _model_lines(kind, config, plan, *service.options.resolve())
    else:
        info = service.info_of(config.model.name)
        check_context(config.max_length, info)
        peak = peak_learning_rate(config.learning_rate, config.optim, info, "dpo" if kind == "dpo" else "sft")
        lines = [rate_line(peak, config.optim), served_line(info)]
    for line in [*_plan_lines(config, data, plan), *lines]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def make_plan(config: SupervisedConfig, data: SupervisedData | PreferenceData, with_reference: bool = False) -> Plan:
    """Steps and tokens as the recipe counts them."""
    num_steps = total_steps(config.steps, config.epochs, data.epoch_steps)
    seen_steps = data.epoch_steps or min(num_steps, STREAM_STEPS)
    seen = sum(len(sequence.tokens) - 1 for step in range(seen_steps) for sequence in data.sequences(step))
    between = (num_steps - 1) // config.eval_every if config.eval_every > 0 else 0
    return Plan(
        num_steps=num_steps,
        step_tokens=seen / seen_steps,
        eval_tokens=data.held_out_tokens,
        num_evals=2 + between if data.held_out else 0,
        longest=data.report.length_quantiles()["max"] - 1,
        reference_tokens=data.held_out_tokens + min(num_steps, seen_steps) * seen / seen_steps if with_reference else 0,
    )


def _plan_lines(config: SupervisedConfig, data: SupervisedData | PreferenceData, plan: Plan) -> list[str]:
    passes = "of a stream" if data.epoch_steps is None else f"{plan.num_steps / data.epoch_steps:.3g} epochs"
    epoch = "" if data.epoch_steps is None else f"{data.epoch_steps * plan.step_tokens:,.0f} tokens per epoch, "
    trained = f"({epoch}{data.report.trained_share:.0%} trained)"
    sequences = f"{plan.num_steps:,} of {config.batch_size} sequences, {passes}"
    return [
        "",
        f"steps    {sequences}: about {plan.train_tokens:,.0f} tokens {trained}",
        f"evals    {plan.num_evals} of {len(data.held_out):,} held-out sequences, {plan.eval_tokens:,} tokens each",
    ]


def _model_lines(kind: str, config: SupervisedConfig, plan: Plan, dtype: torch.dtype, device: torch.device) -> list[str]:
    try:
        model = supported_model(config.model.name, config.lora)
        shape = read_shape(model, config.lora)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [f"no estimate of memory and time: the configuration of {config.model.name} cannot be had ({reason})"]
    check_length(config.max_length, config.model.name, model.config.max_position_embeddings)
    default = default_learning_rate(shape.hidden_size, model.config.model_type, "dpo" if kind == "dpo" else "sft")
    peak = default if config.learning_rate is None else config.learning_rate
    rate = product_rate(dtype, device)
    return [
        rate_line(peak, config.optim),
        *memory_lines(shape, config, plan, dtype, device),
        *time_lines(shape, plan, rate, str(dtype).removeprefix("torch.")),
    ]


def rate_line(peak: float, optim: OptimConfig) -> str:
    return f"rate     {peak:.3g} at its peak, {optim.schedule} after {optim.warmup_steps} steps of warm-up"


def served_line(info: ModelInfo) -> str:
    return f"served   by {info.device}: memory and time are that machine's"


def model_without_weights(name: str) -> PreTrainedModel:
    """The modules of a model on the meta device. OSError or ValueError when its configuration cannot be had."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from core.models import local_model

    config = AutoConfig.from_pretrained(local_model(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def supported_model(name: str, lora: LoraConfig) -> PreTrainedModel:
    """The model without weights, or UsageError for one, or an adapter of it, that the engine would refuse."""
    from core.datum import LoraConfig as AdapterConfig
    from core.decoder import Decoder
    from core.door import check_rank
    from core.lora import Geometry, Matrix, Site

    model = model_without_weights(name)
    wanted = AdapterConfig(
        rank=lora.rank, train_mlp=lora.train_mlp, train_attn=lora.train_attn, train_unembed=lora.train_unembed
    )
    try:
        Decoder.refuse_unhonoured(type(model).__name__, model.config)
        sites = [Site(name, kind, linear.in_features, (Matrix(name, linear.out_features),))
                 for kind, found in linears(model).items() for name, linear in found.items()]  # fmt: skip
        if (geometry := Geometry.of([site for site in sites if site.kind != "other"], wanted)).sites:
            check_rank(lora.rank, geometry)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return model


def linears(model: PreTrainedModel) -> dict[str, dict[str, nn.Linear]]:
    """Its linear layers by kind, then by name."""
    from torch import nn

    head = model.get_output_embeddings()
    kinds: dict[str, dict[str, nn.Linear]] = {"attn": {}, "mlp": {}, "unembed": {}, "other": {}}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = "attn" if ".self_attn." in name else "mlp" if ".mlp." in name else "other"
            kinds["unembed" if module is head else kind][name] = module
    return kinds


def read_shape(model: PreTrainedModel, lora: LoraConfig) -> Shape:
    """ValueError for a model whose layers are not Llama-like."""
    kinds = {kind: list(found.values()) for kind, found in linears(model).items()}
    first: dict[str, nn.Linear] = {}
    for found in linears(model).values():
        for name, module in found.items():
            first.setdefault(name.rsplit(".", 1)[-1], module)
    if missing := {"q_proj", "k_proj", "v_proj", "down_proj"} - first.keys():
        raise ValueError(f"{type(model).__name__} lacks {sorted(missing)}, it is not a Llama-like decoder")
    wanted = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    adapted = [module for kind, trained in wanted.items() if trained for module in kinds[kind]]
    q_size = first["q_proj"].out_features
    return Shape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_multiplied=sum(module.weight.numel() for group in kinds.values() for module in group),
        num_adapted=lora.rank * sum(module.in_features + module.out_features for module in adapted),
        num_layers=model.config.num_hidden_layers,
        hidden_size=first["q_proj"].in_features,
        qkv_size=q_size + first["k_proj"].out_features + first["v_proj"].out_features,
        q_size=q_size,
        intermediate_size=first["down_proj"].in_features,
    )


def activation_bytes(shape: Shape, element: int) -> int:
    """Bytes kept per token between forward and backward."""
    from core import machine

    sizes = shape.hidden_size, shape.qkv_size, shape.q_size, shape.intermediate_size
    return machine.activation_bytes(shape.num_layers, *sizes, element)


def token_budget(asked: int | None, shape: Shape, element: int, device: torch.device) -> int:
    """Tokens per micro-batch that the engine would choose; on CUDA from what is free once the base model is loaded."""
    if asked:
        return asked
    from core import machine

    return machine.token_budget(device, activation_bytes(shape, element), element, reserved=shape.num_parameters * element)


def memory_lines(shape: Shape, config: EnginesConfig, plan: Plan, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Base, adapter (fp32 weights, gradient and two moments, a copy and a gradient in the compute dtype), activations.

    A lower bound: attention weights and what the allocator keeps come on top. While a base is loaded on a CPU it is there
    twice, as the mapped file and as joined matrices.
    """
    element = dtype.itemsize
    budget = token_budget(config.engine.token_budget, shape, element, device)
    rows = min(max(budget, plan.longest), int(plan.step_tokens) or 1)  # a longer sequence stands alone
    copies = 2 if device.type == "cpu" else 1
    parts = {
        f"base {shape.num_parameters / 1e6:,.4g}M parameters": copies * shape.num_parameters * element,
        f"adapter {shape.num_adapted / 1e6:,.3g}M parameters": shape.num_adapted * (16 + 2 * element),
        f"activations of {rows:,} tokens": rows * activation_bytes(shape, element),
    }
    held = int(peak_memory_gb() * 1e9) if device.type == "cpu" else 0
    if held:
        parts["libraries and data"] = held
    named = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    lines = [f"memory   at least {sum(parts.values()) / 1e9:.1f} GB on {device}: {named}"]
    free = free_bytes(device)
    if free is not None and sum(parts.values()) > free + held:
        lines.append(f"         more than the {free / 1e9:.1f} GB that are free now")
    return lines


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new allocation could have; None when this system does not tell."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def time_lines(shape: Shape, plan: Plan, rate: float, dtype: str) -> list[str]:
    """Forward and backward are 4 FLOP per weight and token (base weights get no gradient), an evaluation 2."""
    tokens = 4 * plan.train_tokens + 2 * (plan.num_evals * plan.eval_tokens + plan.reference_tokens)
    seconds = tokens * shape.num_multiplied / (EXPECTED_SHARE * rate)
    return [
        f"time     about {duration(seconds)}, once the model is loaded; assumes {EXPECTED_SHARE:.0%} of the rate of",
        f"         matrix products measured now, {rate / 1e9:,.0f} GFLOP/s in {dtype} (4 FLOP per weight and token)",
    ]


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of matrix products on this machine, measured for MEASURED_SECONDS."""
    import torch

    n = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = left @ right  # not counted: the first one sets the kernel up
    _wait(device)
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < MEASURED_SECONDS:
        torch.mm(left, right, out=out)
        _wait(device)
        count += 1
    return 2 * n**3 * count / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
