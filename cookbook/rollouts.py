"""Rollouts: environments and a sampler brought together, a coroutine each; the engine batches whatever is in flight.

A rollout that fails is data: its error is kept with it, and neither its siblings nor the run end with it. What the
sampler itself raises is no rollout's fault and ends them all.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import math
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from cookbook import event_loop
from cookbook.env_drive import seats, settled
from cookbook.limits import Limits, check_limits
from cookbook.tool_calls import Calls, answer, read_reply
from cookbook.tool_prompt import told_of_tools
from cookbook.trajectories import Ended, Trajectory, Transition
from core import Future, ModelInput, SampleResponse, SamplingParams
from envs.env import Env, Message, Problem, StepResult

if TYPE_CHECKING:
    from cookbook.renderers import Renderer

T = TypeVar("T")
Seed: TypeAlias = tuple[int | str, ...]  # what the sampling of a run, a step, a problem ... is derived from

QUIET_SECONDS = 0.1  # no reset has ended for so long: the others are slow, or wait for another seat's move
CLOSE_SECONDS = 10.0
SETTLING_TURNS = 4  # of the event loop, in which an attempt that is ready comes to its request


class Sampler(Protocol):
    """What a rollout needs of a sampling client."""

    def sample(
        self, prompt: ModelInput, num_samples: int = 1, sampling_params: SamplingParams = ...
    ) -> Future[SampleResponse]: ...

    def together(self) -> contextlib.AbstractContextManager[None]: ...


@dataclass
class Group:
    """The attempts at one problem: those that count, and those dropped because they failed."""

    problem: int  # its position in the stream
    tag: str
    trajectories: list[Trajectory] = field(default_factory=list)
    dropped: list[Trajectory] = field(default_factory=list)


def seed_of(*parts: int | str) -> int:
    """63 bits out of whatever names a request; the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SamplingFailed(Exception):
    """The sampler raised; the cause says what."""


class OutOfTime(Exception):
    """An env has used up its seconds."""


class EnvTimeout(Exception):
    """What it owed the policy, in `reset`, `step` or `group_rewards`, never came."""

    def __init__(self, method: Callable[..., Any], seconds: float) -> None:
        super().__init__(f"{method.__name__} did not end within limits.seconds={seconds:g}")


