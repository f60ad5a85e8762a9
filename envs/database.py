"""A small SQLite database that a policy may query: nothing but reading, within a budget of steps, rows and characters."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from typing import TypeAlias, final

Cell: TypeAlias = str | int | float | bytes | None

STEPS = 10_000_000  # instructions of SQLite's machine, some tenths of a second; counted, so that a busy machine changes nothing
STRIDE = 10_000
CELL_BYTES = 100_000  # the longest value that may be made on the way
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "random", "randomblob"}


class QueryError(ValueError):
    """Why a query gave no rows; one line."""


@final
class Database:
    """In memory; `script` makes it and nothing changes it afterwards. Threads take turns."""

    def __init__(self, script: str) -> None:
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._lock = threading.Lock()
        self._connection.executescript(script)
        self._connection.execute("PRAGMA query_only = 1")
        self._connection.execute("PRAGMA temp_store = 2")  # what a query sorts stays off the disk
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, CELL_BYTES)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0)
        self._connection.set_authorizer(_authorize)

    def query(self, sql: str, max_rows: int, parameters: Sequence[Cell] = ()) -> tuple[list[str], list[tuple[Cell, ...]], bool]:
        """Names of the columns, at most `max_rows` rows, whether there were more. QueryError for anything but one SELECT."""
        spent = 0

        def over_budget() -> bool:
            nonlocal spent
            spent += STRIDE
            return spent > STEPS

        with self._lock:
            self._connection.set_progress_handler(over_budget, STRIDE)
            try:
                cursor = self._connection.execute(sql, parameters)
                if cursor.description is None:
                    raise QueryError("there is no SELECT")
                rows = cursor.fetchmany(max_rows + 1)
                cursor.close()
            except (sqlite3.Error, sqlite3.Warning, UnicodeError, ValueError) as error:
                raise QueryError(_explained(error, spent)) from error
        return [column[0] for column in cursor.description], rows[:max_rows], len(rows) > max_rows

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def _authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action not in _READING or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FORBIDDEN_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _explained(error: Exception, spent: int) -> str:
    said = " ".join(str(error).split())
    if spent > STEPS:
        return "stopped: the query takes too many steps"
    if said in ("not authorized", "authorization denied"):
        return "only reading is allowed: one SELECT"
    if "one statement at a time" in said:
        return "one statement at a time"
    return said


def as_text(columns: Sequence[str], rows: Sequence[Sequence[Cell]], more: bool, max_characters: int = 200) -> str:
    """'name | age' and a line for each row; long cells are cut."""

    def cell(value: Cell) -> str:
        text = "NULL" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)
        return text if len(text) <= max_characters else text[: max_characters - 3] + "..."

    lines = [" | ".join(map(cell, line)) for line in (columns, *rows)]
    return "\n".join([*lines, f"... only the first {len(rows)} rows are shown" if more else f"({len(rows)} rows)"])
