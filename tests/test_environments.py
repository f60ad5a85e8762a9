"""Environments by name: their Config, their streams, what is said of a wrong one; what an RL recipe learns from."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cookbook.config import JudgeConfig, PromptsConfig
from cookbook.environments import open_env, problem_stream, problems_of
from cookbook.errors import UsageError
from envs.env import Problem


@dataclass
class Config:
    """The keys that say what an RL recipe learns."""

    seed: int = 0
    env: dict[str, Any] = field(default_factory=dict)
    data: PromptsConfig = field(default_factory=PromptsConfig)
    reward: str | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def said(problem: Problem) -> str:
    first: Any = problem.make(1)[0].reset()
    return str(first[-1]["content"])


def refused(env: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as raised:
        problem_stream(env, "train", 0)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_an_env_section_becomes_the_modules_own_config() -> None:
    module, config = open_env({"name": "arithmetic", "digits": 3})
    assert isinstance(config, module.Config) and (config.digits, config.terms) == (3, 2)


def test_a_stream_can_be_entered_anywhere() -> None:
    whole = [said(p) for p in islice(problem_stream({"name": "arithmetic"}, "train", 1), 9)]
    assert [said(p) for p in islice(problem_stream({"name": "arithmetic"}, "train", 1, skip=5), 4)] == whole[5:]
    assert [said(p) for p in islice(problem_stream({"name": "arithmetic"}, "train", 2), 9)] != whole


def test_a_wrong_env_is_answered_in_one_line() -> None:
    assert refused({}).startswith("nothing to learn: env=arithmetic")
    assert refused({"name": "arithmetik"}).startswith("env.name=arithmetik: no such env (did you mean arithmetic?); there are ")
    assert refused({"name": "arithmetic", "digts": 3}) == "env=arithmetic: unknown key digts (did you mean digits?)"
    assert refused({"name": "arithmetic", "digits": "many"}).startswith("env=arithmetic: Value 'many' of type 'str'")
    assert refused({"name": "arithmetic", "digits": 0}).startswith("env.digits=0 ")
    assert refused({"name": "gsm8k", "path": "none.jsonl"}).startswith("env")


def test_an_env_without_problems_says_so(tmp_path: Path) -> None:
    """Eval problems run out where the range is a single number; asked for beyond their end there are just no more."""
    env = {"name": "guess_number", "low": 1, "high": 20}
    count = len(list(problem_stream(env, "eval", 0)))
    assert count and list(problem_stream(env, "eval", 0, skip=count)) == []


def test_a_recipe_learns_from_an_env_or_from_prompts(tmp_path: Path) -> None:
    assert said(next(problems_of(Config(env={"name": "arithmetic"}), "train"))).startswith("What is ")
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi", "answer": "ho"}\n')
    (tmp_path / "my.py").write_text("def score(completions, answer): return [1.0]\n")
    prompts = PromptsConfig(path=str(tmp_path / "p.jsonl"))
    assert said(next(problems_of(Config(data=prompts, reward=f"{tmp_path}/my.py:score"), "train"))) == "hi"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(), "nothing to learn: env=arithmetic (`cook envs` lists them), or data=prompts.jsonl reward=my.py:score"),
        (
            Config(env={"name": "arithmetic"}, reward="my.py:f"),
            "reward my.py:f: an env has its own reward; this one is for prompts of your own: data=prompts.jsonl reward=my.py:f",
        ),
        (
            Config(env={"name": "arithmetic"}, data=PromptsConfig(path="p.jsonl")),
            "env=arithmetic and data=p.jsonl: give one of them (or env=null)",
        ),
        (
            Config(data=PromptsConfig(path="none.jsonl"), reward="shlex:quote"),
            "reward shlex:quote: a reward function takes `completions`, as in def score(completions, **columns)",
        ),
    ],
)
def test_what_a_recipe_cannot_learn_from_is_answered_in_one_line(config: Config, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        problems_of(config, "train")
    assert str(raised.value) == message
