"""Promises: an operation's id now, its result by long-polling later; the same operation sent twice is one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from fastapi import Response
from fastapi.responses import JSONResponse

from cookbook.serving.refusal import Refusal
from cookbook.serving.store import Store, no_room

log = logging.getLogger("cook.serve")
HOLD_SECONDS = 25.0  # how long a poll is held open before 408
KEEP_READ_SECONDS, KEEP_UNREAD_SECONDS = 300.0, 3600.0  # of finished results

DISK_FULL = "the disk of the server's store is full and nothing was saved: make room, or delete checkpoints, and save again"

Result = bytes | dict  # protobuf or JSON


@dataclass(eq=False)
class Promise:
    """An operation that was accepted."""

    id: str
    owner: str
    key: str
    digest: str
    reply: dict  # what accepted it, and accepts a repetition
    task: asyncio.Task[Result] = field(init=False)
    finished: float | None = None
    read: float | None = None


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


class Promises:
    """All of them. Used from the event loop alone."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._by_id: dict[str, Promise] = {}
        self._by_key: dict[str, Promise] = {}
        self._open: Counter[tuple[str, str]] = Counter()  # operations that are not over, by owner and by training run

    def begin(self, owner: str, key: str, digest: str, work: Callable[[str], Awaitable[Result]], **reply: object) -> dict:
        """Start `work(request_id)` unless `key` is known; the reply that accepts it. Refusal 400 if the payload differs."""
        known = self._by_key.get(key)
        if known is not None:
            _same(known.digest, digest, key)
            return known.reply
        saved = self.store.row("SELECT request_id, digest FROM saves WHERE key = ?", key)
        if saved is not None:
            _same(saved["digest"], digest, key)
            return {"request_id": saved["request_id"], **reply}
        request_id = secrets.token_hex(16)
        promise = Promise(request_id, owner, key, digest, {"request_id": request_id, **reply})
        self._by_id[request_id] = self._by_key[key] = promise
        promise.task = asyncio.create_task(self._settle(promise, work))
        marks = (("owner", owner), ("run", key.rpartition(":")[0]))
        self._open.update(marks)
        promise.task.add_done_callback(lambda _: self._close(marks))
        return promise.reply

    def _close(self, marks: tuple[tuple[str, str], ...]) -> None:
        for mark in marks:
            self._open[mark] -= 1
            if not self._open[mark]:
                del self._open[mark]

    def known(self, key: str) -> bool:
        return key in self._by_key

    def waiting(self, owner: str) -> int:
        """Operations of `owner` that are not over."""
        return self._open["owner", owner]

    def waiting_of(self, run_id: str) -> int:
        """Operations of a training run that are not over."""
        return self._open["run", run_id]

    def remember_save(self, request_id: str, result: dict) -> None:
        """A save is acknowledged once it is in the index: a restarted server still answers for it.

        If the disk has no room left for that, the checkpoint is there all the same.
        """
        promise = self._by_id[request_id]
        with contextlib.suppress(sqlite3.OperationalError):
            self.store.run_sql(
                "INSERT OR REPLACE INTO saves VALUES (?, ?, ?, ?, ?)",
                request_id, promise.owner, promise.key, promise.digest, json.dumps(result),
            )  # fmt: skip

    async def retrieve(self, request_id: str, owner: str, hold_seconds: float = HOLD_SECONDS) -> Response:
        """The result, 408 while there is none, 410 when it is lost."""
        promise = self._by_id.get(request_id)
        if promise is None or promise.owner != owner:
            return self._from_index(request_id, owner)
        await asyncio.wait([promise.task], timeout=hold_seconds)
        if not promise.task.done():
            return JSONResponse({"queue_state": "active"}, 408)
        promise.read = time.monotonic()
        if promise.task.cancelled():
            return JSONResponse({"error": "cancelled", "category": "user"})
        result = promise.task.result()
        if isinstance(result, bytes):
            return Response(result, media_type="application/x-protobuf")
        return JSONResponse(result)

    def _from_index(self, request_id: str, owner: str) -> Response:
        row = self.store.row("SELECT result FROM saves WHERE request_id = ? AND owner = ?", request_id, owner)
        if row is not None:
            return JSONResponse(json.loads(row["result"]))
        detail = f"request {request_id} is not known: the server was restarted, or its result was kept long enough"
        return JSONResponse({"detail": detail}, 410)

    def cancel(self, request_id: str, owner: str) -> None:
        promise = self._by_id.get(request_id)
        if promise is not None and promise.owner == owner:
            promise.task.cancel()

    def forget_old(self) -> None:
        now = time.monotonic()
        for promise in list(self._by_id.values()):
            read = promise.read is not None and now - promise.read > KEEP_READ_SECONDS
            if promise.task.done() and (read or now - (promise.finished or now) > KEEP_UNREAD_SECONDS):
                del self._by_id[promise.id], self._by_key[promise.key]

    async def drop_all(self) -> None:
        for promise in self._by_id.values():
            promise.task.cancel()
        await asyncio.gather(*(promise.task for promise in self._by_id.values()), return_exceptions=True)

    async def _settle(self, promise: Promise, work: Callable[[str], Awaitable[Result]]) -> Result:
        """One operation that fails says so in its own result and disturbs no other."""
        try:
            return await work(promise.id)
        except Refusal as error:
            return {"error": error.detail, "category": "user"}
        except (ValueError, FloatingPointError) as error:  # the engine's door; weights that have diverged
            return {"error": self.store.told(error), "category": "user"}
        except Exception as error:
            if no_room(error):
                log.warning("%s failed: the disk is full", promise.key)
                return {"error": DISK_FULL, "category": "server"}
            log.exception("%s failed", promise.key)
            return {"error": f"{type(error).__name__}: {self.store.told(error)}", "category": "server"}
        finally:
            promise.finished = time.monotonic()


def _same(known: str, given: str, key: str) -> None:
    if known != given:
        raise Refusal(400, f"{key} was sent before with another content")
