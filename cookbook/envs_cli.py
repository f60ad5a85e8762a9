"""`cook envs`: what there is to learn in, a person in the policy's place, and whether an environment keeps its word."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cookbook import TREE
from cookbook.compose import compose
from cookbook.env_check import Verdict, check_env
from cookbook.env_drive import Outcome, Policy, attempts, seats
from cookbook.environments import problem_stream
from envs import MODULES
from envs.env import Env, Message

if TYPE_CHECKING:
    from rich.console import Console


def print_envs(console: Console) -> None:
    """One row per env: its name and the first line of its docstring, read without importing it."""
    from rich.table import Table

    table = Table("env=", "what it is", box=None, pad_edge=False)
    for name, module in MODULES.items():
        source = (TREE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        table.add_row(name, escape((ast.get_docstring(ast.parse(source)) or "").split("\n", 1)[0]))
    console.print(table)
    console.print("\ncook envs play arithmetic · cook envs check arithmetic · cook rl env=arithmetic", highlight=False)


def env_section(name: str, overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """The env section that `cook rl env=NAME env.key=value` would have; keys come with or without `env.`."""
    words = [word if word.startswith("env.") else f"env.{word}" for word in overrides]
    return compose("rl", [f"env={name}", *words], config_dir=config_dir).config.env


def check(env: Mapping[str, Any], count: int, seed: int, console: Console) -> int:
    """Print a table of verdicts; the exit status: 1 when one of them is a failure."""
    from rich.table import Table

    verdicts = check_env(env, count, seed)
    table = Table(env["name"], "", "", box=None, pad_edge=False)
    for verdict in verdicts:
        table.add_row(verdict.what, _mark(verdict), escape(verdict.detail))
    console.print(table)
    return int(any(verdict.passed is False for verdict in verdicts))


def _mark(verdict: Verdict) -> str:
    return {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[dim]nothing to check[/]"}[verdict.passed]


def play(env: Mapping[str, Any], seed: int, split: str, console: Console) -> None:
    """A person is the policy at every seat of the first problem."""
    problem = next(problem_stream(env, split, seed))
    envs = seats(problem)
    names = [""] if len(envs) == 1 else [f"seat {i + 1}" for i in range(len(envs))]
    policies = [person(seat, name, console) for seat, name in zip(envs, names, strict=True)]
    try:
        outcomes = _run_interruptibly(attempts(envs, policies))
    except ExceptionGroup as group:
        if group.subgroup(EOFError):
            console.print("\nleft")
            return
        raise group.exceptions[0] from None
    for outcome, name in zip(outcomes, names, strict=True):
        _show_outcome(outcome, name, console)


def _run_interruptibly(main: Coroutine[Any, Any, list[Outcome]]) -> list[Outcome]:
    """asyncio.run, which would hold back the first Ctrl-C while a line is read; envs are closed here too."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        for task in (pending := asyncio.all_tasks(loop)):
            task.cancel()
        if pending:
            loop.run_until_complete(asyncio.wait(pending))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def person(env: Env, name: str, console: Console) -> Policy:
    """Shows what is new in the conversation and reads the reply: a line (one ending in \\ goes on), or a call of a tool."""
    shown = 0

    def reply(messages: list[Message]) -> Message:
        nonlocal shown
        if not shown:
            _show_tools(env, console)
        for message in messages[shown:]:
            _show_message(message, name, console)
        shown = len(messages) + 1  # what the person types needs no showing
        return _read_reply(name, console)

    return reply


def _read_reply(name: str, console: Console) -> Message:
    while True:
        text = input(f"{name}> ")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + input("... ")
        if not text.startswith("/call"):
            return {"role": "assistant", "content": text}
        word, _, rest = text.removeprefix("/call").strip().partition(" ")
        try:
            arguments = json.loads(rest or "{}")
        except json.JSONDecodeError as error:
            console.print(f"not JSON ({error.msg}): /call {word} {{...}}", style="red", markup=False)
            continue
        if word and isinstance(arguments, dict):
            call = {"type": "function", "function": {"name": word, "arguments": arguments}}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        console.print('a call looks like /call tool {"argument": 1}', style="red", markup=False)


def _show_tools(env: Env, console: Console) -> None:
    for tool in env.tools:
        line = (inspect.getdoc(tool) or "").split("\n", 1)[0]
        signature = inspect.signature(tool, eval_str=True)
        console.print(f"/call {tool.__name__}{signature}  {line}", style="dim", markup=False, highlight=False)


def _show_message(message: Message, name: str, console: Console) -> None:
    console.rule(" ".join(filter(None, [str(message["role"]), f"to {name}" if name else ""])), align="left")
    console.print(str(message["content"]), markup=False, highlight=False, soft_wrap=True)


def _show_outcome(outcome: Outcome, name: str, console: Console) -> None:
    answered = max((i for i, message in enumerate(outcome.messages) if message["role"] == "assistant"), default=-1)
    for message in outcome.messages[answered + 1 :]:
        _show_message(message, name, console)
    metrics = "".join(f" · {key} {value:g}" for key, value in outcome.metrics.items())
    end = "" if outcome.ended else " (not ended)"
    console.print(f"{name}{': ' if name else ''}reward {outcome.reward:g}{metrics}{end}", style="bold", highlight=False)
