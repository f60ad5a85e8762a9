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

from cookbook.serving.completions import Completions
from cookbook.serving.refusal import Refusal
from cookbook.serving.results import Result, Results
from cookbook.serving.store import Store, no_room

log = logging.getLogger("cook.serve")
HOLD_SECONDS = 25.0  # how long a poll is held open before 408
KEEP_READ_SECONDS, KEEP_UNREAD_SECONDS = 300.0, 3600.0  # of finished results

DISK_FULL = "the disk of the server's store is full and nothing was saved: make room, or delete checkpoints, and save again"

Value = bytes | dict  # protobuf or JSON


@dataclass(eq=False)
class Promise:
    """An operation that was accepted."""

    id: str
    owner: str
    key: str
    digest: str
    reply: dict  # what accepted it, and accepts a repetition
    size: int  # bytes of what was sent
    done: dict[str, tuple[str, str]] | None
    group: str | None  # that of one client's samples, which may be asked for together
    task: asyncio.Task[Value] | None = None  # until it is over
    result: Result = field(default_factory=Result)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    finished: float = 0.0
    read: float | None = None


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


class Promises:
    """All of them. Used from the event loop alone."""

    def __init__(self, store: Store, results_bytes: int) -> None:
        self.store, self.results, self.completions = store, Results(results_bytes), Completions()
        self._by_id: dict[str, Promise] = {}
        self._by_key: dict[str, Promise] = {}
        self._open: Counter[tuple[str, str]] = Counter()  # see _marks

    def begin(
        self, owner: str, key: str, digest: str, work: Callable[[str], Awaitable[Value]],
        size: int = 0, done: dict[str, tuple[str, str]] | None = None, group: str | None = None, **reply: object,
    ) -> dict:  # fmt: skip
        """Start `work(request_id)` unless `key` is known; the reply that accepts it. Refusal 400 if the payload differs.

        `size` is that of what was sent, in bytes. `done` (key -> request id, digest) takes the operation up when it is
        forgotten here: for as long as its keeper remembers it, it does not run again.
        """
        known = self._by_key.get(key)
        if known is not None:
            _same(known.digest, digest, key)
            return known.reply
        before = (done or {}).get(key) or self.store.row("SELECT request_id, digest FROM saves WHERE key = ?", key)
        if before is not None:
            _same(before[1], digest, key)
            return {"request_id": before[0], **reply}
        request_id = secrets.token_hex(16)
        promise = Promise(request_id, owner, key, digest, {"request_id": request_id, **reply}, size, done, group)
        self._by_id[request_id] = self._by_key[key] = promise
        promise.task = asyncio.create_task(self._value(promise, work))
        self._open.update(_marks(promise))
        promise.task.add_done_callback(lambda task: self._settle(promise, task))
        return promise.reply

    def _settle(self, promise: Promise, task: asyncio.Task[Value]) -> None:
        """Its result goes where results are counted; the task, which would hold it too, goes."""
        value = {"error": "cancelled", "category": "user"} if task.cancelled() else task.result()
        promise.task, promise.finished = None, time.monotonic()
        promise.result.settle(value)
        self.results.add(promise.owner, promise.result)
        promise.over.set()
        if promise.group is not None:
            self.completions.add(promise.group, promise.id, promise.result)
        for mark, count in _marks(promise).items():
            self._open[mark] -= count
            if not self._open[mark]:
                del self._open[mark]

    def known(self, key: str) -> bool:
        return key in self._by_key

    def waiting(self, owner: str) -> int:
        """Operations of `owner` that are not over."""
        return self._open["owner", owner]

    def waiting_bytes(self, owner: str) -> int:
        """What was sent with them."""
        return self._open["bytes", owner]

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
        result = promise.result
        result.waiting += 1  # while somebody waits for it, it is not let go
        try:
            await asyncio.wait_for(promise.over.wait(), hold_seconds)
        except TimeoutError:
            return JSONResponse({"queue_state": "active"}, 408)
        finally:
            result.waiting -= 1
        if result.body is None:
            return self._from_index(request_id, owner)
        promise.read = time.monotonic()
        answer = Response(result.body, media_type=result.media_type)
        self.results.note_read(owner, result)
        return answer

    def acknowledge(self, group: str, request_ids: list[str], owner: str) -> None:
        """Results of `group` that arrived: they go. That they were asked for stays known, so that none is made twice."""
        for request_id in request_ids:
            promise = self._by_id.get(request_id)
            if promise is not None and promise.owner == owner and promise.group == group and promise.over.is_set():
                self.results.drop(owner, promise.result)

    def _from_index(self, request_id: str, owner: str) -> Response:
        row = self.store.row("SELECT result FROM saves WHERE request_id = ? AND owner = ?", request_id, owner)
        if row is not None:
            return JSONResponse(json.loads(row["result"]))
        detail = (
            f"the result of request {request_id} is gone: the server was restarted, it was kept long enough, or others"
            " needed the room (limits.results_mb)"
        )
        return JSONResponse({"detail": detail}, 410)

    def cancel(self, request_id: str, owner: str) -> None:
        promise = self._by_id.get(request_id)
        if promise is not None and promise.owner == owner and promise.task is not None:
            promise.task.cancel()

    def forget_old(self, now: float) -> None:
        """By time.monotonic()."""
        for promise in list(self._by_id.values()):
            read = promise.read is not None and now - promise.read > KEEP_READ_SECONDS
            if promise.over.is_set() and (read or now - promise.finished > KEEP_UNREAD_SECONDS):
                self.results.drop(promise.owner, promise.result)
                del self._by_id[promise.id], self._by_key[promise.key]
                if promise.done is not None:
                    promise.done[promise.key] = (promise.id, promise.digest)
                if promise.group is not None:
                    self.completions.forget(promise.group, promise.id)

    async def drop_all(self) -> None:
        tasks = [promise.task for promise in self._by_id.values() if promise.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _value(self, promise: Promise, work: Callable[[str], Awaitable[Value]]) -> Value:
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


def _marks(promise: Promise) -> dict[tuple[str, str], int]:
    """What an operation that is not over counts for: its owner's, also in bytes, and its training run's."""
    owner, run = promise.owner, promise.key.rpartition(":")[0]
    return {("owner", owner): 1, ("bytes", owner): promise.size, ("run", run): 1}


def _same(known: str, given: str, key: str) -> None:
    if known != given:
        raise Refusal(400, f"{key} was sent before with another content")
