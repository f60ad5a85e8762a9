"""The learning rate over the steps, and its default peak."""

from __future__ import annotations

import math

import pytest

from cookbook.config import OptimConfig
from cookbook.errors import UsageError
from cookbook.schedule import default_learning_rate, learning_rate_at


def rates(total: int, **changes: object) -> list[float]:
    optim = OptimConfig(**changes)  # type: ignore[arg-type]
    return [round(learning_rate_at(step, total, 1.0, optim), 6) for step in range(total + 1)]


def test_linear_warms_up_and_falls_to_zero_after_the_last_step() -> None:
    assert rates(6, schedule="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_is_halfway_down_halfway_through() -> None:
    assert rates(4, schedule="cosine", warmup_steps=0) == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.0])


def test_constant_stays_after_the_warm_up() -> None:
    assert rates(4, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_min_ratio_is_where_the_schedule_ends() -> None:
    assert rates(2, schedule="linear", warmup_steps=0, min_ratio=0.1) == [1.0, 0.55, 0.1]
    assert rates(2, schedule="cosine", warmup_steps=0, min_ratio=0.1)[-1] == 0.1


def test_a_run_shorter_than_its_warm_up_still_reaches_the_peak() -> None:
    assert rates(2, schedule="linear", warmup_steps=5)[:2] == [0.5, 1.0]


def test_no_step_of_a_run_has_rate_zero() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert min(rates(50, schedule=schedule)[:-1]) > 0


def test_an_unknown_schedule_names_the_near_one() -> None:
    with pytest.raises(UsageError) as error:
        rates(2, schedule="cosin")
    assert str(error.value) == (
        "optim.schedule=cosin is unknown, did you mean cosine? (it is one of constant, linear, cosine)"
    )


def test_default_rates_follow_width_family_and_recipe() -> None:
    assert default_learning_rate(2000, "llama", "sft") == pytest.approx(5e-4)
    assert default_learning_rate(4096, "llama", "sft") == pytest.approx(5e-4 * (2000 / 4096) ** 0.781)
    assert default_learning_rate(4096, "qwen3", "sft") == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775)
    assert math.isclose(default_learning_rate(576, "llama", "rl"), 0.15 * default_learning_rate(576, "llama", "sft"))
    assert math.isclose(default_learning_rate(576, "llama", "dpo"), 0.05 * default_learning_rate(576, "llama", "sft"))
