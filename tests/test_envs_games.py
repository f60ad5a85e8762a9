"""Environments of several seats, and classes of one's own."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cookbook.environments import problem_stream
from cookbook.errors import UsageError
from cookbook.limits import Limits
from cookbook.rollouts import Rollouts
from core import SamplingParams
from envs import own_class, text_games, tictactoe
from envs.env import Env
from tests.scripted_sampler import ScriptedSampler, tiny_renderer

PARAMS = SamplingParams(max_tokens=20)


def games(answer, count: int = 4, group_size: int = 4, **config: int):
    """Rollouts of the first problems, all seats answered by `answer(prompt, params)`."""
    renderer = tiny_renderer()
    problems = list(itertools.islice(tictactoe.problems(tictactoe.Config(**config), "train", 0), count))
    rollouts = Rollouts(renderer, PARAMS, Limits())
    return rollouts.run(problems, ScriptedSampler(answer, renderer), group_size, (0,))


def last_message(prompt: str) -> str:
    return prompt.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0]


def by_the_book(prompt: str, _: SamplingParams) -> str:
    board = tictactoe.seen(last_message(prompt))
    assert board
    return tictactoe.best_move(board)


def test_two_perfect_players_draw_and_both_are_trained() -> None:
    for group in games(by_the_book, opening=1):  # after two moves at random one of them may be lost
        assert [t.reward for t in group.trajectories] == [tictactoe.DRAW] * 4
        assert all(t.metrics["drawn"] == 1 and t.metrics["illegal"] == 0 and t.transitions for t in group.trajectories)


def test_a_win_for_one_seat_is_a_loss_for_the_other() -> None:
    def lowest(prompt: str, _: SamplingParams) -> str:
        board = tictactoe.seen(last_message(prompt))
        assert board
        return tictactoe.free(board)[0]

    for group in games(lowest, count=8):
        for first, second in zip(group.trajectories[::2], group.trajectories[1::2], strict=True):
            assert first.reward + second.reward == 1.0


def test_an_illegal_move_is_told_and_the_next_one_loses() -> None:
    (group,) = games(lambda prompt, params: "12", count=1, group_size=2)
    assert [t.reward for t in group.trajectories] == [0.0, 0.0]
    assert all(t.metrics["illegal"] == 2 for t in group.trajectories)
    assert any("12 is not free: reply with one of" in str(m["content"]) for m in group.trajectories[0].messages)


def test_squares_are_read_from_the_drawing() -> None:
    board = "X2O4X6789"
    assert tictactoe.seen(f"Your move:\n\n{tictactoe.drawn(board)}") == board and tictactoe.seen("no board") is None


# ---- a class of one's own

OURS = '''
from envs.env import Attempts, Env, Problem, StepResult

class Parity(Env):
    def __init__(self, number=0, seed=0):
        self.number = number or seed

    def reset(self):
        return [{"role": "user", "content": f"Is {self.number} odd?"}]

    def step(self, reply):
        return StepResult(float(("yes" in reply["content"]) == bool(self.number % 2)))

class Unfinished(Env):
    def reset(self):
        return []

class Theirs:
    """TRL's shape."""

    def __init__(self):
        self.reward = 0.0

    def reset(self, number=0, **row):
        self.number = number
        return f"Double {number}, then say done."

    def double(self, value: int) -> str:
        """Double a number.

        Args:
            value: What to double.
        """
        self.reward = float(value == self.number)
        return str(2 * value)

def several(split, seed, count=3):
    return (Attempts(lambda n=n: Parity(n), str(n)) for n in range(count))

def wants_more(config, split, seed):
    return iter(())

def nothing(split, seed):
    pass

def texts(split, seed):
    yield "a problem"

def breaks(split, seed):
    yield Attempts(Parity)
    raise KeyError("no\\nsuch row")

class Broken(Problem):
    def __init__(self, seed):
        self.number = 1 / 0

    def make(self, group_size):
        return []
