"""Tic-tac-toe against itself: two seats a game, and both learn."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import final

from envs.answers import is_number, numbers, text_of
from envs.env import Env, Message, Problem, StepResult
from envs.seats import Table
from envs.streams import check_split, generator, held_apart

# A board is nine characters: X and O, and the number of a square while it is free.
EMPTY = "123456789"
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
DRAW = 0.5  # reward; 1 for a win, 0 for a loss
_ROW = re.compile(r"^([XO1-9]) \| ([XO1-9]) \| ([XO1-9])$", re.MULTILINE)


@dataclass
class Config:
    opening: int = 2  # moves made at random before a game begins, at most; 1 or 2
    illegal_moves: int = 1  # of a player that are answered with what is wrong; one more loses


def mover(board: str) -> str:
    return "X" if board.count("X") == board.count("O") else "O"


def winner(board: str) -> str | None:
    return next((board[a] for a, b, c in LINES if board[a] == board[b] == board[c]), None)


def is_over(board: str) -> bool:
    return winner(board) is not None or not free(board)


def free(board: str) -> list[str]:
    return [square for square in board if square.isdigit()]


def after(board: str, square: str) -> str:
    return board.replace(square, mover(board))


@cache
def value(board: str) -> int:
    """For whoever is to move, both playing perfectly: above 0 a win, the sooner the higher; 0 a draw."""
    if is_over(board):
        return 0 if winner(board) is None else -len(free(board)) - 1
    return max(-value(after(board, square)) for square in free(board))


def best_move(board: str) -> str:
    """Of equally good moves the one that leaves most to be done wrong."""

    def rank(square: str) -> tuple[int, int]:
        left = after(board, square)
        return value(left), 0 if is_over(left) else -value(after(left, worst_move(left)))

    return min(free(board), key=rank)


def worst_move(board: str) -> str:
    """Of equally bad moves the one that gives the other most ways to win."""

    def rank(square: str) -> tuple[int, int]:
        left = after(board, square)
        return value(left), 0 if is_over(left) else sum(value(after(left, reply)) < 0 for reply in free(left))

    return max(free(board), key=rank)


def drawn(board: str) -> str:
    """'X | 2 | 3' and so on; `seen` reads it."""
    return "\n--+---+--\n".join(" | ".join(board[row : row + 3]) for row in (0, 3, 6))


def seen(text: str) -> str | None:
    return "".join("".join(row) for row in rows[-3:]) if len(rows := _ROW.findall(text)) >= 3 else None


@final
class Game:
    """The place of a player who has left, by an illegal move or a limit, is taken by one who plays as badly as can be:
    the other has real moves to make and must still win."""

    def __init__(self, board: str) -> None:
        self.board = board
        self.table = Table()

    def play(self, square: str) -> None:
        self.board = after(self.board, square)
        self.table.changed()

    async def turn(self, mark: str) -> None:
        """Return when `mark` is to move or the game is over."""

        def mine() -> bool:
            while not is_over(self.board) and mover(self.board) != mark and "XO".index(mover(self.board)) in self.table.left:
                self.play(worst_move(self.board))
            return is_over(self.board) or mover(self.board) == mark

        await self.table.until(mine)


@final
class Seat(Env):
    """Reward 1 for a win, one half for a draw, 0 for a loss or one illegal move too many."""

    def __init__(self, game: Game, mark: str, illegal_moves: int) -> None:
        self.game, self.mark, self.illegal_moves = game, mark, illegal_moves
        self.num_replies = self.num_plain = self.num_illegal = 0

    async def reset(self) -> list[Message]:
        await self.game.turn(self.mark)
        asked = (
            f"Tic-tac-toe: three in a row, column or diagonal win. You are {self.mark}. Your move: reply with the number"
            f" of a free square only.\n\n{drawn(self.game.board)}"
        )
        return [{"role": "user", "content": asked}]

    async def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        self.num_replies += 1
        self.num_plain += is_number(text)
        square = next((str(number) for number in reversed(list(numbers(text)))), None)
        if square not in free(self.game.board):
            return self._illegal(square)
        self.game.play(square)
        await self.game.turn(self.mark)
        if is_over(self.game.board):
            return self._ended()
        return self._say(f"{'O' if self.mark == 'X' else 'X'} has moved. Your move:\n\n{drawn(self.game.board)}")

    def close(self) -> None:
        self.game.table.leave("XO".index(self.mark))  # at the end of a game it does nothing

    def _illegal(self, square: str | None) -> StepResult:
        self.num_illegal += 1
        if self.num_illegal > self.illegal_moves:
            self.game.table.leave("XO".index(self.mark))
            return self._result("Illegal again: you lose.", 0.0, None)
        wrong = "No number in your reply" if square is None else f"{square[:20]} is not free"
        return self._say(f"{wrong}: reply with one of {', '.join(free(self.game.board))}.\n\n{drawn(self.game.board)}")

    def _say(self, text: str) -> StepResult:
        return StepResult(done=False, messages=[{"role": "user", "content": text}])

    def _ended(self) -> StepResult:
        won = winner(self.game.board)
        reward = DRAW if won is None else float(won == self.mark)
        return self._result(f"{'A draw.' if won is None else f'{won} wins.'}\n\n{drawn(self.game.board)}", reward, won)

    def _result(self, said: str, reward: float, won: str | None) -> StepResult:
        metrics = {
            "won": float(won == self.mark), "drawn": float(reward == DRAW), "illegal": float(self.num_illegal),
            "format": self.num_plain / self.num_replies,
        }  # fmt: skip
        return StepResult(reward, messages=[{"role": "user", "content": said}], metrics=metrics)


@final
@dataclass(frozen=True)
class Opening(Problem):
    """Games from one board; the seat that moves first comes first."""

    board: str
    illegal_moves: int
    tag: str = "tictactoe"
    num_seats: int = 2

    def make(self, group_size: int) -> list[Env]:
        first = mover(self.board)
        games = [Game(self.board) for _ in range(group_size // 2)]
        return [Seat(game, mark, self.illegal_moves) for game in games for mark in (first, "O" if first == "X" else "X")]

    def solve(self, messages: Sequence[Message]) -> Message | None:
        board = next((found for m in reversed(messages) if m["role"] == "user" and (found := seen(str(m["content"])))), None)
        return None if board is None or is_over(board) else {"role": "assistant", "content": best_move(board)}


def problems(config: Config, split: str, seed: int) -> Iterator[Opening]:
    check_split(split)
    if config.opening not in (1, 2):
        raise ValueError(f"env.opening={config.opening}: expected 1 or 2 moves")
    if config.illegal_moves < 0:
        raise ValueError(f"env.illegal_moves={config.illegal_moves}: expected 0 or more")
    boards = held_apart(_boards(config.opening, generator(split, seed)), str, split)
    return (Opening(board, config.illegal_moves) for board in boards)


def _boards(opening: int, rng: random.Random) -> Iterator[str]:
    """After at most two moves nobody wins with the next, so that both seats get to move; from some boards X can force a win."""
    while True:
        board = EMPTY
        for _ in range(rng.randint(0, opening)):
            board = after(board, rng.choice(free(board)))
        yield board
