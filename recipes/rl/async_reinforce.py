"""REINFORCE with advantages, off policy: later batches are sampled while this one trains.

    at step k: begin the attempts of step k + N with the weights of now, wait for those of step k, train on them

What differs from recipes/rl/reinforce.py is this one argument of Session; read that one first. A batch is at most N =
max_steps_off_policy updates stale (less at the start and after a resume, when nothing was under way; async/staleness). The
ratio r_t = p_now(token t) / p_sampled(token t) of the loss corrects for it, with the sampler's own logprobs, so kl/* and
ratio/* now show how far the policy has moved since. N = 0 is reinforce, to the bit.

An attempt that spans an update finishes with the weights that it began with: all its tokens come from one policy, and a slow
one has N steps before anyone waits for it. Nothing is thrown away for its age. A checkpoint counts the problems trained
on; those under way when the run ended are attempted anew by later weights, so a resumed run takes the same problems in the
same order, but is not the uninterrupted one. Nor do equal runs repeat to the bit: what is decoded together depends on time.

Left out: newer weights in the middle of an attempt, a clip (loss_fn=ppo and cispo have one), and resample_constant (the
problems that come next are under way already).

    uv run cook rl recipe=async_reinforce
    uv run cook rl recipe=async_reinforce env=calculator max_steps_off_policy=2
"""

from __future__ import annotations

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
    max_steps_off_policy: int = 1  # later steps whose attempts are under way while one trains; 0: none


def main(config: Config) -> None:
    with Run(config, "rl/async_reinforce", best=f"eval/{eval_name(config)}/reward", best_is="max") as run:
        session = Session(run, config, config.max_steps_off_policy)
        trainer = session.trainer
        for step in session.steps():
            groups = session.sample(step)  # begun up to N steps ago; begins those of step + N
            data_PD: list[list[Datum]] = []
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
            metrics["async/staleness"] = session.staleness

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
