"""What survives a crash: an SQLite index of keys, sessions, runs, samplers and checkpoints, beside the files of weights."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cookbook.errors import UsageError
from cookbook.records import Lock, disk_full
from cookbook.serving.refusal import Refusal
from core.checkpoints import KINDS, check_name

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS keys(id TEXT PRIMARY KEY, owner TEXT NOT NULL, digest BLOB NOT NULL, created REAL NOT NULL,
    revoked REAL);
CREATE TABLE IF NOT EXISTS sessions(id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, seen REAL NOT NULL,
    display_name TEXT, metadata TEXT, finished TEXT);
CREATE TABLE IF NOT EXISTS runs(id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, base_model TEXT NOT NULL,
    lora TEXT NOT NULL, metadata TEXT, created REAL NOT NULL, seen REAL NOT NULL);
CREATE TABLE IF NOT EXISTS samplers(id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, base_model TEXT NOT NULL,
    path TEXT, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS checkpoints(run TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, owner TEXT NOT NULL,
    created REAL NOT NULL, expires REAL, public INTEGER NOT NULL DEFAULT 0, size INTEGER NOT NULL, metadata TEXT,
    PRIMARY KEY(run, kind, name));
CREATE TABLE IF NOT EXISTS saves(request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, key TEXT UNIQUE NOT NULL,
    digest TEXT NOT NULL, result TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS copies(run TEXT PRIMARY KEY, project TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS checkpoints_by_owner ON checkpoints(owner, created);
CREATE INDEX IF NOT EXISTS runs_by_owner ON runs(owner, seen);
"""


