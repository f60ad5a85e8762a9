"""Kahneman-Tversky optimisation: learn from replies that are each wanted or not, without pairs.

    reward(reply) = beta (log p(reply) - log p_ref(reply))        summed over the reply's tokens
    z = beta max(0, mean over the batch of (log p - log p_ref)(a prompt with a reply to another one))
    loss = desirable_weight (1 - sigmoid(reward - z))             of a wanted reply
           undesirable_weight (1 - sigmoid(z - reward))           of the others

the mean over the replies of a batch; z, an estimate of the policy's distance from the reference, has no gradient. What differs
from recipes/dpo/pairs.py is the loss and what a batch is made of; read that one first. Pairs are taken apart into their two
replies. Left out: weights that balance the classes by themselves. In evaluations z is that of the last step; a batch
with a single prompt has z = 0.
Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306.

    uv run cook dpo recipe=kto
    uv run cook dpo recipe=kto data=file data.path=rated.jsonl      # prompt, completion, label
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cookbook.dpo import Part, Scored, Session, check_between, reply_sums, share_of_mean
from cookbook.errors import UsageError
from cookbook.preferences import Rated, load_rated, mismatched
from cookbook.run import Run
from recipes.dpo.pairs import Shared

if TYPE_CHECKING:
    from torch import Tensor

    from cookbook.service import Trainer
    from core import Datum


@dataclass
class Config(Shared):
    beta: float = 0.1  # what a nat more than the reference gives is worth; larger keeps the policy nearer to it
    desirable_weight: float = 1.0  # of wanted replies; raise it when there are fewer of them
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        for key in ("beta", "desirable_weight", "undesirable_weight"):
            check_between(key, getattr(self, key), 0)
        if self.batch_size < 2:
            raise UsageError(f"batch_size={self.batch_size}: kto needs replies to other prompts, give at least 2")


def main(config: Config) -> None:
    with Run(config, "dpo/kto", best="eval/held_out/accuracy", best_is="max") as run:
        session = Session(run, config, load_rated, partial(score, config))
        trainer, reference = session.trainer, session.reference
        assert reference is not None
        for step in session.steps():
            parts = session.batch(step)
            units = [unit for part in parts for unit in part.units]
            others = mismatched([unit.reply for unit in units], config.max_length)
            z = config.beta * max(0.0, distance(trainer, reference, others)) if others else 0.0
            session.score = partial(score, config, z=z)
            gradients = []
            for part in parts:
                loss = share_of_mean(session.score, part, len(units))
                gradients.append(trainer.forward_backward_custom(part.data, loss, logprobs="weighted"))
            update = session.optim_step(step)
            session.finish(step, parts, gradients, update, {"dpo/z": z})


def distance(trainer: Trainer, reference: Trainer, data: list[Datum]) -> float:
    """The mean of log p - log p_ref over the replies of `data`, in nats."""
    asked = [client.forward(data, "cross_entropy", logprobs="weighted") for client in (trainer, reference)]
    now_B, then_B = (reply_sums(data, [o["logprobs"] for o in f.result().loss_fn_outputs]) for f in asked)
    return float((now_B - then_B).mean())


def score(config: Config, part: Part[Rated], sums: Tensor, z: float = 0.0) -> Scored:
    """`sums` [B]: log p of each reply."""
    assert part.reference is not None
    reward_B = config.beta * (sums - part.reference)
    wanted_B = reward_B.new_tensor([unit.desirable for unit in part.units]).bool()
    good_B = config.desirable_weight * (1 - (reward_B - z).sigmoid())
    bad_B = config.undesirable_weight * (1 - (z - reward_B).sigmoid())
    return Scored(good_B.where(wanted_B, bad_B), reward_B[wanted_B], reward_B[~wanted_B])
