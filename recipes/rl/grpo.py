"""GRPO (arXiv 2402.03300): REINFORCE with advantages, divided by their group's standard deviation, and PPO's clip.

    advantage = (reward - mean reward of the group) / (standard deviation of its rewards + 1e-4)
    loss = - sum_t min(r_t * advantage, clip(r_t, .8, 1.2) * advantage) / number of sampled tokens

What differs from recipes/rl/reinforce.py is these two lines; read that one first. The clip matters from the second substep
on, so a batch is cut into two by default. Left out: the mean over each reply by itself (it makes long wrong replies cheap,
arXiv 2503.20783), and the KL penalty in the loss; kl_penalty puts one into the advantages here too.

    uv run cook rl recipe=grpo
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from cookbook.rl import Session, eval_name
from cookbook.rollout_metrics import kind_of
from cookbook.run import Run
from cookbook.schedule import adam_at
from cookbook.trajectories import data_of
from core import Datum
from recipes.rl import reinforce
from recipes.rl.reinforce import cut, mean_over_sampled_tokens, penalise_distance, results


@dataclass
class Config(reinforce.Config):
    loss_fn: str = "ppo"  # as in reinforce
    num_substeps: int = 2


def main(config: Config) -> None:
    with Run(config, "rl/grpo", best=f"eval/{eval_name(config)}/reward", best_is="max") as run:
        session = Session(run, config)
        trainer = session.trainer
        for step in session.steps():
            groups = session.sample(step)
            data_PD: list[list[Datum]] = []
            for group in groups:
                if kind_of(group) != "mixed":
                    continue
                rewards_G = [trajectory.reward for trajectory in group.trajectories]
                mean, deviation = statistics.fmean(rewards_G), statistics.stdev(rewards_G)
                data_PD.append([])
                for trajectory in group.trajectories:
                    if trajectory.truncated and config.truncated == "mask":
                        continue
                    trajectory.advantage = (trajectory.reward - mean) / (deviation + 1e-4)
                    data_PD[-1] += data_of(trajectory, trajectory.advantage)
            metrics = penalise_distance(session.reference, data_PD, config.kl_penalty) if session.reference else {}

            batches = cut(data_PD, config.num_substeps)
            adam = adam_at(step, config.steps, session.peak_learning_rate, config.optim)
            submitted = []
            for batch in batches:
                batch = mean_over_sampled_tokens(batch, config.loss_fn)
                gradient = trainer.forward_backward(batch, config.loss_fn, config.loss_fn_config, logprobs="weighted")
                submitted.append((gradient, trainer.optim_step(adam)))
            if submitted:
                session.sampler = trainer.save_weights_and_get_sampling_client().result()
            metrics |= {"optim/lr": adam.learning_rate, **results(step, batches, submitted, session.loss_fn_config)}
            session.finish(groups, metrics)
