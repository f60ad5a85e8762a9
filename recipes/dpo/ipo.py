"""Identity preference optimisation: drive the difference of log ratios to a fixed gap instead of ever further.

    h = (log p - log p_ref)(chosen) / tokens - (log p - log p_ref)(rejected) / tokens
    loss = (h - 1 / (2 beta))^2

the mean over the pairs of a batch. What differs from recipes/dpo/pairs.py is the loss; read that one first. Ratios are means
over each reply's tokens, so that beta means the same for short and long replies. Left out: label smoothing (the square is
bounded already). Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036.

    uv run cook dpo recipe=ipo
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cookbook.dpo import Part, Scored, Session, check_between, share_of_mean
from cookbook.preferences import Pair, load_pairs
from cookbook.run import Run
from recipes.dpo.pairs import Shared

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Config(Shared):
    beta: float = 0.1  # the gap aimed at is 1 / (2 beta) nats per token: 5 at 0.1; larger keeps the policy nearer

    def __post_init__(self) -> None:
        check_between("beta", self.beta, 0)


def main(config: Config) -> None:
    with Run(config, "dpo/ipo", best="eval/held_out/accuracy", best_is="max") as run:
        session = Session(run, config, load_pairs, partial(score, config))
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
    assert part.reference is not None
    chosen_P, rejected_P = ((sums - part.reference) / part.lengths).view(-1, 2).unbind(1)
    loss_P = (chosen_P - rejected_P - 1 / (2 * config.beta)) ** 2
    return Scored(loss_P, config.beta * chosen_P, config.beta * rejected_P)
