"""Simple preference optimisation: the mean log-probability of a reply is its reward; there is no reference.

    reward(reply) = beta log p(reply) / tokens
    loss = -log sigmoid(chosen reward - rejected reward - gamma)

the mean over the pairs of a batch. What differs from recipes/dpo/pairs.py is the loss, and that no reference is asked; read
that one first. Left out: an SFT term. Meng et al., "SimPO", arXiv 2405.14734.

    uv run cook dpo recipe=simpo
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cookbook.dpo import Part, Scored, Session, check_between, logsigmoid, share_of_mean
from cookbook.preferences import Pair, load_pairs
from cookbook.run import Run
from recipes.dpo.pairs import Shared

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Config(Shared):
    beta: float = 2.0  # what a nat per token is worth
    gamma: float = 1.0  # by how much the chosen reward is to exceed the rejected one

    def __post_init__(self) -> None:
        check_between("beta", self.beta, 0)


def main(config: Config) -> None:
    with Run(config, "dpo/simpo", best="eval/held_out/accuracy", best_is="max") as run:
        session = Session(run, config, load_pairs, partial(score, config), with_reference=False)
        for step in session.steps():
            parts = session.batch(step)
            num_pairs = sum(len(part.units) for part in parts)
            gradients = []
            for part in parts:
                loss = share_of_mean(session.score, part, num_pairs)
                gradients.append(session.trainer.forward_backward_custom(part.data, loss, logprobs="weighted"))
            update = session.optim_step(step)
            session.finish(step, parts, gradients, update)


def score(config: Config, part: Part[Pair], sums: Tensor) -> Scored:
    """`sums` [2P]: log p of each pair's chosen and rejected reply."""
    chosen_P, rejected_P = (config.beta * sums / part.lengths).view(-1, 2).unbind(1)
    loss_P = -logsigmoid(chosen_P - rejected_P - config.gamma)
    return Scored(loss_P, chosen_P, rejected_P)
