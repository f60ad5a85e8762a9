"""`cook rl` on a tiny model and prompts of one's own: the update is REINFORCE's, and the run keeps its promises."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cookbook.cli import main
from cookbook.errors import UsageError
from cookbook.limits import Limits
from cookbook.rl import EvalConfig, check_config, policy_metrics
from cookbook.trajectories import Trajectory, Transition, data_of
from core import Datum, ForwardBackwardOutput, ModelInput
from recipes.rl import grpo
from recipes.rl.reinforce import Config, cut, mean_over_sampled_tokens, penalise_distance
from tests.small_runs import MOMENTS, checkpoint_rows, contents, metrics, newest, read_lines, result, write_rows
from tests.tiny import new_client, tiny_model_dir, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def data(advantage: float = 1.0, seed: int = 0, num_tokens: int = 4, logprob: float = -5.0) -> list[Datum]:
    """A prompt of 6 tokens and a reply."""
    turn = Transition(ModelInput.from_ints(tokens(6, seed)), tokens(num_tokens, seed + 1), [logprob] * num_tokens, "stop")
    return data_of(Trajectory(transitions=[turn]), advantage)


def values(datum: Datum, key: str) -> list[float]:
    return torch.as_tensor(datum.loss_fn_inputs[key]).tolist()


# ---- the update


def test_every_sampled_token_of_a_batch_counts_the_same() -> None:
    short, long = mean_over_sampled_tokens(data(num_tokens=2) + data(num_tokens=8), "importance_sampling")
    assert values(short, "weights") == pytest.approx([0.0] * 5 + [0.1] * 2)
    assert values(long, "weights") == pytest.approx([0.0] * 5 + [0.1] * 8)


def test_gspo_takes_its_ratio_over_the_sampled_tokens() -> None:
    (datum,) = mean_over_sampled_tokens(data(), "gspo")
    assert values(datum, "sequence_ratio_mask") == [0.0] * 5 + [1.0] * 4


def test_substeps_are_cut_between_groups() -> None:
    groups = [data(seed=i) * 2 for i in range(5)]
    first, second = cut(groups, 2)
    assert first == groups[0] + groups[2] + groups[4] and second == groups[1] + groups[3]
    assert cut(groups[:1], 3) == [groups[0]] and cut([], 2) == [] and cut([[]], 1) == []


def test_the_kl_penalty_sits_on_sampled_tokens_only(tmp_path: Path) -> None:
    reference = new_client(tmp_path)
    before, after = data(0.5) + data(-0.5, seed=7), data(0.5) + data(-0.5, seed=7)
    kl = penalise_distance(reference, [after[:1], after[1:]], 0.1)["kl/base"]
    changes = []
    for old, new in zip(before, after, strict=True):
        change = torch.as_tensor(new.loss_fn_inputs["advantages"]) - torch.as_tensor(old.loss_fn_inputs["advantages"])
        assert change[:5].tolist() == [0.0] * 5
        asked = Datum(old.model_input, {"target_tokens": old.loss_fn_inputs["target_tokens"]})
        logprobs = reference.forward([asked], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
        assert torch.allclose(change[5:], -0.1 * (-5.0 - logprobs[5:] - kl), atol=1e-5)
        changes += change[5:].tolist()
    assert sum(changes) == pytest.approx(0.0, abs=1e-5)  # the mean is a baseline
    assert penalise_distance(reference, [], 0.1) == {}


def test_kl_and_ratio_metrics_compare_trainer_and_sampler() -> None:
    output = ForwardBackwardOutput([{"logprobs": torch.tensor([9.0] * 5 + [-5.0, -5.0, -5.5, -4.0])}])
    found = policy_metrics([data()], [output], {})
    assert found["kl/sample_train_v1"] == pytest.approx((0.5 - 1.0) / 4)  # prompt positions do not enter
    assert found["kl/sample_train_v2"] == pytest.approx((0.25 + 1.0) / 8)
    assert found["kl/max_abs_dlogprob"] == 1.0 and found["ratio/p99"] == pytest.approx(2.71828, rel=1e-4)
    assert found["ratio/clip_frac"] == 0.5
    assert policy_metrics([data()], [output], {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0})["ratio/clip_frac"] == 0


def test_the_ratio_of_gspo_is_that_of_a_sequence() -> None:
    outputs = [{"logprobs": torch.tensor([9.0] * 5 + gaps) - 5.0} for gaps in ([0.5, -0.5, 0.2, -0.2], [0.1, 0.1, 0.1, 0.3])]
    batch, bounds = data() + data(seed=3), {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4}
    asked = mean_over_sampled_tokens(batch, "gspo")
    found = policy_metrics([asked], [ForwardBackwardOutput(outputs)], bounds)
    assert found["ratio/clip_frac"] == 0.5 and found["ratio/p99"] == pytest.approx(math.exp(0.15))
    of_tokens = policy_metrics([batch], [ForwardBackwardOutput(outputs)], bounds)
    assert of_tokens["ratio/clip_frac"] == 1.0 and found["kl/max_abs_dlogprob"] == of_tokens["kl/max_abs_dlogprob"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss_fn": "pp0"}, "loss_fn=pp0: expected one of importance_sampling, ppo, cispo, dro, gspo (did you mean ppo?)"),
        ({"loss_fn": "cross_entropy"}, "loss_fn=cross_entropy: expected one of"),
        ({"loss_fn_config": {"clip": 0.2}}, "loss_fn_config of importance_sampling has no key 'clip'"),
        ({"group_size": 1}, "group_size=1: an advantage compares attempts"),
        ({"temperature": 0.0}, "temperature=0: expected more than 0"),
        ({"truncated": "drop"}, "truncated=drop: expected one of keep, mask, penalise"),
        ({"num_substeps": 0}, "num_substeps=0: expected at least 1"),
        ({"kl_penalty": float("nan")}, "kl_penalty=nan"),
        ({"limits": Limits(tool_calls=-1)}, "limits.tool_calls=-1: expected at least 0"),
        ({"limits": Limits(turns=0)}, "limits.turns=0: expected at least 1"),
        ({"eval": EvalConfig(problems=-1)}, "eval.problems=-1: expected at least 0"),
        ({"eval": EvalConfig(samples=0)}, "eval.samples=0: expected at least 1"),
        ({"eval": EvalConfig(temperature=math.inf)}, "eval.temperature=inf: expected a number from 0 on"),
    ],
)
def test_what_no_run_could_be_made_of_is_one_line(change: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_config(replace(Config(), **change))  # type: ignore[arg-type]
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_grpo_is_reinforce_with_other_defaults() -> None:
    changed = {key for key, value in vars(grpo.Config()).items() if value != vars(Config())[key]}
    assert changed == {"loss_fn", "num_substeps"}


# ---- runs


REWARDS = """
import itertools, math

