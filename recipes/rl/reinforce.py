"""REINFORCE with advantages: sample several attempts at each problem, and make those above their group's mean likelier.

    advantage = reward - mean reward of the group
    loss = - sum_t r_t * advantage / number of sampled tokens      over the batch; r_t = p_now(token t) / p_sampled(token t)

With r = 1, which it is up to rounding when every batch is sampled by the weights it trains, the gradient is REINFORCE's:
new weights = weights + rate * advantage * gradient of log p. One loop for single replies, several turns, games and
tools: the env decides. Every sampled token of the batch counts the same, whoever's reply it is in.

Left out: a clip (on policy there is nothing to clip; loss_fn=ppo has one), division by the group's standard deviation
(it makes hard and easy problems louder: recipes/rl/grpo.py), a value network, an entropy bonus, and the KL penalty unless
asked for. Groups that agree have only zero advantages; they are dropped, or others sampled in their place.

    uv run cook rl                                             # SmolLM2-135M learns to add, minutes on a CPU
    uv run cook rl env=guess_number                            # several turns
    uv run cook rl data=file data.path=prompts.jsonl reward=my.py:score
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cookbook.config import EngineConfig, JudgeConfig, LogConfig, LoraConfig, ModelConfig, OptimConfig, PromptsConfig
from cookbook.limits import Limits
from cookbook.rl import EvalConfig, Session, eval_name, policy_metrics
from cookbook.rollout_metrics import kind_of
from cookbook.run import Run
from cookbook.schedule import adam_at
from cookbook.trajectories import data_of
from core import Datum, ForwardBackwardOutput, Future, OptimStepOutput

if TYPE_CHECKING:
    from cookbook.service import Trainer


@dataclass
class Config:
    name: str | None = None  # of the run; null: made from model, env and time
    run_dir: str | None = None  # null: runs/<name>
    seed: int = 0  # adapter init, order of problems, sampling
    steps: int = 100  # batches of rollouts, each trained on once
    groups_per_batch: int = 32  # problems per step
    group_size: int = 16  # attempts at each problem
    max_tokens: int = 512  # of one reply
    temperature: float = 1.0  # of sampling; the trainer's logprobs are at 1
    loss_fn: str = "importance_sampling"  # importance_sampling | ppo | cispo | dro | gspo
    loss_fn_config: dict[str, float] = field(default_factory=dict)  # clip_low_threshold, clip_high_threshold; beta (dro)
    num_substeps: int = 1  # optimizer steps that a batch is cut into
    kl_penalty: float = 0.0  # nats of distance from the policy at step 0 are taken off the advantage times this
    truncated: str = "keep"  # keep | mask (not trained on) | penalise (reward - 1), for rollouts with a reply cut short
    resample_constant: int = 0  # rounds of other problems in place of groups that agree
    learning_rate: float | None = None  # peak; null: the model's default (printed at the start)
    init_from: str | None = None  # a run, a tinker:// URI or an adapter directory to start from
    eval_every: int = 10  # steps; 0: only before and after
    save_every: int = 20  # steps; 0: only at the end (the best evaluated weights are saved too)
    save_minutes: float = 10.0  # also after so many minutes; 0: never
    keep_last: int = 3  # checkpoints kept, beside the best and the final one
    service: str = "local"  # local, the URL of a server, or tinker: the hosted one
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    env: dict[str, Any] = field(default_factory=lambda: {"name": "arithmetic"})  # its keys: cook rl env=NAME --cfg job
    data: PromptsConfig = field(default_factory=PromptsConfig)
    reward: str | None = None  # file.py:function of the shape f(completions, **columns) -> list[float], or judge
    rewards: dict[str, float] = field(default_factory=dict)  # several: file.py:function -> weight
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    limits: Limits = field(default_factory=Limits)
    eval: EvalConfig = field(default_factory=EvalConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(schedule="constant", warmup_steps=0))
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)


def main(config: Config) -> None:
    with Run(config, "rl/reinforce", best=f"eval/{eval_name(config)}/reward", best_is="max") as run:
        session = Session(run, config)  # opens the model and the problems, or the newest checkpoint; evaluates at step 0
        trainer = session.trainer
        for step in session.steps():
            groups = session.sample(step)
            data_PD: list[list[Datum]] = []  # of each group that teaches something
            for group in groups:
                if kind_of(group) != "mixed":
                    continue
                baseline = sum(trajectory.reward for trajectory in group.trajectories) / len(group.trajectories)
                data_PD.append([])
                for trajectory in group.trajectories:
                    if trajectory.truncated and config.truncated == "mask":
                        continue
                    trajectory.advantage = trajectory.reward - baseline
                    data_PD[-1] += data_of(trajectory, trajectory.advantage)
            metrics = penalise_distance(session.reference, data_PD, config.kl_penalty) if session.reference else {}

            batches = cut(data_PD, config.num_substeps)
            adam = adam_at(step, config.steps, session.peak_learning_rate, config.optim)
            submitted = []
            for batch in batches:  # none when all groups agree: nothing moves then, momentum included
                batch = mean_over_sampled_tokens(batch, config.loss_fn)
                gradient = trainer.forward_backward(batch, config.loss_fn, config.loss_fn_config, logprobs="weighted")
                submitted.append((gradient, trainer.optim_step(adam)))
            if submitted:
                session.sampler = trainer.save_weights_and_get_sampling_client().result()
            metrics |= {"optim/lr": adam.learning_rate, **results(step, batches, submitted, session.loss_fn_config)}
            session.finish(groups, metrics)


def penalise_distance(reference: Trainer, data_PD: list[list[Datum]], weight: float) -> dict[str, float]:
    """Take weight * (log p_sampled - log p_reference) off the advantage of each sampled token, less its mean over the batch.

    In expectation that is the gradient of -weight * KL(policy || reference), token by token; the mean is a baseline.
    """
    import torch

    data = [datum for data_D in data_PD for datum in data_D]
    if not data:
        return {}
    asked = [Datum(d.model_input, {key: d.loss_fn_inputs[key] for key in ("target_tokens", "weights")}) for d in data]
    outputs = reference.forward(asked, "cross_entropy", logprobs="weighted").result().loss_fn_outputs
    distances, sampled = [], [torch.as_tensor(datum.loss_fn_inputs["weights"]) for datum in data]
    for datum, weights, output in zip(data, sampled, outputs, strict=True):
        distances.append((torch.as_tensor(datum.loss_fn_inputs["logprobs"]) - output["logprobs"]) * weights)
    mean = sum(float(distance.sum()) for distance in distances) / sum(float(weights.sum()) for weights in sampled)
    for datum, weights, distance in zip(data, sampled, distances, strict=True):
        torch.as_tensor(datum.loss_fn_inputs["advantages"]).sub_(weight * (distance - mean) * weights)
    return {"kl/base": mean}


def cut(data_PD: list[list[Datum]], num_substeps: int) -> list[list[Datum]]:
    """Batches of whole groups, as equal in their number as can be; fewer where there are fewer groups."""
    dealt = [data_PD[first::num_substeps] for first in range(num_substeps)]
    batches = [[datum for data_D in part for datum in data_D] for part in dealt]
    return [batch for batch in batches if batch]


def mean_over_sampled_tokens(batch: list[Datum], loss_fn: str) -> list[Datum]:
    """The engine sums, the recipe averages: weights, 1 on sampled tokens, divided by their sum over the batch."""
    import torch

    weights = [torch.as_tensor(datum.loss_fn_inputs["weights"]) for datum in batch]
    total = sum(float(one.sum()) for one in weights)
    averaged = [{**d.loss_fn_inputs, "weights": one / total} for d, one in zip(batch, weights, strict=True)]
    if loss_fn == "gspo":  # its ratio is that of all sampled tokens of a sequence
        averaged = [{**inputs, "sequence_ratio_mask": one} for inputs, one in zip(averaged, weights, strict=True)]
    return [Datum(datum.model_input, inputs) for datum, inputs in zip(batch, averaged, strict=True)]


def results(
    step: int,
    batches: Sequence[Sequence[Datum]],
    submitted: Sequence[tuple[Future[ForwardBackwardOutput], Future[OptimStepOutput]]],
    loss_fn_config: dict[str, float],
) -> dict[str, float]:
    """Metrics of the update; FloatingPointError with the step for one that could not be made."""
    if not submitted:
        return {}
    outputs = [gradient.result() for gradient, _ in submitted]
    try:
        norms = [update.result().metrics["grad_norm:mean"] for _, update in submitted]
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step + 1}: {error}") from error
    return {"optim/grad_norm": sum(norms) / len(norms), **policy_metrics(batches, outputs, loss_fn_config)}
