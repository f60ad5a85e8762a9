"""A class of yours, in our protocol or in TRL's shape: env.cls=my_env.py:MyEnv."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import random
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, cast, final

from envs.env import Attempts, Env, Message, Problem, StepResult
from envs.source_file import load_file
from envs.streams import Row, check_split, generator, held_apart, read_jsonl, reshuffled, split_rows

Given: TypeAlias = Callable[..., Any]
NOT_TOOLS = ("reset", "reward", "get_reward", "close")

@dataclass
class Config:
    cls: str | None = None  # file.py:Name or module:Name of an Env, a Problem, a class in TRL's shape, or a `problems` function
    path: str | None = None  # jsonl: a problem a row, whose columns the class gets by name; null: it gets a `seed`
    eval_rows: int = 200  # rows held out, at most a fifth
    args: dict[str, Any] = field(default_factory=dict)  # further arguments, the same for every problem: {size: 3}


# An Env or a Problem is made of the columns of a row that its __init__ names. A class in TRL's shape is made without them and
# gets them in reset(**row), which says what the policy reads after the row's `prompt`, if there is one; its other public
# methods are tools; its get_reward(), or else `reward`, is read once, when a reply calls none. A function is called with
# split, seed and env.args by name, and yields Problems by itself.


@final
class TrlEnv(Env):
    """One attempt at a row with an object in TRL's shape."""

    def __init__(self, new: Callable[[], Any], row: Row) -> None:
        self.new, self.row = new, row
        self._inner: Any = None

    async def reset(self) -> list[Message]:
        self._inner = self.new()
        methods = inspect.getmembers(self._inner, inspect.ismethod)
        self.tools = [method for name, method in methods if not name.startswith("_") and name not in NOT_TOOLS]
        said = await _settled(partial(self._inner.reset, **_accepted(self._inner.reset, self.row)))
        return _opening(self.row.get("prompt"), said, type(self._inner).__name__)

    async def step(self, reply: Message) -> StepResult:
        for name in ("get_reward", "reward"):
            if hasattr(self._inner, name):
                found = getattr(self._inner, name)
                return StepResult(float(await _settled(found) if callable(found) else found))
        raise ValueError(f"{type(self._inner).__name__} tells no reward: expected get_reward() or an attribute `reward`")

    def close(self) -> None:
        if hasattr(self._inner, "close"):
            self._inner.close()


async def _settled(function: Callable[[], Any]) -> Any:
    """Its result, in a thread unless it is a coroutine function: it may take its time."""
    import asyncio

    inner = function.func if isinstance(function, partial) else function
    if inspect.iscoroutinefunction(inner):
        return await function()
    result = await asyncio.to_thread(function)
    return await result if isinstance(result, Awaitable) else result


def _opening(prompt: object, said: object, name: str) -> list[Message]:
    """The row's prompt and what reset said, in one last user message."""
    given: object = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    messages = [dict(cast("Mapping[str, Any]", message)) for message in cast("Sequence[object]", given)]
    if isinstance(said, list):
        return messages + said
    if said is not None and not isinstance(said, str):
        raise TypeError(f"{name}.reset returned {type(said).__name__}, expected text, messages or None")
    if said and messages and messages[-1]["role"] == "user":
        messages[-1]["content"] = f"{messages[-1]['content']}\n{said}"
    elif said:
        messages.append({"role": "user", "content": said})
    if not messages:
        raise ValueError(f"{name}.reset returned {said!r} and its row has no prompt: the policy would read nothing")
    return messages


def problems(config: Config, split: str, seed: int) -> Iterator[Problem]:
    check_split(split)
    if config.cls is None:
        raise ValueError("env.cls is missing: expected file.py:Name or module:Name")
    given = _load(config.cls)
    if not inspect.isclass(given):
        return _yielded(given, config, split, seed)
    if not (issubclass(given, Env | Problem) or callable(getattr(given, "reset", None))):
        raise ValueError(f"env.cls={config.cls}: expected an Env, a Problem, or a class with a method `reset`")
    if inspect.isabstract(given):
        missing = ", ".join(sorted(cast(type[Env], given).__abstractmethods__))
        raise ValueError(f"env.cls={config.cls} has yet to define {missing}")
    taker: Given = given if issubclass(given, Env | Problem) else partial(cast(Any, given).reset, None)
    given_all = set(config.args) if taker is given else set()
    if config.path is None:
        rows = held_apart(_seeds(generator(split, seed)), lambda row: str(row["seed"]), split)
        _check_columns(taker, {"seed"} | given_all, config)
    else:
        every = read_jsonl(config.path, [])
        for row in every:
            _check_columns(taker, {*row, *given_all}, config)
        rows = reshuffled(split_rows(every, repr, config.eval_rows, split), split, seed)
    tag = given.__name__
    return (_problem(given, row, config, tag) for row in rows)


def _problem(given: type, row: Row, config: Config, tag: str) -> Problem:
    args = config.args
    if issubclass(given, Problem):
        with _explained(given.__init__, config):
            return given(**_accepted(given, row), **args)
    if issubclass(given, Env):
        return Attempts(partial(given, **_accepted(given, row), **args), tag=tag)
    return Attempts(partial(TrlEnv, partial(given, **args), row), tag=tag)


def _seeds(rng: random.Random) -> Iterator[Row]:
    while True:
        yield {"seed": rng.getrandbits(32)}


def _yielded(function: Given, config: Config, split: str, seed: int) -> Iterator[Problem]:
    with _explained(function, config):
        for problem in function(split=split, seed=seed, **config.args):
            if not isinstance(problem, Problem):
                raise TypeError(f"yielded {type(problem).__name__}, expected envs.env.Problem")
            yield problem


@contextlib.contextmanager
def _explained(function: Given, config: Config) -> Iterator[None]:
    """What code of theirs raises, as a ValueError that says where: the deepest line in its file, or that of its `def`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        said, place = " ".join(str(error).split())[:300], ""
        if (code := getattr(function, "__code__", None)) is not None:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == code.co_filename]
            place = f" ({Path(code.co_filename).name}:{frames[-1].lineno if frames else code.co_firstlineno})"
        kind = type(error).__name__
        raise ValueError(f"env.cls={config.cls}: {kind}{': ' if said else ''}{said}{place}") from error


def _accepted(function: Given, row: Row) -> Row:
    """The columns that a function names, all if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return row
    return {parameter.name: row[parameter.name] for parameter in parameters if parameter.name in row}


def _check_columns(function: Given, columns: set[str], config: Config) -> None:
    optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is parameter.empty and parameter.kind not in optional and parameter.name not in columns:
            has = f"{config.path} has a row with {', '.join(columns) or 'nothing'}" if config.path else "env.path is not given"
            raise ValueError(f"env.cls={config.cls} wants {parameter.name}, but {has}")


# ---- loading


def _load(spec: str) -> Given:
    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise ValueError(f"env.cls={spec}: expected file.py:Name or module:Name")
    try:
        module = _load_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(f"env.cls={spec}: {where} cannot be imported: {type(error).__name__}: {said}") from error
    found = getattr(module, name, None)
    if not callable(found):
        has = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__]
        raise ValueError(f"env.cls={spec}: no {name} in {where}; its classes: {', '.join(has) or 'none'}")
    return found


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no such file {path}")
    return load_file(path, "env")
