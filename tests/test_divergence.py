"""What has diverged, by the rows of its metrics.jsonl; and what is only noisy, slow or unlucky."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from cookbook.divergence import has_diverged


def rows(name: str, values: Sequence[float]) -> list[dict[str, float]]:
    return [{"progress/step": float(step), name: value} for step, value in enumerate(values, start=1)]


def rl_rows(rewards: Sequence[float], entropies: Sequence[float]) -> list[dict[str, float]]:
    """As RL recipes log them: the first row, of evaluations, has neither."""
    pairs = zip(rewards, entropies, strict=True)
    return [{"progress/step": 0.0}, *({"env/all/reward": reward, "sampling/entropy": entropy} for reward, entropy in pairs)]


@pytest.mark.parametrize("name", ["train/nll", "train/loss", "dpo/loss"])
def test_a_loss_above_twice_its_first_for_three_steps_has_diverged(name: str) -> None:
    assert has_diverged(rows(name, [2.0, 1.9, 4.1, 4.2, 4.3]))
    assert has_diverged(rows(name, [2.0, 4.1, 4.2, 4.3, 1.0]))  # as it would have been told in time
    assert not has_diverged(rows(name, [2.0, 4.1, 4.2, 3.9, 4.3, 4.4]))


@pytest.mark.parametrize("name", ["train/nll", "dpo/loss", "dpo/chosen_shift", "env/all/reward"])
def test_what_is_not_finite_has_diverged(name: str) -> None:
    assert has_diverged(rows(name, [1.0, math.nan])) and has_diverged(rows(name, [1.0, math.inf]))


def test_a_first_batch_that_simpo_had_right_already_is_no_measure() -> None:
    assert not has_diverged(rows("dpo/loss", [0.04, 3.76, 0.65, 1.05, 1.32, 0.79, 1.03, 0.28, 0.14]))
    assert has_diverged(rows("dpo/loss", [0.04, 3.76, 4.65, 11.05]))


def test_kto_has_diverged_when_wanted_replies_are_lost_though_its_loss_is_bounded() -> None:
    shifts, losses = [0.0, -4.4, -0.2, -7.0, -36.4, -56.0, -118.4], [0.5, 0.71, 0.55, 0.65, 0.5, 0.25, 0.5]
    found = [{"dpo/loss": loss, "dpo/chosen_shift": shift} for loss, shift in zip(losses, shifts, strict=True)]
    assert has_diverged(found) and not has_diverged(found[:6])
    assert not has_diverged(rows("dpo/chosen_shift", [0.0, -0.4, -1.7, -1.4, -3.2, 0.9, 3.2, -12.0, -1.8, 0.9]))


def test_a_policy_that_samples_the_same_or_anything_and_lost_half_its_reward_has_diverged() -> None:
    rewards = [0.80, 0.41, 0.25, 0.25, 0.25, 0.25, 0.25]
    assert has_diverged(rl_rows(rewards, [1.1, 2.5, *[0.001] * 5]))
    assert not has_diverged(rl_rows(rewards, [1.1, 2.5, *[0.001] * 5])[:-1])
    assert has_diverged(rl_rows(rewards, [1.1, *[7.0] * 6]))
    assert has_diverged(rl_rows([-0.2, *[-1.0] * 5], [1.1, *[0.0] * 5]))


def test_noise_sparse_rewards_and_a_policy_that_has_made_up_its_mind_have_not_diverged() -> None:
    draw = random.Random(0)
    for chance in (0.02, 0.1, 0.5):
        rewards = [sum(draw.random() < chance for _ in range(8)) / 8 for _ in range(400)]
        entropies = [draw.uniform(0.7, 1.3) for _ in rewards]
        assert not has_diverged(rl_rows(rewards, entropies))
        assert not has_diverged(rl_rows([2 * reward - 1 for reward in rewards], entropies))
    assert not has_diverged(rl_rows([0.02, *[0.0] * 13, 0.21, 0.72], [0.4] * 16))
    assert not has_diverged(rl_rows([0.2, 0.3, 0.6, *[0.95] * 10], [1.1, 1.0, 0.3, *[0.002] * 10]))
    assert not has_diverged(rl_rows([0.0] * 20, [4.7, *[10.0] * 19]))  # it never had a reward to lose
