"""A small SQLite database that a policy may query: nothing but reading, within limits of steps, time, memory and sizes."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from typing import TypeAlias, final

Cell: TypeAlias = str | int | float | bytes | None

STEPS = 10_000_000  # instructions of SQLite's machine, some tenths of a second; counted, so that a busy machine changes nothing
CPU_SECONDS = 2.0  # of a query's thread: for steps that take long
STRIDE = 1_000  # steps from one look at the limits to the next; none happens inside a function of SQLite's
CELL_BYTES = 4_000  # the longest value that may be made on the way: with it, a function takes less than a millisecond
PATTERN_BYTES = 100  # of LIKE and GLOB, whose time is that of the value times that of the pattern
HEAP_BYTES = 512 << 20  # of SQLite in the whole process, the only limit on it that there is; a database here takes 0.04 MB
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
        self._connection.execute(f"PRAGMA hard_heap_limit = {HEAP_BYTES}")
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, CELL_BYTES)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, PATTERN_BYTES)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0)
        self._connection.set_authorizer(_authorize)

    def query(self, sql: str, max_rows: int, parameters: Sequence[Cell] = ()) -> tuple[list[str], list[tuple[Cell, ...]], bool]:
        """Names of the columns, at most `max_rows` rows, whether there were more. QueryError for anything but one SELECT."""
        with self._lock:
            budget = _Budget()
            self._connection.set_progress_handler(budget.is_over, STRIDE)
            try:
                cursor = self._connection.execute(sql, parameters)
                if cursor.description is None:
                    raise QueryError("there is no SELECT")
                rows = cursor.fetchmany(max_rows + 1)
                cursor.close()
            except MemoryError:
                raise QueryError("stopped: the query takes too much memory") from None
            except (sqlite3.Error, sqlite3.Warning, UnicodeError, ValueError) as error:
                raise QueryError(budget.why or _explained(error)) from error
        return [column[0] for column in cursor.description], rows[:max_rows], len(rows) > max_rows

    def close(self) -> None:
        with self._lock:
            self._connection.close()


@final
class _Budget:
    """Of one query, for the thread that runs it."""

    def __init__(self) -> None:
        self.why = ""  # it was stopped
        self._steps, self._until = 0, time.thread_time() + CPU_SECONDS

    def is_over(self) -> bool:
        self._steps += STRIDE
        if self._steps > STEPS:
            self.why = "stopped: the query takes too many steps"
        elif time.thread_time() > self._until:
            self.why = f"stopped: the query takes more than {CPU_SECONDS:g} s of CPU time"
        return bool(self.why)


def _authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action not in _READING or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FORBIDDEN_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _explained(error: Exception) -> str:
    said = " ".join(str(error).split())
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
