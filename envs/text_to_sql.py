"""Questions over a SQLite database made for each problem: look with a tool, answer in SQL."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

from envs.answers import text_of
from envs.code_blocks import code_in, fenced
from envs.database import Cell, Database, QueryError, as_text
from envs.env import Attempts, Env, Message, StepResult
from envs.schemas import SCHEMAS, draw_question, script
from envs.streams import check_split, generator, held_apart
from envs.tools import ToolError

MAX_ANSWER_ROWS = 1000


@dataclass
class Config:
    schemas: list[str] | None = None  # some of shop, library, school, company; null: all
    max_rows: int = 20  # that the tool shows of a result
    show_schema: bool = True  # false: only the names of the tables, the tool has to find out the rest


@dataclass(frozen=True)
class Question:
    schema: str
    text: str
    sql: str
    seed: str  # of the rows


@final
class TextToSql(Env):
    """Reward 1 when the reply's SQL gives what the gold SQL gives, in the database shown and in a hidden one of other rows:
    an answer read off and written down as SELECT 3 does not. Order counts where the gold has ORDER BY.
    """

    def __init__(self, question: Question, max_rows: int, show_schema: bool) -> None:
        self.question, self.max_rows, self.show_schema = question, max_rows, show_schema
        self.tools = [self.query]
        self._shown: Database | None = None

    def reset(self) -> list[Message]:
        schema = SCHEMAS[self.question.schema]
        self._shown = Database(script(schema, self.question.seed))
        tables = schema.create if self.show_schema else "Tables: " + ", ".join(re.findall(r"CREATE TABLE (\w+)", schema.create))
        asked = (
            f"A SQLite database has these tables:\n\n{tables}\n\n{self.question.text}\n\nYou may look at it with the tool"
            " `query`. In the end, reply with the SQL query that answers the question, in a ```sql block."
        )
        return [{"role": "user", "content": asked}]

    def query(self, sql: str) -> str:
        """Run a query on the database and see its rows.

        Args:
            sql: One SELECT statement of SQLite's
        """
        assert self._shown
        try:
            return as_text(*self._shown.query(sql, self.max_rows))
        except QueryError as error:
            raise ToolError("failed", f"query: {error}") from None

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        sql = code_in(text, "sql", "sqlite").strip().rstrip(";")
        hidden = Database(script(SCHEMAS[self.question.schema], self.question.seed + " hidden"))
        try:
            assert self._shown
            same = [_same(database, sql, self.question.sql) for database in (self._shown, hidden)]
        except QueryError:
            same = []
        finally:
            hidden.close()
        correct, has_block = float(all(same) and bool(same)), float(fenced(text, "sql", "sqlite") is not None)
        return StepResult(correct, metrics={"correct": correct, "format": has_block, "executed": float(bool(same))})

    def close(self) -> None:
        if self._shown:
            self._shown.close()


def _same(database: Database, sql: str, gold: str) -> bool:
    expected, found = (_rows(database, query) for query in (gold, sql))
    if "ORDER BY" not in gold:
        expected, found = sorted(expected), sorted(found)
    return expected == found


def _rows(database: Database, sql: str) -> list[tuple[str, ...]]:
    """Rows as text, so that they sort; 3 and 3.0 are the same."""

    def plain(cell: Cell) -> str:
        return f"{cell:.9g}" if isinstance(cell, int | float) else repr(cell)

    _, rows, more = database.query(sql, MAX_ANSWER_ROWS)
    if more:
        raise QueryError(f"more than {MAX_ANSWER_ROWS} rows")
    return [tuple(map(plain, row)) for row in rows]


def problems(config: Config, split: str, seed: int) -> Iterator[Attempts]:
    check_split(split)
    names = list(SCHEMAS) if config.schemas is None else config.schemas
    if not names or any(name not in SCHEMAS for name in names):
        raise ValueError(f"env.schemas={','.join(names)}: expected some of {', '.join(SCHEMAS)}")
    if config.max_rows < 1:
        raise ValueError(f"env.max_rows={config.max_rows}: expected 1 or more")
    drawn = held_apart(_drawn(names, generator(split, seed)), lambda question: question.text, split)
    return (_problem(question, config) for question in drawn)


def _drawn(names: list[str], rng: random.Random) -> Iterator[Question]:
    while True:
        name = rng.choice(names)
        text, sql = draw_question(SCHEMAS[name], rng)
        yield Question(name, text, sql, str(rng.getrandbits(64)))


def _problem(question: Question, config: Config) -> Attempts:
    new = partial(TextToSql, question, config.max_rows, config.show_schema)
    return Attempts(new, f"```sql\n{question.sql}\n```", "text_to_sql")
