"""What RL recipes share around their loop: the model with its sampler, problems and rollouts, evaluation and the record."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from cookbook.config import EngineConfig, LoraConfig, ModelConfig, OptimConfig
from cookbook.environments import Task, problems_of
from cookbook.errors import UsageError
from cookbook.keys import did_you_mean
from cookbook.limits import Limits, check_limits
from cookbook.memory import peak_memory_gb
from cookbook.origin import settle
from cookbook.renderers import load_renderer
from cookbook.rollout_log import most_telling, new_failures, side_by_side, table_rows, write_rollouts
from cookbook.rollout_metrics import eval_metrics, kind_of, step_metrics
from cookbook.rollouts import Group, Rollouts
from cookbook.run import Run, RunConfig
from cookbook.schedule import peak_learning_rate
from cookbook.service import check_vocabulary, connect, new_trainer, opened, resumed
from core import Datum, ForwardBackwardOutput, ModelInfo, SamplingParams
from envs.env import Problem

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cookbook.service import Service, Trainer

TRUNCATED = ("keep", "mask", "penalise")
HOPELESS_STEPS = 3  # in a row in which every rollout failed: nothing will come of the run


@dataclass
class EvalConfig:
    problems: int = 64  # held-out ones at each evaluation; 0: none
    samples: int = 1  # attempts at each; from 2 on pass@k is reported too, with correct = pass@1
    temperature: float = 0.0  # 0: the likeliest token


class RLConfig(Task, RunConfig, Protocol):
    """The keys of a recipe's Config that a Session reads."""

    steps: int
    groups_per_batch: int
    group_size: int
    max_tokens: int
    temperature: float
    learning_rate: float | None
    loss_fn: str
    loss_fn_config: dict[str, float]
    kl_penalty: float
    truncated: str
    resample_constant: int
    num_substeps: int
    init_from: str | None
    eval_every: int
    save_every: int
    save_minutes: float
    service: str
    model: ModelConfig
    lora: LoraConfig
    optim: OptimConfig
    engine: EngineConfig
    limits: Limits
    eval: EvalConfig


def eval_name(config: Task) -> str:
    """Evaluations are logged as eval/<this>/reward: the env's name, or held_out for prompts of one's own."""
    return str(config.env["name"]) if config.env else "held_out"


def training_problems(config: RLConfig, skip: int, console: Console) -> Iterator[Problem]:
    """Problems `skip`, `skip` + 1, ...; UsageError where attempts are seats of games and the first one's leave some over."""
    problems = problems_of(config, "train", skip, console)
    if (first := next(problems, None)) is None:
        return problems
    for key, attempts in (("group_size", config.group_size), ("eval.samples", config.eval.samples)):
        if attempts > 1 and attempts % first.num_seats:  # a single one is one game
            told = f"{key}={attempts}: {first.tag} has {first.num_seats} seats, each of them an attempt"
            raise UsageError(f"{told}; expected a multiple of {first.num_seats}")
    return itertools.chain([first], problems)


@dataclass(frozen=True)
class Round:
    """Attempts under way at some problems, all by the policy as it stood after `policy_step` steps."""

    policy_step: int
    num_problems: int
    groups: concurrent.futures.Future[list[Group]]


