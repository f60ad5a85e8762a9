"""`cook rl --dry-run`: the first prompt as the policy sees it, how much a run samples and trains on, memory and time."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook.dryrun import (
    Plan,
    memory_lines,
    product_rate,
    rate_line,
    read_shape,
    served_line,
    supported_model,
    time_lines,
)
from cookbook.env_drive import opening
from cookbook.environments import problems_of
from cookbook.errors import UsageError
from cookbook.renderers import load_renderer
from cookbook.rl import RLConfig, check_config, check_off_policy, limits_of, training_problems
from cookbook.schedule import check_optim, default_learning_rate, peak_learning_rate
from cookbook.service import connect, start_of
from cookbook.tool_prompt import told_of_tools
from core.clients import ServiceClient

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cookbook.renderers import Renderer
    from envs.env import Problem


@dataclass(frozen=True)
class Workload:
    """Tokens of a run whose attempts are all one turn with a reply of max_tokens; what a group shares counts once."""

    prompt: int
    num_evaluated: int  # problems at each evaluation
    num_evals: int

    def sampled(self, config: RLConfig) -> int:
        """Per step."""
        return config.groups_per_batch * config.group_size * config.max_tokens

    def plan(self, config: RLConfig) -> Plan:
        trained = config.groups_per_batch * self.prompt + self.sampled(config)
        evaluated = self.num_evaluated * (self.prompt + config.eval.samples * config.max_tokens)
        return Plan(config.steps, trained, evaluated, self.num_evals, self.prompt + config.max_tokens)


def dry_run(config: RLConfig, console: Console) -> None:
    """Print all of it; UsageError where a run would stop."""
    check_config(config)
    check_off_policy(config, getattr(config, "max_steps_off_policy", 0))
    check_optim(config.learning_rate, config.optim)
    service = connect(config.service, Path("checkpoints"), config.engine)
    if config.init_from is not None:
        start_of(service, config.init_from)
    problem = next(training_problems(config, 0, console))
    num_evaluated = sum(1 for _ in itertools.islice(problems_of(config, "eval"), config.eval.problems))
    between = (config.steps - 1) // config.eval_every if config.eval_every > 0 else 0
    prompt = _show_prompt(problem, load_renderer(config.model), console)
    load = Workload(prompt, num_evaluated, 2 + between if num_evaluated else 0)
    if isinstance(service, ServiceClient):
        lines = _model_lines(config, load, *service.options.resolve())
    else:
        info = service.info_of(config.model.name)
        _check_room(config, load, info.base_model, info.max_length)
        lines = [rate_line(peak_learning_rate(config.learning_rate, config.optim, info, "rl"), config.optim), served_line(info)]
    for line in [*_plan_lines(config, load), *lines]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show_prompt(problem: Problem, renderer: Renderer, console: Console) -> int:
    """Its number of tokens."""
    messages, tools = asyncio.run(opening(problem))
    schemas = None
    if tools:
        messages, schemas = told_of_tools(messages, tools, renderer)
    tokens = renderer.build_generation_prompt(messages, schemas).to_ints()
    console.rule(f"the first prompt: {len(tokens)} tokens", align="left")
    console.print(renderer.decode(tokens), markup=False, highlight=False, soft_wrap=True)
    console.rule()
    return len(tokens)


def _plan_lines(config: RLConfig, load: Workload) -> list[str]:
    attempts = f"{config.groups_per_batch} problems with {config.group_size} attempts each"
    sampled = config.steps * load.sampled(config)
    evaluated = f"{load.num_evaluated:,} held-out problems, attempts at each: {config.eval.samples}"
    return [
        f"steps    {config.steps:,} of {attempts}: up to {sampled:,} sampled tokens, {config.max_tokens} a reply and turn",
        f"evals    {load.num_evals} of {evaluated}",
    ]


def _model_lines(config: RLConfig, load: Workload, dtype: torch.dtype, device: torch.device) -> list[str]:
    try:
        model = supported_model(config.model.name, config.lora)
        shape = read_shape(model, config.lora)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [f"no estimate of memory and time: the configuration of {config.model.name} cannot be had ({reason})"]
    _check_room(config, load, config.model.name, model.config.max_position_embeddings)
    default = default_learning_rate(shape.hidden_size, model.config.model_type, "rl")
    peak = default if config.learning_rate is None else config.learning_rate
    plan = load.plan(config)
    cache = plan.step_tokens * shape.num_layers * (shape.qkv_size - shape.q_size) * dtype.itemsize
    # Sampling takes half the FLOP of training, but products of few rows reach half the rate.
    timed = replace(plan, step_tokens=plan.step_tokens + load.sampled(config))
    return [
        rate_line(peak, config.optim),
        *memory_lines(shape, config, plan, dtype, device),
        f"         and keys and values of {plan.step_tokens:,.0f} tokens {cache / 1e9:.2f}, if all are sampled at once",
        *time_lines(shape, timed, product_rate(dtype, device), str(dtype).removeprefix("torch.")),
        "         and one turn an attempt; less where replies are shorter and groups agree, more where an env takes time",
    ]


def _check_room(config: RLConfig, load: Workload, model: str, most: int) -> None:
    context = limits_of(config, model, most).context
    assert context is not None
    if load.prompt >= context:
        raise UsageError(f"the first prompt has {load.prompt:,} tokens, the context {context:,}: there is no room for a reply")