scored = itertools.count()

def letters(completions, **columns):
    return [text.count("a") / 8 for text in completions]

def same_later(completions, **columns):
    return letters(completions) if next(scored) < 32 else [1.0]

def sometimes(completions, prompt_number, **columns):
    if prompt_number[0] % 3 == 0:
        raise KeyError("no such row")
    return [math.nan] if prompt_number[0] % 3 == 1 else letters(completions)

def never(completions, **columns):
    raise KeyError("no such row")
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.jsonl and rewards.py."""
    folder = tmp_path_factory.mktemp("task")
    write_rows(folder / "prompts.jsonl", ({"prompt": f"say {i}", "prompt_number": i} for i in range(40)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def rl(run_dir: Path, task: Path, *words: str, reward: str = "letters") -> int:
    """The exit status of `cook rl`: 4 problems, 8 attempts of 8 tokens, a second or two."""
    return main([
        "rl", "data=file", f"data.path={task}/prompts.jsonl", f"reward={task}/rewards.py:{reward}",
        f"model.name={tiny_model_dir()}", "engine.dtype=float32", "engine.device=cpu", "lora.rank=4",
        "steps=6", "groups_per_batch=4", "group_size=8", "max_tokens=8", "learning_rate=0.02",
        "eval_every=3", "eval.problems=4", "save_every=2", f"run_dir={run_dir}", *words,
    ])  # fmt: skip


def repeatable(run_dir: Path) -> list[dict]:
    clock = ("time/", "perf/")
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in metrics(run_dir)]


def rollouts(run_dir: Path) -> dict[str, list[dict]]:
    return {file.stem: read_lines(file) for file in sorted((run_dir / "rollouts").iterdir())}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, task: Path) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert rl(directory, task) == 0
    return directory


def test_it_learns(run: Path) -> None:
    before, after = (result(run)["eval"][phase]["held_out/reward"] for phase in ("before", "after"))
    assert before < 0.3 and after > 0.8
    rewards = [row["env/all/reward"] for row in metrics(run)[1:]]
    assert rewards[-1] > rewards[0] + 0.5


def test_sampler_and_trainer_agree_on_every_step(run: Path) -> None:
    assert max(row.get("kl/max_abs_dlogprob", 0.0) for row in metrics(run)) < 1e-4


def test_the_record_holds_every_attempt_with_its_advantage(run: Path) -> None:
    files = rollouts(run)
    assert set(files) == {*(f"{step:06d}" for step in range(1, 7)), "eval-000000", "eval-000003", "eval-000006"}
    assert [row["problem"] for row in files["000002"]] == [p for p in (4, 5, 6, 7) for _ in range(8)]
    for problem in (4, 5, 6, 7):
        rows = [row for row in files["000002"] if row["problem"] == problem]
        mean = sum(row["reward"] for row in rows) / 8
        if len({row["reward"] for row in rows}) > 1:
            assert [row["advantage"] for row in rows] == pytest.approx([row["reward"] - mean for row in rows])
        else:
            assert {row["advantage"] for row in rows} == {None}
    assert all(len(row["turns"][0]["tokens"]) <= 8 for row in files["000001"])


@pytest.mark.parametrize("words", [(), ("recipe=grpo", "kl_penalty=0.1", "resample_constant=1")], ids=["reinforce", "grpo"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, task: Path, words: tuple[str, ...]) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert rl(straight, task, "eval_every=0", *words) == 0
    shutil.copytree(straight, broken)
    rows = checkpoint_rows(broken)
    (broken / "checkpoints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] == 4))
    assert main(["resume", str(broken)]) == 0
    assert contents(newest(broken)) == contents(newest(straight))
    assert repeatable(broken) == repeatable(straight) and rollouts(broken) == rollouts(straight)


def test_the_kl_penalty_looks_at_where_the_run_began_though_its_source_trains_on(tmp_path: Path, task: Path) -> None:
    source, straight, broken = (tmp_path / name for name in ("source", "straight", "broken"))
    words = ("eval.problems=0", "kl_penalty=0.1", f"init_from={source}")
    assert rl(source, task, "steps=2", "eval.problems=0") == 0
    assert rl(straight, task, "steps=4", *words) == 0
    assert metrics(straight)[0]["kl/base"] == pytest.approx(0.0, abs=1e-4)
    shutil.copytree(straight, broken)
    (broken / "checkpoints.jsonl").write_text(json.dumps(checkpoint_rows(broken)[0]) + "\n")
    assert main(["resume", str(source), "steps=4"]) == 0
    assert main(["resume", str(broken)]) == 0
    assert contents(newest(broken)) == contents(newest(straight)) and repeatable(broken) == repeatable(straight)


def test_groups_that_agree_move_nothing_momentum_included(tmp_path: Path, task: Path) -> None:
    """The first step (32 attempts) trains, so that there is momentum; in the other two all attempts agree."""
    run, words = tmp_path / "run", ("steps=3", "save_every=1", "eval.problems=0")
    assert rl(run, task, *words, reward="same_later") == 0
    rows = [row for row in metrics(run) if row["progress/step"] > 0]
    assert [row["group/frac_all_good"] for row in rows[1:]] == [1.0, 1.0]
    assert ["optim/grad_norm" in row for row in rows] == [True, False, False]
    first, *_, last = (contents(run / row["path"]) for row in checkpoint_rows(run))
    assert any(moment.any() for moment in load_file(run / checkpoint_rows(run)[0]["path"] / MOMENTS).values())
    assert first == last


def test_failing_rewards_are_counted_and_the_run_goes_on(
    tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rl(tmp_path / "run", task, "steps=2", reward="sometimes") == 0
    assert sum(row.get("env/errors/RewardError", 0) for row in metrics(tmp_path / "run")) > 0
    said = [line for line in capsys.readouterr().out.splitlines() if "a rollout failed at problem" in line]
    assert len(said) == 1 and "RewardError" in said[0]


def test_an_evaluation_counts_what_fails_as_nothing_earned(tmp_path: Path, task: Path) -> None:
    assert rl(tmp_path / "run", task, "steps=1", "eval.problems=8", reward="sometimes") == 0
    row, attempts = metrics(tmp_path / "run")[0], rollouts(tmp_path / "run")["eval-000000"]
    failed = [attempt for attempt in attempts if attempt["error"]]
    assert row["eval/held_out/errors/RewardError"] == len(failed) > 0
    assert row["eval/held_out/reward"] == pytest.approx(sum(attempt["reward"] for attempt in attempts) / 8)


def test_a_run_without_a_single_good_rollout_ends_in_one_line(
    tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rl(tmp_path / "short", task, "steps=1", reward="never") == 2
    assert "all rollouts of the only step failed, the last one: RewardError: " in capsys.readouterr().err
    assert rl(tmp_path / "run", task, reward="never") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: all rollouts of 3 steps in a row failed") and "no such row" in error
    assert error.count("\n") == 1


def test_prompts_longer_than_the_context_are_told_with_their_numbers_and_end_the_run(
    tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rl(tmp_path / "run", task, "steps=2", "limits.context=20") == 2
    screen = capsys.readouterr()
    told = [line for line in screen.out.splitlines() if "a rollout ended without a reply at problem" in line]
    assert len(told) == 1 and "limits.context=20, the prompt has " in told[0]
    assert screen.err.startswith("error: all rollouts of 2 steps in a row failed, the last one: limits.context=20")
    assert all(row["env/limits/context"] == 32 for row in metrics(tmp_path / "run") if row["progress/step"])


@pytest.mark.parametrize(
    "words",
    [
        ("loss_fn=ppo", "num_substeps=2"),
        ("loss_fn=cispo", "loss_fn_config.clip_high_threshold=2"),
        ("loss_fn=dro", "loss_fn_config.beta=0.1"),
        ("loss_fn=gspo", "truncated=penalise"),
        ("truncated=mask", "eval.samples=4", "eval.temperature=1"),
    ],
    ids=lambda words: words[0],
)
def test_other_losses_and_choices_run(tmp_path: Path, task: Path, words: tuple[str, ...]) -> None:
    assert rl(tmp_path / "run", task, "steps=2", *words) == 0
    assert len(metrics(tmp_path / "run")) == 3


# ---- the embedded model


@pytest.mark.slow
def test_the_embedded_model_learns_to_add_within_eight_steps(tmp_path: Path) -> None:
    assert main(["rl", "steps=8", "eval.problems=0", "save_every=0", f"run_dir={tmp_path / 'run'}"]) == 0
    rewards = [row["env/all/reward"] for row in metrics(tmp_path / "run") if "env/all/reward" in row]
    assert rewards[0] < 0.4 and max(rewards[-2:]) > 0.8
