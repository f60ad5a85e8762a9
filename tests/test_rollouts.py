"""Rollouts: what the policy and the env tell each other, what ends an attempt, and what a failure may touch."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cookbook.config import DataConfig
from cookbook.data import prepare
from cookbook.errors import UsageError
from cookbook.generate import Config as GenerateConfig
from cookbook.generate import _rows as generated_rows
from cookbook.limits import Limits
from cookbook.rollout_metrics import env_metrics, eval_metrics, kind_of, pass_at, step_metrics
from cookbook.rollouts import Group, Rollouts, rollout, seed_of
from cookbook.row_report import RowReport
from cookbook.trajectories import Trajectory
from core import SamplingParams
from envs.env import Attempts, Env, Message, Problem, StepResult
from tests.scripted_sampler import CUT, ScriptedSampler, tiny_renderer
from tests.small_runs import write_rows

RENDERER = tiny_renderer()
TOOL_RENDERER = tiny_renderer(
    Path(__file__).parent.parent.joinpath("cookbook/templates/chatml.jinja").read_text(encoding="utf-8")
)
PARAMS = SamplingParams(max_tokens=128, stop=RENDERER.stop)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def sampler(answer: Callable[[str, SamplingParams], str] | str, renderer=RENDERER, **options: float) -> ScriptedSampler:
    return ScriptedSampler((lambda prompt, params: answer) if isinstance(answer, str) else answer, renderer, **options)


def play(env: Env, client: ScriptedSampler, seed: tuple[int | str, ...] = (0,), **limits: object) -> Trajectory:
    return asyncio.run(rollout(env, client, client.renderer, PARAMS, replace(Limits(), **limits), seed))


def run(problems: list[Problem], client: ScriptedSampler, group_size: int = 2, first: int = 0, **limits: object) -> list[Group]:
    rollouts = Rollouts(client.renderer, PARAMS, replace(Limits(), **limits))
    return rollouts.run(problems, client, group_size, (7, "train", 0), first)


def last_line(prompt: str) -> str:
    """What the model was asked last."""
    return prompt.rpartition("<|im_end|>")[0].rpartition("\n")[2]


class Ask(Env):
    """Asks once; `judge` makes a StepResult, or whatever else, of the reply."""

    def __init__(self, judge: Callable[[Message], object] = lambda reply: StepResult(1.0), question: str = "?") -> None:
        self.judge, self.question = judge, question
        self.closed = 0

    def reset(self) -> list[Message]:
        return [{"role": "user", "content": self.question}]

    def step(self, reply: Message) -> StepResult:
        return self.judge(reply)  # type: ignore[return-value]

    def close(self) -> None:
        self.closed += 1


class Stuck(Ask):
    """Never begins."""

    def __init__(self, release: threading.Event) -> None:
        super().__init__()
        self.release = release

    def reset(self) -> list[Message]:
        self.release.wait(20)
        return super().reset()


class CountDown(Env):
    """Three, two, one: a turn each, a tenth of reward for every reply."""

    def __init__(self, left: int = 3) -> None:
        self.left = left

    async def reset(self) -> list[Message]:
        return [{"role": "user", "content": str(self.left)}]

    async def step(self, reply: Message) -> StepResult:
        self.left -= 1
        next_turn = [{"role": "user", "content": str(self.left)}]
        return StepResult(0.1, done=not self.left, messages=next_turn, metrics={"left": self.left})


class Adder(Ask):
    def __init__(self) -> None:
        super().__init__(lambda reply: StepResult(float("5" in reply["content"])))
        self.tools = [self.add]

    def add(self, a: int, b: int) -> str:
        """Add two numbers.

        Args:
            a: One.
            b: The other.
        """
        return str(a + b)


# ---- one attempt


def test_a_reply_is_judged_as_a_message_and_kept_as_tokens() -> None:
    seen: list[Message] = []
    env = Ask(lambda reply: seen.append(reply) or StepResult(2.0, metrics={"correct": 1}))
    client = sampler("four")
    trajectory = play(env, client)
    assert seen == [{"role": "assistant", "content": "four"}]
    assert trajectory.reward == 2.0 and trajectory.metrics == {"correct": 1.0} and trajectory.ended == "done"
    (turn,) = trajectory.transitions
    assert RENDERER.decode(turn.tokens) == "four<|im_end|>" and turn.logprobs == [-0.5] * len(turn.tokens)
    assert turn.observation.to_ints() == client.requests[0][0]
    assert turn.ended == "stop" and not trajectory.truncated
    assert trajectory.messages == [{"role": "user", "content": "?"}, *seen]
    assert env.closed == 1


def test_each_turn_sees_what_was_sampled_before_token_for_token() -> None:
    client = sampler(lambda prompt, params: f"{last_line(prompt)} it is")
    trajectory = play(CountDown(), client)
    assert [m["content"] for m in trajectory.messages] == ["3", "3 it is", "2", "2 it is", "1", "1 it is", "0"]
    assert trajectory.reward == pytest.approx(0.3) and trajectory.metrics == {"left": 0}
    for before, after in zip(trajectory.transitions, trajectory.transitions[1:], strict=False):
        written = before.observation.to_ints() + before.tokens
        assert after.observation.to_ints()[: len(written)] == written


def test_a_reply_cut_short_goes_to_the_env_and_is_known_as_such() -> None:
    trajectory = play(Ask(lambda reply: StepResult(float(reply["content"] == "fo"))), sampler("fo" + CUT))
    assert trajectory.reward == 1.0 and trajectory.truncated and trajectory.transitions[0].ended == "length"


def test_what_looks_like_a_call_is_text_where_there_are_no_tools() -> None:
    trajectory = play(Ask(lambda reply: StepResult(float(reply == {"role": "assistant", "content": CALL}))), sampler(CALL))
    assert trajectory.reward == 1.0


# ---- tools


@pytest.mark.parametrize("renderer", [TOOL_RENDERER, RENDERER], ids=["template with tools", "template without"])
def test_a_talk_with_tools_trains_on_the_prompts_that_the_policy_saw(renderer, tmp_path: Path) -> None:
    """As `cook generate` writes it."""
    client = sampler(lambda prompt, params: "It is 5." if "<|im_start|>tool\n5<|im_end|>" in prompt else CALL, renderer)
    (group,) = run([Attempts(Adder)], client, group_size=1)
    written = write_rows(tmp_path / "made.jsonl", generated_rows(group, GenerateConfig(), True))
    read, _ = prepare(DataConfig(name="file", path=str(written)), renderer, 4000)
    ((sequence,),) = read(RowReport())
    (turn, last) = group.trajectories[0].transitions
    assert sequence.tokens.tolist()[: last.observation.length] == last.observation.to_ints()
    assert sequence.tokens.tolist()[turn.observation.length :][: len(turn.tokens)] == turn.tokens


@pytest.mark.parametrize("renderer", [TOOL_RENDERER, RENDERER], ids=["template with tools", "template without"])
def test_tools_are_told_called_and_answered(renderer) -> None:
    client = sampler(lambda prompt, params: "It is 5." if "<|im_start|>tool\n5<|im_end|>" in prompt else CALL, renderer)
    trajectory = play(Adder(), client)
    assert trajectory.reward == 1.0 and trajectory.ended == "done"
    assert trajectory.metrics == {"tool_calls": 1, "tool_errors": 0}
    assert [m["role"] for m in trajectory.messages if m["role"] != "system"] == ["user", "assistant", "tool", "assistant"]
    first, second = (renderer.decode(tokens) for tokens, _ in client.requests)
    assert '"name": "add"' in first and "Add two numbers." in first
    assert second.startswith(first + CALL + "<|im_end|>\n<|im_start|>tool\n5<|im_end|>")


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (CALL.replace("add", "sub"), "unknown_tool", "unknown tool 'sub'"),
        (CALL.replace('"b"', '"c"'), "bad_arguments", "no argument 'c'"),
        (CALL.replace("}}", "}"), "malformed", "cannot be read"),
    ],
)
def test_a_bad_call_is_counted_and_answered(call: str, kind: str, said: str) -> None:
    client = sampler(lambda prompt, params: "5" if "error:" in prompt else call, TOOL_RENDERER)
    trajectory = play(Adder(), client)
    assert said in trajectory.messages[2]["content"] and trajectory.messages[2]["role"] == "tool"
    assert trajectory.metrics == {"tool_calls": 1, "tool_errors": 1, f"tool_errors/{kind}": 1}
    assert trajectory.reward == 1.0 and trajectory.error is None


# ---- limits


@pytest.mark.parametrize(
    ("limits", "ended", "met", "num_turns"),
    [
        ({"turns": 2}, "turns", "limits.turns=2, the env asked for more", 2),
        ({"tokens": 7}, "tokens", "limits.tokens=7, all are sampled", 2),  # 5 tokens a reply
        ({"context": 40}, "context", "limits.context=40, the prompt has 46 tokens", 1),
    ],
)
def test_limits_end_an_attempt_with_the_rewards_it_has(limits: dict[str, int], ended: str, met: str, num_turns: int) -> None:
    trajectory = play(CountDown(), sampler("four"), **limits)
    assert trajectory.limit == met and trajectory.failure is None
    assert trajectory.ended == ended and trajectory.error is None
    assert len(trajectory.transitions) == num_turns and trajectory.reward == pytest.approx(0.1 * num_turns)


def test_a_reply_has_no_more_room_than_the_limits_leave() -> None:
    client = sampler("four")
    play(CountDown(), client, tokens=7)
    assert [params.max_tokens for _, params in client.requests] == [7, 2]


def test_a_prompt_longer_than_the_context_ends_the_attempt_unsampled() -> None:
    client = sampler("four")
    trajectory = play(Ask(question="?" * 100), client, context=50)
    assert trajectory.ended == "context" and not client.requests and trajectory.reward == 0
    assert str(trajectory.failure).startswith("limits.context=50, the prompt has 1")


def test_calls_beyond_their_limit_are_not_run() -> None:
    trajectory = play(Adder(), sampler(CALL, TOOL_RENDERER), tool_calls=2)
    assert trajectory.ended == "tool_calls" and trajectory.metrics["tool_calls"] == 2
    assert trajectory.failure == "limits.tool_calls=2, the policy asked for 3"
    assert len(trajectory.transitions) == 3


def test_an_env_that_hangs_fails_its_own_attempt_only() -> None:
    """Without a reward there is nothing to learn from: no reward of 0."""
    release = threading.Event()
    envs = [Ask(lambda reply: release.wait(20)), Ask(), Stuck(release)]
    started = time.monotonic()
    (group,) = run([Attempts(iter(envs).__next__)], sampler("x"), group_size=3, seconds=0.3)
    assert time.monotonic() - started < 5
    release.set()
    assert [(t.attempt, t.ended) for t in group.trajectories] == [(1, "done")]
    assert [t.error for t in group.dropped] == [
        f"EnvTimeout: {method} did not end within limits.seconds=0.3" for method in ("step", "reset")
    ]


def test_a_tool_that_hangs_ends_the_attempt_with_the_rewards_it_has() -> None:
    env, release = Adder(), threading.Event()

    def add(a: int, b: int) -> str:
        """Add two numbers.

        Args:
            a: One.
            b: The other.
        """
        release.wait(20)
        return ""

    env.tools = [add]
    trajectory = play(env, sampler(CALL, TOOL_RENDERER), seconds=0.3)
    release.set()
    assert trajectory.ended == "seconds" and trajectory.error is None and len(trajectory.transitions) == 1
    assert trajectory.failure == "limits.seconds=0.3, a tool was still at work"


def test_waiting_for_the_sampler_is_not_the_envs_time() -> None:
    assert play(Ask(), sampler("x", seconds=0.4), seconds=0.2).ended == "done"


# ---- failures


def raises(error: BaseException) -> Callable[[Message], object]:
    def judge(reply: Message) -> object:
        raise error

    return judge


@pytest.mark.parametrize(
    ("judge", "kind"),
    [
        (raises(KeyError("x")), "KeyError"),
        (raises(TimeoutError("the judge is away")), "TimeoutError"),
        (raises(SystemExit(3)), "SystemExit"),
        (raises(StopIteration()), "RuntimeError"),
        (raises(asyncio.CancelledError()), "CancelledError"),
        (lambda reply: StepResult(math.nan), "BadReward"),
        (lambda reply: StepResult(math.inf), "BadReward"),
        (lambda reply: 1.0, "TypeError"),
    ],
)
def test_a_failure_is_counted_and_leaves_its_siblings_alone(judge: Callable[[Message], object], kind: str) -> None:
    made: list[Ask] = []

    def new() -> Env:
        made.append(Ask(judge if len(made) == 1 else lambda reply: StepResult(1.0)))
        return made[-1]

    (group,) = run([Attempts(new, tag="t")], sampler("x"), group_size=3)
    assert [t.attempt for t in group.trajectories] == [0, 2] and [t.reward for t in group.trajectories] == [1.0, 1.0]
    (failed,) = group.dropped
    assert failed.error_type == kind and failed.ended == "error" and "\n" not in str(failed.error)
    assert all(env.closed == 1 for env in made)
    metrics = step_metrics([group])
    assert metrics[f"env/errors/{kind}"] == 1 and metrics["env/all/reward"] == metrics["env/t/reward"] == 1.0


def test_an_error_says_where_it_came_from() -> None:
    (group,) = run([Attempts(lambda: Ask(raises(KeyError("x"))))], sampler("x"), group_size=1)
    assert str(group.dropped[0].error).startswith("KeyError: 'x' (test_rollouts.py:")


def test_a_failed_attempt_may_count_as_reward_0() -> None:
    envs = [Ask(), Ask(raises(ValueError("no")))]
    (group,) = run([Attempts(iter(envs).__next__)], sampler("x"), on_error="zero")
    assert [t.reward for t in group.trajectories] == [1.0, 0.0] and not group.dropped
    assert step_metrics([group])["env/errors/ValueError"] == 1


def test_a_policy_on_errors_that_is_none_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"limits.on_error=skip: expected drop or zero"):
        Rollouts(RENDERER, PARAMS, Limits(on_error="skip"))


class Reserved(Ask):
    def reset(self) -> list[Message]:
        raise OSError("no room")


class Unmakeable(Problem):
    def make(self, group_size: int) -> list[Env]:
        raise ValueError("broken row")


def test_a_problem_that_fails_before_the_first_reply_is_counted_too() -> None:
    groups = run([Unmakeable(), Attempts(Reserved), Attempts(Ask)], sampler("x"))
    assert [len(group.trajectories) for group in groups] == [0, 0, 2]
    metrics = step_metrics(groups)
    assert metrics["env/errors/ValueError"] == 1 and metrics["env/errors/OSError"] == 2


def test_what_the_sampler_raises_ends_all_and_closes_the_envs() -> None:
    made: list[Ask] = []

    def new() -> Env:
        made.append(Ask())
        return made[-1]

    def answer(prompt: str, params: SamplingParams) -> str:
        raise RuntimeError("the engine is gone")

    with pytest.raises(RuntimeError, match="the engine is gone"):
        run([Attempts(new)], sampler(answer), group_size=4)
    assert [env.closed for env in made] == [1, 1, 1, 1]


def test_a_failing_close_is_a_metric() -> None:
    class Sticky(Ask):
        def close(self) -> None:
            raise OSError("busy")

    trajectory = play(Sticky(), sampler("x"))
    assert trajectory.reward == 1.0 and trajectory.metrics == {"close_failed": 1}


# ---- groups


def test_groups_come_in_order_with_seeds_of_their_own() -> None:
    client = sampler("x")
    groups = run([Attempts(CountDown), Attempts(CountDown)], client, first=5)
    assert [group.problem for group in groups] == [5, 6]
    seeds = {params.seed for _, params in client.requests}
    expected = {seed_of(7, "train", 0, p, attempt, turn) for p in (5, 6) for attempt in (0, 1) for turn in (0, 1, 2)}
    assert seeds == expected and len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in expected)


def test_first_prompts_are_asked_for_together_and_in_order() -> None:
    """However long each env takes to set up, and though the first answer comes at once."""

    class Slow(Ask):
        def reset(self) -> list[Message]:
            time.sleep(0.02 * (5 - int(self.question)))
            return super().reset()

    def asked(prompt: list[int]) -> str:
        return last_line(RENDERER.decode(prompt))

    client = sampler("x")
    run([Attempts(lambda n=n: Slow(question=str(n))) for n in range(5)], client, group_size=1)
    assert [asked(prompt) for prompt, _ in client.requests] == ["0", "1", "2", "3", "4"]


class Seat(Env):
    """The second to speak hears what the first has said."""

    def __init__(self, number: int, said: asyncio.Queue[str]) -> None:
        self.number, self.said = number, said

    async def reset(self) -> list[Message]:
        return [{"role": "user", "content": await self.said.get() if self.number else "begin"}]

    async def step(self, reply: Message) -> StepResult:
        self.said.put_nowait(reply["content"])
        return StepResult(float(self.number))


class Game(Problem):
    def make(self, group_size: int) -> list[Env]:
        tables: list[asyncio.Queue[str]] = [asyncio.Queue() for _ in range(group_size // 2)]
        return [Seat(number, table) for table in tables for number in (0, 1)]


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_the_seats_of_a_game_wait_for_each_other(group_size: int) -> None:
    client = sampler(lambda prompt, params: "hello" if "begin" in prompt else f"I heard {last_line(prompt)}")
    (group,) = run([Game()], client, group_size)
    games = max(1, group_size // 2)  # one attempt at a game is one game
    assert [t.messages[-1]["content"] for t in group.trajectories] == ["hello", "I heard hello"] * games
    assert [t.reward for t in group.trajectories] == [0.0, 1.0] * games


class Trio(Problem):
    num_seats = 3

    def make(self, group_size: int) -> list[Env]:
        return [Ask() for _ in range(3 * (group_size // 3))]


def test_a_single_attempt_at_a_game_has_all_its_seats() -> None:
    assert [len(run([Trio()], sampler("x"), group_size)[0].trajectories) for group_size in (1, 6)] == [3, 6]


class Ranked(Problem):
    def __init__(self, rewards: object) -> None:
        self.rewards = rewards

    def make(self, group_size: int) -> list[Env]:
        return [Ask() for _ in range(group_size)]

    def group_rewards(self, trajectories) -> list[float] | None:
        return self.rewards  # type: ignore[return-value]


def test_rewards_of_the_group_are_added() -> None:
    (plain, ranked) = run([Ranked(None), Ranked([0.5, -0.5])], sampler("x"))
    assert [t.reward for t in plain.trajectories] == [1.0, 1.0]
    assert [t.reward for t in ranked.trajectories] == [1.5, 0.5]


@pytest.mark.parametrize("rewards", [[1.0], [1.0, math.nan], "no"])
def test_bad_rewards_of_a_group_fail_that_group(rewards: object) -> None:
    bad, good = run([Ranked(rewards), Ranked([1.0, 2.0])], sampler("x"))
    assert not bad.trajectories and len(bad.dropped) == 2
    assert [t.reward for t in good.trajectories] == [2.0, 3.0]


class Slow(Ranked):
    def group_rewards(self, trajectories) -> list[float] | None:
        assert isinstance(self.rewards, threading.Event)
        self.rewards.wait(20)


def test_rewards_of_a_group_that_never_come_fail_that_group() -> None:
    release, started = threading.Event(), time.monotonic()
    bad, good = run([Slow(release), Ranked([1.0, 2.0])], sampler("x"), seconds=0.3)
    assert time.monotonic() - started < 5
    release.set()
    assert {t.error for t in bad.dropped} == {"EnvTimeout: group_rewards did not end within limits.seconds=0.3"}
    assert len(bad.dropped) == 2 and [t.reward for t in good.trajectories] == [2.0, 3.0]


def test_many_envs_at_once_are_no_burden() -> None:
    started = time.monotonic()
    groups = run([Attempts(Ask)] * 32, sampler("x"), group_size=16)
    assert sum(len(group.trajectories) for group in groups) == 512
    assert time.monotonic() - started < 5


# ---- numbers


def trajectory(reward: float, **metrics: float) -> Trajectory:
    return Trajectory(reward=reward, metrics=dict(metrics))


def test_metrics_are_means_over_those_that_have_them() -> None:
    group = Group(0, "", [trajectory(1.0, correct=1, format=1), trajectory(0.0, format=0), trajectory(0.5)])
    assert env_metrics([group]) == {"reward": 0.5, "correct": pytest.approx(1 / 3), "format": 0.5, "turns": 0}


def test_groups_that_agree_are_good_or_bad() -> None:
    groups = [
        Group(0, "a", [trajectory(1.0), trajectory(0.0)]),
        Group(1, "a", [trajectory(1.0), trajectory(1.0)]),
        Group(2, "b", [trajectory(0.1 + 0.2, correct=0), trajectory(0.3, correct=0)]),
        Group(3, "b", []),
    ]
    assert [kind_of(group) for group in groups] == ["mixed", "all_good", "all_bad", "empty"]
    metrics = step_metrics(groups)
    assert [metrics[f"group/frac_{kind}"] for kind in ("mixed", "all_good", "all_bad")] == [pytest.approx(1 / 3)] * 3
    assert metrics["env/a/reward"] == 0.75 and metrics["env/b/reward"] == pytest.approx(0.3)


def test_pass_at_k_is_the_chance_that_k_attempts_hold_a_correct_one() -> None:
    assert pass_at(1, 4, 1) == 0.25 and pass_at(2, 4, 1) == 0.5 and pass_at(4, 4, 1) == 1.0 and pass_at(2, 4, 0) == 0.0
    groups = [
        Group(0, "", [trajectory(float(i == 0), correct=float(i == 0)) for i in range(3)]),
        Group(1, "", [trajectory(0.0, correct=0.0) for _ in range(3)]),
    ]
    metrics = eval_metrics(groups, "sums")
    assert metrics["sums/correct"] == pytest.approx(1 / 6)
    assert metrics["sums/pass@2"] == pytest.approx(1 / 3) and metrics["sums/pass@3"] == 0.5


def test_an_evaluation_has_a_line_per_tag_only_where_there_are_several() -> None:
    one, other = Group(0, "a", [trajectory(1.0)]), Group(1, "b", [trajectory(0.0)])
    assert eval_metrics([one], "e") == {"e/reward": 1.0, "e/turns": 0}
    assert {key: value for key, value in eval_metrics([one, other], "e").items() if key.endswith("reward")} == {
        "e/reward": 0.5, "e/a/reward": 1.0, "e/b/reward": 0.0,
    }  # fmt: skip
