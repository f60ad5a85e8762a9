"""Environments driven without a model: a policy is any function from the conversation so far to the next reply."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from envs.env import Env, Message, Problem

Policy: TypeAlias = Callable[[list[Message]], Message]


@dataclass
class Outcome:
    """One attempt: the whole conversation, the sum of its rewards, and whether the env ended it."""

    messages: list[Message] = field(default_factory=list)
    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    ended: bool = False


async def attempt(env: Env, policy: Policy, max_replies: int = 100) -> Outcome:
    """One attempt from reset to close, calls of tools included, as a rollout does it."""
    outcome = Outcome()
    try:
        outcome.messages += await settled(env.reset)
        for _ in range(max_replies):
            reply = policy(outcome.messages)
            outcome.messages.append(reply)
            if calls := reply.get("tool_calls"):
                outcome.messages += [await _call(env, call) for call in calls]
                continue
            result = await settled(env.step, reply)
            outcome.reward += result.reward
            outcome.metrics |= result.metrics
            outcome.messages += result.messages
            outcome.ended = result.done
            if result.done:
                break
    finally:
        await settled(env.close)
    return outcome


async def attempts(envs: Sequence[Env], policies: Sequence[Policy], seconds: float | None = None) -> list[Outcome]:
    """All at once, as the seats of a game must be: one waits for another. TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
        tasks = [group.create_task(attempt(env, policy)) for env, policy in zip(envs, policies, strict=True)]
    return [task.result() for task in tasks]


def seats(problem: Problem, num_attempts: int = 1) -> list[Env]:
    """Fresh envs for so many attempts; the seats of one game where they are too few for it."""
    return problem.make(num_attempts) or problem.make(max(2, problem.num_seats))


async def opening(problem: Problem) -> tuple[list[Message], Sequence[Callable[..., Any]]]:
    """The first messages of the first seat, and its tools."""
    envs = seats(problem)
    try:
        return await settled(envs[0].reset), envs[0].tools
    finally:
        for env in envs:
            await settled(env.close)


async def settled(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of a coroutine function, or of a plain one, which runs in a thread."""
    if inspect.iscoroutinefunction(function):
        return await function(*arguments, **named)
    result, error = await asyncio.to_thread(_outcome, function, arguments, named)
    if error is not None:
        raise error
    return await result if isinstance(result, Awaitable) else result


def _outcome(
    function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, BaseException | None]:
    """Result and error as values: a future does not carry StopIteration, its waiter would wait for ever."""
    try:
        return function(*arguments, **named), None
    except BaseException as error:
        return None, error


async def _call(env: Env, call: Message) -> Message:
    from envs.tools import ToolError
    from envs.tools import call as run_tool

    function = call["function"]
    try:
        text = await run_tool(env.tools, function["name"], function["arguments"])
    except ToolError as error:
        text = f"error: {error}"
    return {"role": "tool", "name": function["name"], "content": text}
