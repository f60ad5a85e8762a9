"""Games of TextArena by name, alone or against itself: env.game=GuessTheNumber-v0."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import io
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, final

from envs.answers import text_of
from envs.env import Env, Message, Problem, StepResult
from envs.seats import Table
from envs.streams import check_split, generator, held_apart

T = TypeVar("T")
MOST_PLAYERS = 8
# TextArena draws from the global generator: each game has a state of its own put there while it moves.
_global_random = threading.Lock()


@dataclass
class Config:
    game: str = "GuessTheNumber-v0"  # as in textarena.make; some want nltk's words, numpy or a key of OpenRouter's
    players: int | None = None  # all of them the policy; null: the fewest that the game takes
    max_replies: int = 30  # of a seat; one more ends the game for all, without a reward


class GameFailed(RuntimeError):
    """TextArena raised: the game's name and the error, in one line."""


@final
class Game:
    """One game and its random state."""

    def __init__(self, name: str, num_players: int, seed: int) -> None:
        self.name, self.num_players = name, num_players
        self.table = Table()
        self.is_over = False
        self.rewards: dict[int, float] = {}
        self.said = ""  # how it ended
        self._seed = seed
        self._random = random.Random(seed).getstate()
        self._made: Any = None
        self._opening = asyncio.Lock()

    @property
    def mover(self) -> int:
        return self._made.state.current_player_id

    async def open(self) -> None:
        async with self._opening:
            if self._made is None:
                self._made = await self._moved(self._open)

    async def observed(self) -> list[Any]:
        """(from, text, kind) of whatever the player to move has not seen yet."""
        return (await self._moved(self._made.get_observation))[1]

    async def play(self, text: str) -> None:
        self.is_over, _ = await self._moved(lambda: self._made.step(action=text))
        if self.is_over:
            rewards, info = await self._moved(self._made.close)
            self.rewards = {player: float(reward) for player, reward in (rewards or {}).items()}
            self.said = next((str(one["reason"]) for one in info.values() if one.get("reason")), "")
        self.table.changed()

    async def turn(self, seat: int) -> None:
        """Return when `seat` is to move or the game is over; when a player has left there is nothing more to play for."""

        def mine() -> bool:
            if self.table.left and not self.is_over:
                self.is_over, self.said = True, "A player has left the game."
            return self.is_over or self.mover == seat

        await self.table.until(mine)

    def _open(self) -> Any:
        made = _make(self.name)
        made.reset(num_players=self.num_players, seed=self._seed)
        return made

    async def _moved(self, action: Callable[[], T]) -> T:
        """In a thread, as some games take their time; errors as GameFailed, since no StopIteration gets out of one."""

        def run() -> T:
            with _global_random:
                ours = random.getstate()
                random.setstate(self._random)
                try:
                    return action()
                except (Exception, SystemExit) as error:
                    raise GameFailed(_failure(self.name, error)) from error
                finally:
                    self._random = random.getstate()
                    random.setstate(ours)

        return await asyncio.to_thread(run)


@final
class Seat(Env):
    """The reward is TextArena's: mostly 1 for a win, 0 for a draw, -1 for a loss, something between alone."""

    def __init__(self, game: Game, seat: int, max_replies: int) -> None:
        self.game, self.seat, self.max_replies = game, seat, max_replies
        self.num_replies = 0

    async def reset(self) -> list[Message]:
        await self.game.open()
        await self.game.turn(self.seat)
        if self.game.is_over:  # before the first move of this seat; a policy is always asked for one
            return [{"role": "user", "content": f"The game is over: {self.game.said} Reply with OK."}]
        return await self._heard()

    async def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        self.num_replies += 1
        if not self.game.is_over:
            await self.game.play(text if "[" in text else f"[{text}]")  # moves stand in brackets
            await self.game.turn(self.seat)
        if not self.game.is_over and self.num_replies < self.max_replies:
            return StepResult(done=False, messages=await self._heard())
        if not self.game.is_over:
            self.game.table.leave(self.seat)
        reward = self.game.rewards.get(self.seat, 0.0)
        said: list[Message] = [{"role": "user", "content": self.game.said}] if self.game.said else []
        return StepResult(reward, messages=said, metrics={"won": float(reward >= 1)})

    def close(self) -> None:
        if not self.game.is_over:
            self.game.table.leave(self.seat)

    async def _heard(self) -> list[Message]:
        """Without the policy's own words, which it knows."""
        texts = [str(text) for sender, text, _ in await self.game.observed() if sender != self.seat]
        return [{"role": "user", "content": "\n\n".join(texts) or "Your move."}]


@final
@dataclass(frozen=True)
class TextGame(Problem):
    name: str
    seed: int
    max_replies: int
    tag: str
    num_seats: int

    def make(self, group_size: int) -> list[Env]:
        games = [Game(self.name, self.num_seats, self.seed) for _ in range(group_size // self.num_seats)]
        return [Seat(game, seat, self.max_replies) for game in games for seat in range(self.num_seats)]


def problems(config: Config, split: str, seed: int) -> Iterator[TextGame]:
    check_split(split)
    if config.max_replies < 1:
        raise ValueError(f"env.max_replies={config.max_replies}: expected 1 or more")
    num_players = _players(config)
    seeds = held_apart(_seeds(generator(split, seed)), str, split)
    tag = config.game.split("-v")[0]
    return (TextGame(config.game, one, config.max_replies, tag, num_players) for one in seeds)


def _seeds(rng: random.Random) -> Iterator[int]:
    while True:
        yield rng.getrandbits(31)


def _players(config: Config) -> int:
    """The number of players, tried out: it stands nowhere."""
    made, tried = _make(config.game), config.players
    state, error = random.getstate(), None
    try:
        for number in [tried] if tried else range(1, MOST_PLAYERS + 1):
            try:
                made.reset(num_players=number, seed=0)
                return number
            except Exception as failure:
                error = error if error is not None and not isinstance(error, AssertionError) else failure
    finally:
        random.setstate(state)
    assert error is not None
    said = f"env.players={tried}: " if tried else ""
    raise ValueError(f"{said}{_failure(config.game, error)}") from error


def _make(game: str) -> Any:
    textarena = _textarena()
    from textarena.envs.registration import ENV_REGISTRY  # pyright: ignore[reportMissingImports]

    if game not in ENV_REGISTRY:
        close = difflib.get_close_matches(game, list(ENV_REGISTRY), n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"env.game={game}: TextArena has no such game{meant}")
    raw = game if game.endswith("-raw") else f"{game}-raw"  # without it a player is told the whole game at every move
    try:
        return textarena.make(raw if raw in ENV_REGISTRY else game)
    except (Exception, SystemExit) as error:
        raise ValueError(_failure(game, error)) from error


def _textarena() -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import textarena  # pyright: ignore[reportMissingImports]  # it tries to download word lists and says so
    except ImportError as error:
        raise ValueError(f"env textarena needs a package ({error}): uv sync --extra textarena") from error
    return textarena


def _failure(game: str, error: BaseException) -> str:
    said = " ".join(str(error).split())[:200]
    return f"the game {game} does not run: {type(error).__name__}" + (f": {said}" if said else "")