class Attempt:
    """One env under way: `open`, then `play`, then `close`, whatever happened. Nothing but SamplingFailed comes out."""

    def __init__(
        self, env: Env, client: Sampler, renderer: Renderer, params: SamplingParams, limits: Limits, seed: Seed, number: int = 0
    ) -> None:
        self.trajectory = Trajectory(number)
        self._env, self._client, self._renderer = env, client, renderer
        self._params, self._limits, self._seed = params, limits, seed
        self._calls_as_text = False
        self._observation: ModelInput | None = None  # the next prompt; None: this attempt has ended
        self._num_calls = 0
        self._seconds = limits.seconds  # left
        self._closed = False

    async def open(self) -> None:
        """The first prompt."""
        async with self._contained():
            messages = await self._owed(self._env.reset)
            if self._env.tools:
                messages, self.trajectory.tools = told_of_tools(messages, self._env.tools, self._renderer)
                self._calls_as_text = self.trajectory.tools is None
                self._count("tool_calls", 0)
                self._count("tool_errors", 0)
            self._say(messages)
            self._observation = self._render()

    async def play(self, opening: asyncio.Task[None] | None = None) -> None:
        """Turn after turn until the env or a limit ends it."""
        await (opening or self.open())
        async with self._contained():
            while self._observation is not None:
                await self._turn(self._observation)
        await self.close()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await settled(self._env.close)
        except (Exception, SystemExit):
            self._count("close_failed")  # what it did before stands

    async def _turn(self, observation: ModelInput) -> None:
        room = self._room(observation)
        if isinstance(room, str):
            self._limit(room, f"the prompt has {observation.length:,} tokens" if room == "context" else "all are sampled")
            return
        message, calls = await self._reply(observation, room)
        if calls is None:
            result = _checked(await self._owed(self._env.step, message))
            self._earn(result)
        elif self._num_calls + len(calls) > self._limits.tool_calls:
            self._limit("tool_calls", f"the policy asked for {self._num_calls + len(calls)}")
            return
        else:
            result = StepResult(done=False, messages=[await self._answer(call) for call in calls])
        self._say(result.messages)
        if result.done:
            self._end("done")
        elif len(self.trajectory.transitions) >= self._limits.turns:
            self._limit("turns", "the env asked for more")
        else:
            self._observation = self._render()

    async def _reply(self, observation: ModelInput, max_tokens: int) -> tuple[Message, Calls]:
        """The policy's message, and the tool calls in it if it has any."""
        turn = len(self.trajectory.transitions)
        params = replace(self._params, max_tokens=max_tokens, seed=seed_of(*self._seed, turn))
        try:
            sampled = (await self._client.sample(observation, 1, params)).sequences[0]
        except Exception as error:
            raise SamplingFailed from error
        reply = read_reply(self._renderer, sampled.tokens, bool(self._env.tools))
        transition = Transition(observation, list(sampled.tokens), list(sampled.logprobs), reply.ended)
        self.trajectory.transitions.append(transition)
        self.trajectory.messages.append(reply.message)
        self.trajectory.rendered.append(reply.in_conversation(sampled.tokens, self._calls_as_text))
        return reply.message, reply.calls

    def _earn(self, result: StepResult) -> None:
        trajectory = self.trajectory
        last = replace(trajectory.transitions[-1], reward=result.reward, metrics=result.metrics)
        trajectory.transitions[-1] = last
        trajectory.metrics |= result.metrics
        trajectory.reward += result.reward

    def _room(self, observation: ModelInput) -> int | Ended:
        """How many tokens the next reply may have, or the limit that leaves none."""
        limits, sampled = self._limits, sum(len(turn.tokens) for turn in self.trajectory.transitions)
        rooms: dict[Ended, float] = {
            "context": math.inf if limits.context is None else limits.context - observation.length,
            "tokens": math.inf if limits.tokens is None else limits.tokens - sampled,
        }
        tightest = min(rooms, key=lambda limit: rooms[limit])
        if rooms[tightest] < 1:
            return tightest
        assert self._params.max_tokens is not None
        return int(min(rooms[tightest], self._params.max_tokens))

    async def _answer(self, call: Message | None) -> Message:
        self._num_calls += 1
        self._count("tool_calls")
        message, error = await self._in_env(answer(self._env.tools, call))
        if error is not None:
            self._count("tool_errors")
            self._count(f"tool_errors/{error}")
        return message

    def _render(self) -> ModelInput:
        return self._renderer.build_generation_prompt(self.trajectory.rendered, self.trajectory.tools)

    def _say(self, messages: Sequence[Message]) -> None:
        self.trajectory.messages += messages
        self.trajectory.rendered += messages

    def _count(self, name: str, by: int = 1) -> None:
        self.trajectory.metrics[name] = self.trajectory.metrics.get(name, 0.0) + by

    def _end(self, ended: Ended) -> None:
        self._observation, self.trajectory.ended = None, ended

    def _limit(self, which: Ended, met: str) -> None:
        self._end(which)
        self.trajectory.limit = f"limits.{which}={getattr(self._limits, which):.10g}, {met}"

    async def _owed(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """What `reset` or `step` gives. Where nothing comes the policy is not to blame, as it is for the tools it calls."""
        try:
            return await self._in_env(settled(method, *arguments))
        except OutOfTime:
            raise EnvTimeout(method, self._limits.seconds) from None

    async def _in_env(self, work: Awaitable[T]) -> T:
        """What comes of `work`, whose time counts against the env's; waiting for the sampler does not."""
        started = time.monotonic()
        try:
            return await _within(self._seconds, work)
        finally:
            self._seconds -= time.monotonic() - started

    @contextlib.asynccontextmanager
    async def _contained(self) -> AsyncIterator[None]:
        """Errors and the time limit end this attempt and nothing else."""
        try:
            yield
        except SamplingFailed:
            raise
        except OutOfTime:
            self._limit("seconds", "a tool was still at work")
        except asyncio.CancelledError as error:  # ours, or one that leaked out of what the env waited for
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            self._fail(error)
        except (Exception, SystemExit) as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._end("error")
        fail(self.trajectory, error)


async def _within(seconds: float, work: Awaitable[T]) -> T:
    """What comes of `work`; OutOfTime once so many seconds are over."""
    timer = asyncio.timeout(seconds)
    try:
        async with timer:
            return await work
    except TimeoutError:
        if timer.expired():
            raise OutOfTime from None
        raise


def fail(trajectory: Trajectory, error: BaseException) -> None:
    trajectory.ended, trajectory.reward = "error", 0.0
    said = " ".join(str(error).split())[:300]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    told = not frames or re.search(r"\.py:\d+\)$", said)
    place = "" if told else f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    trajectory.error = f"{type(error).__name__}{': ' if said else ''}{said}{place}"


class BadReward(ValueError):
    """A reward that is no finite number."""


def _checked(result: StepResult) -> StepResult:
    if not isinstance(result, StepResult):
        raise TypeError(f"step returned {type(result).__name__}, expected StepResult")
    return replace(result, reward=_finite(result.reward), metrics={k: float(v) for k, v in result.metrics.items()})


def _finite(reward: float) -> float:
    if not math.isfinite(reward):
        raise BadReward(f"reward {reward}, expected a finite number")
    return float(reward)


async def rollout(
    env: Env, client: Sampler, renderer: Renderer, params: SamplingParams, limits: Limits, seed: Seed = (0,)
) -> Trajectory:
    """One attempt. `params.max_tokens` bounds each reply; the seed of turn t is made of `seed` and t."""
    attempt = Attempt(env, client, renderer, params, limits, seed)
    try:
        await attempt.play()
    except SamplingFailed as failed:
        raise failed.__cause__ or failed from None
    finally:
        await attempt.close()
    return attempt.trajectory


@dataclass(frozen=True)
class Rollouts:
    """Groups of rollouts of one run: what is the same for all of them. `params.max_tokens` bounds each reply."""

    renderer: Renderer
    params: SamplingParams
    limits: Limits

    def __post_init__(self) -> None:
        check_limits(self.limits)

    def run(self, problems: Sequence[Problem], client: Sampler, group_size: int, seed: Seed, first: int = 0) -> list[Group]:
        """`group_size` attempts at each problem, in order; they are problems `first`, `first` + 1, ... of their stream."""
        return self.submit(problems, client, group_size, seed, first).result()

    def submit(
        self, problems: Sequence[Problem], client: Sampler, group_size: int, seed: Seed, first: int = 0
    ) -> concurrent.futures.Future[list[Group]]:
        """The same, without waiting."""
        return event_loop.submit(self._groups(problems, client, group_size, seed, first))

    async def _groups(
        self, problems: Sequence[Problem], client: Sampler, group_size: int, seed: Seed, first: int
    ) -> list[Group]:
        groups = [Group(first + index, problem.tag) for index, problem in enumerate(problems)]
        attempts: list[Attempt] = []
        for problem, group in zip(problems, groups, strict=True):
            for number, env in enumerate(_envs(problem, group, group_size)):
                name = (*seed, group.problem, number)
                attempt = Attempt(env, client, self.renderer, self.params, self.limits, name, number)
                attempts.append(attempt)
                group.trajectories.append(attempt.trajectory)
        await play_all(attempts, client)
        owed = (_add_group_rewards(*pair, self.limits.seconds) for pair in zip(problems, groups, strict=True))
        await asyncio.gather(*owed)
        if self.limits.on_error == "drop":
            for group in groups:
                group.dropped = [trajectory for trajectory in group.trajectories if trajectory.error]
                group.trajectories = [trajectory for trajectory in group.trajectories if not trajectory.error]
        return groups


def _envs(problem: Problem, group: Group, group_size: int) -> list[Env]:
    """Fresh envs; a problem that cannot make any leaves a failed trajectory in its group."""
    try:
        if envs := seats(problem, group_size):
            return envs
        raise ValueError(f"make({group_size}) of a problem gave no env")
    except Exception as error:
        group.trajectories.append(Trajectory())
        fail(group.trajectories[0], error)
        return []


async def play_all(attempts: Sequence[Attempt], client: Sampler) -> None:
    """First prompts are held back until all are ready, and then asked for in order and at once: equal requests in equal
    batches give equal replies, to the last bit."""
    try:
        async with asyncio.TaskGroup() as tasks:
            openings = [tasks.create_task(attempt.open()) for attempt in attempts]
            waiting: set[asyncio.Task[None]] = set(openings)
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=QUIET_SECONDS)
                if not done:
                    break
            with client.together():
                for attempt, opening in zip(attempts, openings, strict=True):
                    tasks.create_task(attempt.play(opening))
                for _ in range(SETTLING_TURNS):
                    await asyncio.sleep(0)
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first.__cause__ or first from None
    finally:
        await asyncio.gather(*(attempt.close() for attempt in attempts))


async def _add_group_rewards(problem: Problem, group: Group, seconds: float) -> None:
    if type(problem).group_rewards is Problem.group_rewards:
        return
    try:
        rewards = await _within(seconds, settled(problem.group_rewards, group.trajectories))
        for trajectory, reward in zip(group.trajectories, rewards or [0.0] * len(group.trajectories), strict=True):
            if not trajectory.error:
                trajectory.reward += _finite(reward)
    except (Exception, SystemExit) as error:
        hung = isinstance(error, OutOfTime)
        for trajectory in group.trajectories:
            fail(trajectory, EnvTimeout(problem.group_rewards, seconds) if hung else error)
