"""`cook envs`: every env has its line; a person plays at a terminal; `check` finds what an env does wrong."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cookbook.cli import app, main
from cookbook.env_check import check_problems, try_problem
from cookbook.environments import problem_stream
from envs import MODULES
from envs.env import Attempts, Env, Message, Problem, StepResult


def cook(*words: str, typed: str = "") -> Result:
    return CliRunner().invoke(app, list(words), input=typed)


# List.


def test_every_env_is_listed_with_the_first_line_of_its_docstring() -> None:
    shown = cook("envs").stdout
    assert all(name in shown for name in MODULES) and "Sums in one reply" in shown


# Play.


def test_a_typed_line_is_the_reply_and_the_reward_is_shown() -> None:
    problem = next(problem_stream({"name": "arithmetic", "digits": 2}, "train", 5))
    answer = str((problem.solve([]) or {})["content"])
    right, wrong = (cook("envs", "play", "arithmetic", "digits=2", "--seed", "5", typed=f"{t}\n") for t in (answer, "no"))
    assert "What is " in right.stdout and "reward 1 · correct 1" in right.stdout and "reward 0 · correct 0" in wrong.stdout


def test_several_turns_are_played_and_ctrl_d_leaves() -> None:
    played = cook("envs", "play", "guess_number", typed="0\n0\n")
    assert played.exit_code == 0 and played.stdout.count("from 1 to 20") == 3 and played.stdout.endswith("left\n")


def test_a_person_calls_tools_and_is_told_what_is_wrong_with_a_call() -> None:
    lines = ["/call calculate {1", "/call calculate [1]", "/call calcualte {}", '/call calculate {"expression": "6*7"}', ""]
    shown = cook("envs", "play", "calculator", "--split", "eval", typed="\n".join(lines) + "\n").stdout
    assert "/call calculate(expression: str)" in shown
    for said in ("not JSON", "a call looks like", "did you mean 'calculate'?", "42", "reward 0"):
        assert said in shown


def test_a_wrong_name_or_key_is_answered_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["envs", "play", "arithmetik"]) == 2
    assert capsys.readouterr().err.startswith("error: env=arithmetik: no such env (did you mean arithmetic?)")
    assert main(["envs", "check", "arithmetic", "digts=2"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown key env.digts (did you mean env.digits?)")


# Check.


@pytest.mark.parametrize("name", ["arithmetic", "calculator", "guess_number", "tictactoe"])
def test_our_own_envs_keep_their_word(name: str) -> None:
    checked = cook("envs", "check", name, "-n", "6")
    assert checked.exit_code == 0, checked.stdout
    assert checked.stdout.count(" ok ") >= 3 and "FAILED" not in checked.stdout


class Echo(Env):
    """Reward `right` for the word, `wrong` for anything else; asked to say `shown`."""

    def __init__(self, word: str, right: float = 1.0, wrong: float = 0.0, shown: str | None = None) -> None:
        self.word, self.right, self.wrong, self.shown = word, right, wrong, shown or word

    def reset(self) -> list[Message]:
        return [{"role": "user", "content": f"Say {self.shown}"}]

    def step(self, reply: Message) -> StepResult:
        return StepResult(self.right if reply["content"] == self.word else self.wrong)


def verdicts(train: list[Problem], held_out: list[Problem], again: list[Problem] | None = None) -> list[bool | None]:
    return [verdict.passed for verdict in check_problems(train, held_out, again or train)]


def echoes(words: str, **settings: Any) -> list[Problem]:
    return [Attempts(partial(Echo, word, **settings), word) for word in words]


def test_check_tells_each_broken_promise_from_the_others() -> None:
    assert verdicts(echoes("abc"), echoes("de")) == [True, True, True, True, True]
    assert verdicts(echoes("abc", right=0.5), echoes("de")) == [True, False, True, True, True]
    assert verdicts(echoes("abc", wrong=0.9), echoes("de")) == [True, True, False, True, True]
    assert verdicts(echoes("abc"), echoes("de"), echoes("abd")) == [True, True, True, False, True]
    assert verdicts(echoes("abc"), echoes("cd")) == [True, True, True, True, False]
    assert verdicts(echoes("aaa"), echoes("a")) == [True, True, True, True, None]
    unsolved: list[Problem] = [Attempts(partial(Echo, word)) for word in "abc"]
    assert verdicts(unsolved, echoes("de"))[1] and verdicts(unsolved, unsolved)[1] is None


def test_problems_that_begin_alike_are_told_apart_by_how_they_are_solved() -> None:
    assert verdicts(echoes("abc", shown="it"), echoes("de", shown="it")) == [True, True, True, True, True]


class Talks(Echo):
    def reset(self) -> list[Message]:
        return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


class Breaks(Echo):
    def step(self, reply: Message) -> StepResult:
        raise KeyError("lost")


def test_check_survives_an_env_that_breaks_and_says_how() -> None:
    assert verdicts([Attempts(partial(Talks, "a"), "a")] * 2, echoes("bc"))[0] is False
    broken: list[Problem] = [Attempts(partial(Breaks, "a"), "a")] * 2
    first, *others = check_problems(broken, echoes("bc"), broken)
    assert (first.passed, first.detail) == (False, "KeyError: 'lost'")
    assert others[0].passed and others[2].passed


class Seat(Env):
    """A race: whoever says "go" first wins 1; what was said is seen by the other, who moves next."""

    def __init__(self, mine: asyncio.Queue[str], others: asyncio.Queue[str], first: bool) -> None:
        self.mine, self.others, self.first = mine, others, first

    async def reset(self) -> list[Message]:
        self.heard = "begin" if self.first else await self.mine.get()
        return [{"role": "user", "content": self.heard}]

    async def step(self, reply: Message) -> StepResult:
        if self.heard == "over":
            return StepResult(0.0)
        self.others.put_nowait("over" if (won := reply["content"] == "go") else "your turn")
        if won:
            return StepResult(1.0)
        self.heard = await self.mine.get()
        return StepResult(0.0, done=self.heard == "over", messages=[{"role": "user", "content": self.heard}])


class Race(Problem):
    def make(self, group_size: int) -> list[Env]:
        queues: list[asyncio.Queue[str]] = [asyncio.Queue(), asyncio.Queue()]
        return [Seat(queues[i], queues[1 - i], first=i == 0) for i in (0, 1)] * (group_size // 2)

    def solve(self, messages: Sequence[Message]) -> Message:
        return {"role": "assistant", "content": "go"}


def test_a_game_is_won_by_the_solution_at_every_seat_while_the_others_say_junk() -> None:
    assert verdicts([Race(), Race()], [Race()]) == [True, True, True, True, None]


class Toolbox(Echo):
    """The word must be fetched by a tool; counts how often it was closed."""

    closed = 0

    def __init__(self) -> None:
        super().__init__("secret", shown="what fetch(2) gives")
        self.tools = [self.fetch]

    def fetch(self, times: int) -> str:
        """Fetch the word.

        Args:
            times: How often.
        """
        return "secret"

    def close(self) -> None:
        Toolbox.closed += 1


class Fetching(Problem):
    def make(self, group_size: int) -> list[Env]:
        return [Toolbox() for _ in range(group_size)]

    def solve(self, messages: Sequence[Message]) -> Message:
        if messages[-1]["role"] == "tool":
            return {"role": "assistant", "content": messages[-1]["content"]}
        call = {"type": "function", "function": {"name": "fetch", "arguments": {"times": 2}}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}


def test_a_solution_may_call_tools_and_every_env_is_closed() -> None:
    Toolbox.closed = 0
    trial = asyncio.run(try_problem(Fetching(), "no"))
    assert trial.solved and trial.junk and (trial.solved.reward, trial.junk.reward) == (1.0, 0.0)
    assert [m["role"] for m in trial.solved.messages] == ["user", "assistant", "tool", "assistant"]
    assert Toolbox.closed >= 3