class Session:
    """A run of RL between two updates: `for step in session.steps()`, sample, (the recipe trains,) finish.

    Opens the newest checkpoint of the run, else a new adapter; evaluates before the first step. `sampler` is the policy
    that `sample` and evaluations use: the recipe replaces it after an update. `max_steps_off_policy`: the attempts of so
    many later steps are under way while a batch trains; they keep the policy that they began with.
    """

    def __init__(self, run: Run, config: RLConfig, max_steps_off_policy: int = 0) -> None:
        self.run, self.config, self.max_steps_off_policy = run, config, max_steps_off_policy
        self.loss_fn_config = check_config(config)
        check_off_policy(config, max_steps_off_policy)
        service = connect(config.service, run.store, config.engine)
        found = resumed(run, service)
        origin = settle(run, service, config.lora, config.init_from)
        loading = None if found else new_trainer(service, config.model, config.lora, config.seed, origin)
        loop = found[0]["loop"] if found else {}
        self.done = found[0]["step"] if found else 0
        self.num_problems, self.num_episodes, self.num_tokens = (loop.get(key, 0) for key in LOOP)
        self._problems = training_problems(config, self.num_problems, run.console)
        self._num_taken = self.num_problems  # those under way included, which a resumed run attempts anew
        self._under_way: deque[Round] = deque()
        self._held_out: list[Problem] = []
        if config.eval.problems > 0:
            self._held_out += itertools.islice(problems_of(config, "eval"), config.eval.problems)
        renderer = load_renderer(config.model)  # while the model loads
        self.trainer = found[1] if found else opened(loading)
        info = self.trainer.get_info()
        check_vocabulary(renderer.tokenizer, info)
        self.reference = self._open_reference(service, origin) if config.kl_penalty else None
        self.peak_learning_rate = peak_learning_rate(config.learning_rate, config.optim, info, "rl")
        params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, stop=renderer.stop)
        self._texts_of = renderer.texts_of
        self._rollouts = Rollouts(renderer, params, limits_of(config, info.base_model, info.max_length))
        limits = replace(self._rollouts.limits, on_error="zero")  # what fails is no success: none of it is left out
        self._eval_rollouts = Rollouts(renderer, replace(params, temperature=config.eval.temperature), limits)
        self.sampler = self.trainer.save_weights_and_get_sampling_client().result()
        self._known_failures: set[str] = set()
        self._fruitless = 0  # steps in a row
        self._stopping = False
        run.record("engine.token_budget", info.token_budget)
        self._announce(info)
        if not found and self._held_out:
            run.log_eval("before", self._evaluate(0))
        run.begin(config.steps)
        self._last_end = self._last_save = time.monotonic()

    def _announce(self, info: ModelInfo) -> None:
        config = self.config
        self.run.note(
            f"{config.steps} steps of {config.groups_per_batch} problems with {config.group_size} attempts each,"
            f" {config.loss_fn}, learning rate {self.peak_learning_rate:.3g}, {info.dtype} on {info.device}"
        )
        if config.temperature != 1:
            self.run.note(f"temperature={config.temperature:g}: importance ratios compare it with 1, that of the trainer")

    def _open_reference(self, service: Service, origin: str | None) -> Trainer:
        """The policy as it stood at step 0; never stepped, so that a resumed run opens the very same."""
        config = self.config
        return opened(new_trainer(service, config.model, replace(config.lora, rank=1), config.seed, origin))

    def steps(self) -> Iterator[int]:
        """The steps to do, from 0, until the last one or until someone asks to stop."""
        try:
            while self.done < self.config.steps and not self._stopping:
                yield self.done
        finally:  # also when the recipe's block raises
            for later in self._under_way:
                later.groups.cancel()

    def sample(self, step: int) -> list[Group]:
        """Attempts at the next `groups_per_batch` problems, and at others for those whose attempts agree, if asked."""
        started = time.monotonic()
        for later in range(step + len(self._under_way), min(step + self.max_steps_off_policy + 1, self.config.steps)):
            self._under_way.append(self._begin(later, step, self.config.groups_per_batch))
        batch = self._under_way.popleft()
        self.staleness = step - batch.policy_step
        groups = self._end(batch)
        for _ in range(self.config.resample_constant):
            mixed = sum(kind_of(group) == "mixed" for group in groups)
            if mixed >= self.config.groups_per_batch:
                break
            groups += self._end(self._begin(step, step, self.config.groups_per_batch - mixed))
        for line in new_failures(groups, self._known_failures):
            self.run.note(line)
        self._stop_if_hopeless(groups)
        self._sample_seconds, self._sampled_at = time.monotonic() - started, time.monotonic()
        return groups

    def _begin(self, step: int, policy_step: int, num_problems: int) -> Round:
        """Attempts of `step` at the next problems, by the policy as it is now: after `policy_step` steps."""
        problems = list(itertools.islice(self._problems, num_problems))
        if not problems:
            raise UsageError(f"the training problems end after {self._num_taken}: a stream of them should start over")
        seed, first = (self.config.seed, "train", step), self._num_taken
        self._num_taken += len(problems)
        groups = self._rollouts.submit(problems, self.sampler, self.config.group_size, seed, first)
        return Round(policy_step, len(problems), groups)

    def _end(self, begun: Round) -> list[Group]:
        groups = begun.groups.result()
        self.num_problems += begun.num_problems
        if self.config.truncated == "penalise":
            for trajectory in (trajectory for group in groups for trajectory in group.trajectories):
                trajectory.reward -= float(trajectory.truncated)
        return groups

    def _stop_if_hopeless(self, groups: Sequence[Group]) -> None:
        tried = [trajectory for group in groups for trajectory in (*group.trajectories, *group.dropped)]
        self._fruitless = self._fruitless + 1 if all(trajectory.failure for trajectory in tried) else 0
        if self._fruitless == (enough := min(HOPELESS_STEPS, self.config.steps)):
            steps = "the only step" if enough == 1 else f"{enough} steps in a row"
            raise UsageError(f"all rollouts of {steps} failed, the last one: {tried[-1].failure}")

    def finish(self, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Evaluate, log and save what is due after a step; `metrics` are those of the update."""
        config, run = self.config, self.run
        self.done += 1
        trained = time.monotonic() - self._sampled_at
        final, self._stopping = self.done == config.steps, run.should_stop
        eval_due = bool(self._held_out) and (final or _every(config.eval_every, self.done))
        save_due = final or self._stopping or _every(config.save_every, self.done)
        save_due |= 0 < 60 * config.save_minutes < time.monotonic() - self._last_save
        num_sampled = sum(len(turn.tokens) for g in groups for t in g.trajectories for turn in t.transitions)
        self.num_tokens += num_sampled
        self.num_episodes += sum(len(group.trajectories) for group in groups)
        if (eval_due or self.done == 1) and (group := most_telling(groups)):
            run.console.print(side_by_side(group))
        if eval_due:
            run.log_eval("after" if final else "during", self._evaluate(self.done))
            save_due |= run.is_best
        run.add_rows("rollouts", table_rows(groups, self.done))
        write_rollouts(run.dir, self.done, groups, texts_of=self._texts_of)
        seconds, self._last_end = time.monotonic() - self._last_end, time.monotonic()
        run.log(self.done, {
            **step_metrics(groups), **metrics,
            "progress/tokens": self.num_tokens, "progress/episodes": self.num_episodes,
            "progress/done_frac": self.done / config.steps,
            "time/step": seconds, "time/sample": self._sample_seconds, "time/train": trained,
            "perf/sample_tokens_per_second": num_sampled / (seconds if self.max_steps_off_policy else self._sample_seconds),
            "perf/peak_memory_gb": peak_memory_gb(),
        })  # fmt: skip
        if save_due:
            uri = self.trainer.save_state(f"{self.done:06d}", overwrite=True).result().path
            loop: dict[str, object] = dict(zip(LOOP, (self.num_problems, self.num_episodes, self.num_tokens), strict=True))
            run.checkpoint(self.done, uri, loop=loop)
            self._last_save = time.monotonic()

    def _evaluate(self, done: int) -> dict[str, float]:
        """The same problems and seeds at every evaluation."""
        started = time.monotonic()
        seed = (self.config.seed, "eval")
        groups = self._eval_rollouts.run(self._held_out, self.sampler, self.config.eval.samples, seed)
        for line in new_failures(groups, self._known_failures):
            self.run.note(line)
        write_rollouts(self.run.dir, done, groups, name="eval", texts_of=self._texts_of)
        metrics = eval_metrics(groups, eval_name(self.config))
        self.run.note(f"evaluated on {len(groups)} held-out problems in {time.monotonic() - started:.1f} s")
        return metrics


LOOP = ("problems", "episodes", "tokens")  # what a checkpoint keeps of the loop: how many there have been


def policy_metrics(
    data: Sequence[Sequence[Datum]], outputs: Sequence[ForwardBackwardOutput], clip: Mapping[str, float]
) -> dict[str, float]:
    """The trainer's logprobs of sampled tokens against the sampler's, per substep: kl/* of the first, ratio/* of all.

    v1 = mean(q - lp), v2 = mean((q - lp)^2) / 2; before the first update both are the same policy, and what is left is
    the difference between two ways of computing it. A token's ratio is that of its sequence where the loss takes that.
    clip_frac: tokens whose ratio lies outside the loss's bounds, or those of ppo where it has none.
    """
    import torch

    low, high = clip.get("clip_low_threshold", 0.8), clip.get("clip_high_threshold", 1.2)
    pairs = [[(datum, found["logprobs"]) for datum, found in zip(part, output.loss_fn_outputs, strict=True)]
             for part, output in zip(data, outputs, strict=True)]  # fmt: skip
    first = torch.cat([_gap(*pair) for pair in pairs[0]])
    ratio = torch.cat([_log_ratio(*pair) for part in pairs for pair in part]).exp()
    return {
        "kl/sample_train_v1": float(-first.mean()),
        "kl/sample_train_v2": float(first.square().mean() / 2),
        "kl/max_abs_dlogprob": float(first.abs().max()),
        "ratio/p99": float(ratio.sort().values[math.ceil(0.99 * len(ratio)) - 1]),
        "ratio/clip_frac": float(((ratio < low) | (ratio > high)).float().mean()),
    }


def _gap(datum: Datum, logprobs: torch.Tensor, mask: str = "weights") -> torch.Tensor:
    """lp - q of the sampled tokens of a datum, or of those in another mask."""
    import torch

    chosen = torch.as_tensor(datum.loss_fn_inputs[mask]) != 0
    return (logprobs - torch.as_tensor(datum.loss_fn_inputs["logprobs"]))[chosen]


def _log_ratio(datum: Datum, logprobs: torch.Tensor) -> torch.Tensor:
    """Of the sampled tokens: lp - q, or with gspo its mean over the sequence, for each of them."""
    gap = _gap(datum, logprobs)
    if "sequence_ratio_mask" not in datum.loss_fn_inputs:
        return gap
    return _gap(datum, logprobs, "sequence_ratio_mask").mean().expand_as(gap)


def check_config(config: RLConfig) -> dict[str, float]:
    """The loss's configuration with its defaults; UsageError for what no run could be made of."""
    from core import LOSSES
    from core.door import check_config as check_loss_config

    losses = [name for name, loss in LOSSES.items() if "advantages" in loss.required]
    for key, known in (("loss_fn", losses), ("truncated", TRUNCATED)):
        if (value := getattr(config, key)) not in known:
            raise UsageError(f"{key}={value}: expected one of {', '.join(known)}{did_you_mean(value, known)}")
    least = {"steps": 1, "groups_per_batch": 1, "max_tokens": 1, "num_substeps": 1, "resample_constant": 0, "kl_penalty": 0}
    for key, at_least in least.items():
        if not getattr(config, key) >= at_least:
            raise UsageError(f"{key}={getattr(config, key)}: expected at least {at_least}")
    if config.group_size < 2:
        raise UsageError(f"group_size={config.group_size}: an advantage compares attempts, give at least 2")
    if not 0 < config.temperature < math.inf:
        raise UsageError(f"temperature={config.temperature:g}: expected more than 0; attempts must differ to be compared")
    check_limits(config.limits)
    _check_eval(config.eval)
    try:
        return check_loss_config(config.loss_fn, config.loss_fn_config)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_eval(config: EvalConfig) -> None:
    for key, at_least in (("problems", 0), ("samples", 1)):
        if getattr(config, key) < at_least:
            raise UsageError(f"eval.{key}={getattr(config, key)}: expected at least {at_least}")
    if not 0 <= config.temperature < math.inf:
        raise UsageError(f"eval.temperature={config.temperature:g}: expected a number from 0 on")
    if config.samples > 1 and config.temperature == 0:
        raise UsageError(f"eval.samples={config.samples} would all be the same at eval.temperature=0: set it to 1, say")


def check_off_policy(config: RLConfig, max_steps_off_policy: int) -> None:
    if max_steps_off_policy < 0:
        raise UsageError(f"max_steps_off_policy={max_steps_off_policy}: expected at least 0 (wait for every batch)")
    if max_steps_off_policy and config.resample_constant:
        told = f"resample_constant={config.resample_constant} with max_steps_off_policy={max_steps_off_policy}"
        raise UsageError(f"{told}: the problems that come next are under way already; set one of them to 0")


def limits_of(config: RLConfig, base_model: str, max_length: int) -> Limits:
    """The limits with the model's context filled in."""
    context = max_length if config.limits.context is None else config.limits.context
    if context > max_length:
        raise UsageError(f"limits.context={context}, but the context of {base_model} is {max_length} tokens")
    if config.max_tokens >= context:
        raise UsageError(f"max_tokens={config.max_tokens} leaves no room for a prompt in a context of {context} tokens")
    return replace(config.limits, context=context)


def _every(interval: int, done: int) -> bool:
    return interval > 0 and done % interval == 0