'''


@pytest.fixture
def module(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(OURS)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"number": {n}, "prompt": "Go."}}\n' for n in range(1, 21)))
    return str(tmp_path / "mine.py")


def first_env(config: own_class.Config) -> Env:
    return next(own_class.problems(config, "train", 0)).make(1)[0]


def test_an_env_class_gets_a_seed_or_the_columns_it_names(module: str) -> None:
    env = first_env(own_class.Config(cls=f"{module}:Parity"))
    assert "odd?" in env.reset()[0]["content"]  # type: ignore[index]
    rows = str(Path(module).parent / "rows.jsonl")
    numbers = {p.make(1)[0].number for p in itertools.islice(own_class.problems(  # type: ignore[attr-defined]
        own_class.Config(cls=f"{module}:Parity", path=rows), "train", 0), 40)}  # fmt: skip
    assert numbers <= set(range(1, 21)) and len(numbers) > 10


def test_a_class_in_trls_shape_has_its_methods_as_tools(module: str) -> None:
    rows = str(Path(module).parent / "rows.jsonl")
    problem = next(own_class.problems(own_class.Config(cls=f"{module}:Theirs", path=rows), "train", 0))
    renderer = tiny_renderer()

    def answer(prompt: str, _: SamplingParams) -> str:
        if "<|im_start|>tool" in prompt:
            return "done"
        number = last_message(prompt).split("Double ")[-1].split(",")[0]
        return f'<tool_call>\n{{"name": "double", "arguments": {{"value": {number}}}}}\n</tool_call>'

    params = SamplingParams(max_tokens=200)
    (group,) = Rollouts(renderer, params, Limits()).run([problem], ScriptedSampler(answer, renderer), 2, (0,))
    assert [t.error for t in group.trajectories] == [None, None] and [t.reward for t in group.trajectories] == [1.0, 1.0]
    assert all(t.metrics["tool_calls"] == 1 and t.metrics["tool_errors"] == 0 for t in group.trajectories)


def test_a_function_gives_problems_by_itself(module: str) -> None:
    config = own_class.Config(cls=f"{module}:several", args={"count": 2})
    assert len(list(own_class.problems(config, "train", 0))) == 2


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (None, "env.cls is missing"),
        ("nowhere.py:X", "nowhere.py"),
        ("{module}:Missing", "Missing"),
        ("{module}:Unfinished", "has yet to define step"),
        ("{module}", "expected file.py:Name or module:Name"),
    ],
)
def test_what_is_no_class_is_one_line(module: str, cls: str | None, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        first_env(own_class.Config(cls=cls and cls.format(module=module)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said", "line"),
    [
        ("wants_more", "TypeError: wants_more() missing 1 required positional argument: 'config'", "def wants_more"),
        ("nothing", "TypeError: 'NoneType' object is not iterable", "def nothing"),
        ("texts", "TypeError: yielded str, expected envs.env.Problem", "def texts"),
        ("breaks", "KeyError: 'no\\nsuch row'", "raise KeyError"),
        ("Broken", "ZeroDivisionError: division by zero", "1 / 0"),
    ],
)
def test_what_code_of_ones_own_raises_is_one_line(module: str, name: str, said: str, line: str) -> None:
    number = next(i for i, text in enumerate(Path(module).read_text().splitlines(), 1) if line in text)
    with pytest.raises(UsageError) as caught:
        list(problem_stream({"name": "class", "cls": f"{module}:{name}"}, "train", 0))
    assert str(caught.value) == f"env.cls={module}:{name}: {said} (mine.py:{number})"


def test_a_game_of_textarena_is_played_to_its_end() -> None:
    pytest.importorskip("textarena")
    problem = next(text_games.problems(text_games.Config(game="GuessTheNumber-v0"), "train", 0))
    renderer = tiny_renderer()
    sampler = ScriptedSampler(lambda prompt, params: "[7]", renderer)
    (group,) = Rollouts(renderer, PARAMS, Limits()).run([problem], sampler, 2, (0,))
    assert [t.error for t in group.trajectories] == [None] * len(group.trajectories) and group.trajectories


def test_runs_that_are_threads_may_load_one_class_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(f"import time\ntime.sleep(0.2)\n{OURS}")
    with ThreadPoolExecutor(4) as pool:
        envs = list(pool.map(lambda _: first_env(own_class.Config(cls=f"{tmp_path}/slow.py:Parity")), range(4)))
    assert len({type(env) for env in envs}) == 1