@dataclass(frozen=True)
class Checkpoint:
    """A row of the index; the files lie in `<store>/<run>/<kind>/<name>`."""

    run: str
    kind: str
    name: str
    owner: str
    created: float
    expires: float | None
    public: bool
    size: int
    metadata: dict[str, str] | None

    @property
    def uri(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


class Store:
    """One connection, used from any thread. Raises UsageError for a directory or an index that cannot be opened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.RLock()
        self._claim: Lock | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._db = _connect(directory / "serve.db")
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"store={directory} cannot be opened: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()
            if self._claim is not None:
                self._claim.release()
                self._claim = None

    def run_sql(self, statement: str, *values: Any) -> int:
        """Execute and commit; the number of rows changed."""
        with self._lock, self._db:
            return self._db.execute(statement, values).rowcount

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def row(self, query: str, *values: Any) -> sqlite3.Row | None:
        return next(iter(self.rows(query, *values)), None)

    def note_seen(self, table: str, row_id: str) -> None:
        """A sign of life of a session or run; a full disk is no reason to refuse the request that gave it."""
        with contextlib.suppress(sqlite3.OperationalError):
            self.run_sql(f"UPDATE {table} SET seen = ? WHERE id = ?", time.time(), row_id)

    def forget_sessions(self, keep: int) -> None:
        """Those that are over and have no checkpoints, with what belongs to them. Each owner's newest `keep` stay."""
        numbered = "SELECT id, row_number() OVER (PARTITION BY owner ORDER BY created DESC) AS place FROM sessions"
        rows = self.rows(
            f"SELECT id FROM ({numbered} WHERE finished IS NOT NULL) WHERE place > ?"
            " AND id NOT IN (SELECT session FROM runs WHERE id IN (SELECT run FROM checkpoints))",
            keep,
        )
        with self._lock, self._db:
            for session in (row["id"] for row in rows):
                self._db.execute("DELETE FROM samplers WHERE session = ?", (session,))
                self._db.execute("DELETE FROM runs WHERE session = ?", (session,))
                self._db.execute("DELETE FROM saves WHERE key > ? AND key < ?", (f"{session}:", f"{session};"))
                self._db.execute("DELETE FROM sessions WHERE id = ?", (session,))

    def secret(self) -> bytes:
        """What download links are signed with; made once per store."""
        self.run_sql("INSERT OR IGNORE INTO meta VALUES ('secret', ?)", secrets.token_hex(32))
        row = self.row("SELECT value FROM meta WHERE name = 'secret'")
        assert row is not None
        return bytes.fromhex(row["value"])

    def told(self, error: Exception) -> str:
        """An error's text in one line, with checkpoints by their URIs: where they lie is nobody's business."""
        return " ".join(str(error).split()).replace(f"{self.directory}/", "tinker://")

    # ---- checkpoints

    def directory_of(self, run: str, kind: str, name: str) -> Path:
        return self.directory / run / kind / name

    def add_checkpoint(
        self, run: str, kind: str, name: str, owner: str, ttl: int | None, metadata: dict[str, str] | None
    ) -> None:
        """After its directory has been renamed into place; a row of the same name is replaced.

        Raises sqlite3.OperationalError on a full disk: then there is no such checkpoint, unless there was one to overwrite.
        """
        try:
            self._enter(run, kind, name, owner, ttl, metadata)
        except sqlite3.OperationalError:
            if not self._is_known(run, kind, name):
                shutil.rmtree(self.directory_of(run, kind, name), ignore_errors=True)
            raise

    def _enter(self, run: str, kind: str, name: str, owner: str, ttl: int | None, metadata: dict[str, str] | None) -> None:
        size = sum(file.stat().st_size for file in self.directory_of(run, kind, name).iterdir())
        expires = time.time() + ttl if ttl is not None else None
        self.run_sql(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?)",
            run, kind, name, owner, time.time(), expires, size, json.dumps(metadata) if metadata else None,
        )  # fmt: skip

    def _is_known(self, run: str, kind: str, name: str) -> bool:
        return bool(self.rows("SELECT 1 FROM checkpoints WHERE run = ? AND kind = ? AND name = ?", run, kind, name))

    def checkpoint(self, uri: str, owner: str) -> Checkpoint:
        """One that `owner` may read. Refusal 400 for what is no URI, 404 for what is not there or another's."""
        run, kind, name = parse_uri(uri)
        found = self.find(run, kind, name)
        if found is None or not (found.owner == owner or found.public):
            raise Refusal(404, f"no checkpoint {uri}")
        return found

    def own_checkpoint(self, run: str, kind: str, name: str, owner: str) -> Checkpoint:
        found = self.find(run, kind, name)
        if found is None or found.owner != owner:
            raise Refusal(404, f"no checkpoint tinker://{run}/{kind}/{name}")
        return found

    def find(self, run: str, kind: str, name: str) -> Checkpoint | None:
        """Whoever it belongs to; None if it is not in the index, past its time, or without its files."""
        found = self.checkpoints("run = ? AND kind = ? AND name = ?", run, kind, name)
        return found[0] if found and self.directory_of(run, kind, name).is_dir() else None

    def checkpoints(self, where: str, *values: Any) -> list[Checkpoint]:
        """Newest first; those past their time are not there any more."""
        rows = self.rows(
            f"SELECT * FROM checkpoints WHERE {where} AND (expires IS NULL OR expires > ?) ORDER BY created DESC, rowid DESC",
            *values, time.time(),
        )  # fmt: skip
        return [Checkpoint(**{**dict(row), "public": bool(row["public"]), "metadata": _loads(row["metadata"])}) for row in rows]

    def delete_checkpoint(self, run: str, kind: str, name: str) -> None:
        """Renamed first: what is half deleted is not loadable, and `recover` does not take it for a new one.

        The files go before the row, which on a full disk finds room only then.
        """
        directory = self.directory_of(run, kind, name)
        aside = directory.with_name(f".{name}.{secrets.token_hex(4)}.deleted")
        with contextlib.suppress(FileNotFoundError):
            directory.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        self.run_sql("DELETE FROM checkpoints WHERE run = ? AND kind = ? AND name = ?", run, kind, name)

    def remove_expired(self, run: str | None = None) -> None:
        """Those past their time, of all runs or one."""
        query = "SELECT run, kind, name FROM checkpoints WHERE expires <= ? AND run = coalesce(?, run)"
        for row in self.rows(query, time.time(), run):
            self.delete_checkpoint(row["run"], row["kind"], row["name"])

    def totals(self, owner: str) -> dict[str, tuple[int, int]]:
        """kind -> number and bytes of the checkpoints that `owner` has."""
        query = "SELECT kind, count(*) AS n, sum(size) AS size FROM checkpoints WHERE owner = ? GROUP BY kind"
        return {row["kind"]: (row["n"], row["size"]) for row in self.rows(query, owner)}

    def recover(self) -> None:
        """At start: what was being written or deleted goes; what was whole but not yet in the index comes in.

        Raises UsageError while another server has the store: what that one is writing would go. It is ours until `close`.
        """
        if self._claim is None:
            self._claim = Lock(self.directory)
        owners = {row["id"]: row["owner"] for row in self.rows("SELECT id, owner FROM runs")}
        for run, owner in owners.items():
            for directory in (self.directory / run).glob("*/*"):
                kind, name = directory.parent.name, directory.name
                if name.startswith("."):
                    shutil.rmtree(directory, ignore_errors=True)
                elif not self._is_known(run, kind, name):
                    self._enter(run, kind, name, owner, None, None)
        for row in self.rows("SELECT run, kind, name FROM checkpoints"):
            if not self.directory_of(row["run"], row["kind"], row["name"]).is_dir():
                self.delete_checkpoint(row["run"], row["kind"], row["name"])
        self.remove_expired()

    def newest_state(self, run: str) -> str | None:
        """The URI of the newest checkpoint from which training can go on."""
        found = self.checkpoints("run = ? AND kind = 'weights'", run)
        return found[0].uri if found else None


def _connect(index: Path) -> sqlite3.Connection:
    db = sqlite3.connect(index, check_same_thread=False, timeout=30)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")
    db.executescript(_SCHEMA)
    return db


def no_room(error: BaseException) -> bool:
    """Whether the disk is full, for files or for the index."""
    return disk_full(error) or (isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_FULL)


def parse_uri(uri: str) -> tuple[str, str, str]:
    """(run, kind, name) of tinker://run/kind/name; Refusal 400 for anything else, traversal included."""
    parts = uri.removeprefix("tinker://").split("/")
    if not uri.startswith("tinker://") or len(parts) != 3 or parts[1] not in KINDS:
        raise Refusal(400, f"'{uri}' is not of the form tinker://<training_run_id>/<{'|'.join(KINDS)}>/<name>")
    for part in (parts[0], parts[2]):
        checked_name(part)
    return parts[0], parts[1], parts[2]


def checked_name(name: str) -> str:
    """One path segment of at most 200 characters; Refusal 400."""
    try:
        check_name(name)
    except ValueError as error:
        raise Refusal(400, str(error)) from error
    if len(name.encode()) > 200:
        raise Refusal(400, f"name of {len(name.encode())} bytes, expected at most 200")
    return name


def _loads(text: str | None) -> Any:
    return json.loads(text) if text else None
