"""What is alive while the server runs: base models, training clients and samplers, each with its owner."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import sqlite3
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from cookbook.serving import keys
from cookbook.serving.futures import Promises
from cookbook.serving.meter import Meter
from cookbook.serving.refusal import Refusal
from cookbook.serving.settings import Limits
from cookbook.serving.store import Checkpoint, Store
from cookbook.serving.traces import Traces
from core import Future, SamplingClient, ServiceClient, TrainingClient
from core.checkpoints import read_base_model, read_lora_config

log = logging.getLogger("cook.serve")
SILENT_SECONDS = 600.0  # a client sends a heartbeat every 10
T = TypeVar("T")


@dataclass(eq=False)
class Run:
    """A training client that somebody drives over the wire."""

    id: str
    session: str
    owner: str
    base_model: str
    meter: Meter
    opening: asyncio.Future[TrainingClient] | None = None
    order: asyncio.Lock = field(default_factory=asyncio.Lock)
    inflight: weakref.WeakSet[Sampler] = field(default_factory=weakref.WeakSet)  # all sample from the newest weights
    done: dict[str, tuple[str, str]] = field(default_factory=dict)  # see Promises.begin
    closed: bool = False
    trained_tokens: int = 0

    async def submit(self, kind: str, verb: Callable[[TrainingClient], Future[T]]) -> T:
        """Queue a verb (of one of meter.KINDS) behind those that arrived before, then wait for its result."""
        with self.meter.operation(kind, self.owner, self.id) as operation:
            async with self.order:
                trainer = await self.opened()
                try:
                    operation.future = future = await asyncio.to_thread(verb, trainer)
                except RuntimeError as error:
                    if not self.closed:
                        raise
                    raise Refusal(410, f"training run {self.id} was closed before this operation began") from error
            return await future

    async def opened(self) -> TrainingClient:
        assert self.opening is not None
        try:
            return await asyncio.shield(self.opening)
        except ValueError as error:
            raise Refusal(400, f"training run {self.id} could not be opened: {error}") from error

    @property
    def trainer(self) -> TrainingClient | None:
        """Where it has opened."""
        opening = self.opening
        if opening is None or not opening.done() or opening.cancelled() or opening.exception() is not None:
            return None
        return opening.result()

    def count_trained(self, num_tokens: int) -> None:
        self.trained_tokens += num_tokens
        self.meter.trained.labels(self.owner).inc(num_tokens)


@dataclass(eq=False)
class Sampler:
    """Where a sampling session samples from."""

    client: SamplingClient
    of: str  # limits.samplers counts by it: the training client of a snapshot that is not saved, else the session
    busy: int = 0  # requests under way
    used: float = field(default_factory=time.monotonic)


class Server:
    """The state behind the endpoints. Its methods run on the event loop."""

    def __init__(
        self, service: ServiceClient, models: list[str], store: Store, limits: Limits, poll_together: bool = False
    ) -> None:
        self.service, self.models, self.store, self.limits = service, models, store, limits
        self.poll_together = poll_together
        self.promises = Promises(store, limits.results_mb << 20)
        self.traces = Traces(store.directory / "traces")
        self.meter = Meter(self.traces.note)
        self.runs: dict[str, Run] = {}
        self.samplers: dict[str, tuple[str, Sampler]] = {}  # sampling session -> owner, sampler
        self.base: dict[str, SamplingClient] = {}
        self.session_keys: dict[tuple[str, str], str] = {}  # owner, idempotency key -> session
        self.joined: dict[str, int] = {}  # sampling session -> clones that have asked for a number
        self.sampling: dict[str, int] = {}  # owner -> samples in flight
        self.copying = asyncio.Lock()  # checkpoints are copied one after another
        self.started = time.time()
        self._loading = asyncio.Lock()
        self._by_path: weakref.WeakValueDictionary[tuple[str, float], SamplingClient] = weakref.WeakValueDictionary()

    def open(self) -> None:
        """Load the base models, which stay; tidy up what a crash left. ValueError for a model that cannot be loaded."""
        self.store.recover()
        self.store.run_sql("DELETE FROM samplers WHERE path = ''")  # their weights are gone
        for name in self.models:
            self.base[name] = self.service.create_sampling_client(base_model=name).result()

    async def close(self) -> None:
        await self.promises.drop_all()
        for session in {run.session for run in self.runs.values()}:
            self.release(session)
        self.samplers.clear()
        self.traces.write()
        for client in self.base.values():
            client.close()

    async def housekeeping(self) -> None:
        while True:
            await asyncio.sleep(30)
            try:
                self.tidy_up()
            except (OSError, sqlite3.Error) as error:  # a full disk: again in half a minute
                log.warning("the store could not be tidied up: %s", error)

    def tidy_up(self) -> None:
        """Old results, checkpoints past their time, silent sessions and old ones of which nothing is left go."""
        self.promises.forget_old(time.monotonic())
        self.traces.write()
        self.traces.remove_old()
        self.store.remove_expired()
        silent = time.time() - self.limits.session_hours * 3600
        for row in self.store.rows("SELECT id FROM sessions WHERE finished IS NULL AND seen < ?", silent):
            self.finish(row["id"], "no sign of life")
        self._trim_silent()
        self.store.forget_sessions(keep=self.limits.sessions)

    @property
    def needs_key(self) -> bool:
        return keys.any_made(self.store)

    # ---- sessions

    def session(self, session_id: str, owner: str) -> str:
        """Its id, if it is `owner`'s and not over. Refusal 404 or 410."""
        row = self.store.row("SELECT owner, finished FROM sessions WHERE id = ?", session_id)
        if row is None or row["owner"] != owner:
            raise Refusal(404, f"no session {session_id}")
        if row["finished"] is not None:
            raise Refusal(410, f"session {session_id} is over ({row['finished']})")
        return session_id

    def num_sessions(self, owner: str) -> int:
        """Those that are not over."""
        row = self.store.row("SELECT count(*) AS n FROM sessions WHERE owner = ? AND finished IS NULL", owner)
        assert row is not None
        return row["n"]

    def finish(self, session_id: str, reason: str) -> None:
        self.store.run_sql("UPDATE sessions SET finished = ? WHERE id = ?", reason, session_id)
        self.session_keys = {key: session for key, session in self.session_keys.items() if session != session_id}
        self.release(session_id)

    def release(self, session_id: str) -> None:
        """Its training clients leave the engine after what they have submitted; its samplers go."""
        for run in [run for run in self.runs.values() if run.session == session_id]:
            del self.runs[run.id]
            run.closed = True
            if run.trainer is not None:
                run.trainer.close()
        for sampler_id in [key for key in self.samplers if key.startswith(f"{session_id}:")]:
            self._let_go(sampler_id)

    # ---- training clients

    def run(self, run_id: str, owner: str) -> Run:
        """A living one of `owner`'s. Refusal 404 names the checkpoint to go on from."""
        run = self.runs.get(run_id)
        if run is not None and run.owner == owner:
            return run
        row = self.store.row("SELECT owner FROM runs WHERE id = ?", run_id)
        if row is None or row["owner"] != owner:
            raise Refusal(404, f"no training run {run_id}")
        newest = self.store.newest_state(run_id)
        advice = f"go on from its last checkpoint, {newest}" if newest else "it had no checkpoint"
        raise Refusal(404, f"training run {run_id} is not loaded (the server was restarted, or its session is over): {advice}")

    def add_run(self, run: Run, lora: dict, metadata: dict | None, opening: Future[TrainingClient]) -> Run:
        async def opened() -> TrainingClient:
            try:
                trainer = await opening
            except ValueError as error:
                raise ValueError(self.store.told(error)) from error
            trainer.training_run_id = run.id
            if run.id not in self.runs:  # the session ended meanwhile
                trainer.close()
            return trainer

        self.store.run_sql(
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            run.id, run.session, run.owner, run.base_model, json.dumps(lora),
            json.dumps(metadata) if metadata else None, time.time(), time.time(),
        )  # fmt: skip
        self.runs[run.id] = run
        run.opening = asyncio.ensure_future(opened())
        return run

    def check_room(self, owner: str, size: int) -> None:
        """Refusal 429 where an operation of `size` bytes has to wait until others are over."""
        waiting, most = self.promises.waiting_bytes(owner), self.limits.queued_mb
        if waiting and waiting + size > most << 20:
            raise Refusal(429, f"operations of {waiting:,} bytes wait and {size:,} more came: {most} MB may (limits.queued_mb)")

    def forget_run(self, run_id: str) -> None:
        """One that could not be opened."""
        self.runs.pop(run_id, None)
        self.store.run_sql("DELETE FROM runs WHERE id = ?", run_id)

    def check_new_run(self, run_id: str, owner: str) -> None:
        if self.store.rows("SELECT 1 FROM runs WHERE id = ?", run_id):
            raise Refusal(400, f"training run {run_id} exists already")
        if self._open(owner) >= self.limits.training_clients:
            self._close_silent(owner)
        if self._open(owner) >= self.limits.training_clients:
            raise Refusal(429, f"{self.limits.training_clients} training clients are open (limits.training_clients)")

    def _open(self, owner: str) -> int:
        return sum(run.owner == owner for run in self.runs.values())

    def _close_silent(self, owner: str) -> None:
        """Sessions whose client has gone without a word: a program that ends tells nobody."""
        silent = time.time() - SILENT_SECONDS
        for row in self.store.rows("SELECT id FROM sessions WHERE owner = ? AND finished IS NULL AND seen < ?", owner, silent):
            if not self.store.rows("SELECT 1 FROM runs WHERE session = ? AND seen >= ?", row["id"], silent):
                self.finish(row["id"], "no sign of life, and others needed the room")

    def check_model(self, name: str) -> str:
        if name not in self.base:
            raise Refusal(400, f"base model '{name}' is not served here, there are: {', '.join(self.base)}")
        return name

    # ---- samplers

    def sampler(self, sampler_id: str, owner: str) -> Sampler | None:
        """A living one of `owner`'s; None where `reopen` can bring it back."""
        known_owner, sampler = self.samplers.get(sampler_id, (None, None))
        if sampler is not None and known_owner == owner:
            sampler.used = time.monotonic()
            return sampler
        row = self.store.row("SELECT owner FROM samplers WHERE id = ?", sampler_id)
        if row is None or row["owner"] != owner:
            raise self._no_sampler(sampler_id, owner)
        return None

    def _no_sampler(self, sampler_id: str, owner: str) -> Refusal:
        session = sampler_id.partition(":")[0]
        if not self.store.rows("SELECT 1 FROM sessions WHERE id = ? AND owner = ?", session, owner):
            return Refusal(404, f"no sampling session {sampler_id}")
        self.session(session, owner)
        return Refusal(
            404,
            f"sampling session {sampler_id} is not there, or not any more: weights that were not saved go when"
            f" {self.limits.samplers} newer samplers of their training client are there (limits.samplers), with their session,"
            " and when the server was restarted. Make a new one, or save the weights under a name and sample from that",
        )

    async def reopen(self, sampler_id: str, owner: str) -> Sampler:
        """A sampling session of a base model or a checkpoint, which is not in memory (any more)."""
        row = self.store.row("SELECT * FROM samplers WHERE id = ?", sampler_id)
        assert row is not None and row["path"] != ""
        self.session(row["session"], owner)
        return await self.add_sampler(sampler_id, row["session"], owner, row["base_model"], row["path"])

    async def add_sampler(self, sampler_id: str, session: str, owner: str, base_model: str, path: str | None) -> Sampler:
        client = self.base[self.check_model(base_model)] if path is None else await self.load_sampler(path, owner)
        self.session(session, owner)  # it may have ended meanwhile
        return self.keep_sampler(sampler_id, session, owner, base_model, path, Sampler(client, session))

    def keep_sampler(
        self, sampler_id: str, session: str, owner: str, base_model: str, path: str | None, sampler: Sampler
    ) -> Sampler:
        """path "" stands for weights that are nowhere on disk: these do without the index when the disk is full."""
        try:
            self.store.run_sql(
                "INSERT OR REPLACE INTO samplers VALUES (?, ?, ?, ?, ?, ?)",
                sampler_id, session, owner, base_model, path, time.time(),
            )  # fmt: skip
        except sqlite3.OperationalError:
            if path != "":
                raise
        self.samplers[sampler_id] = (owner, sampler)
        self._trim(sampler.of, self.limits.samplers)
        return sampler

    def _trim(self, of: str, most: int, unused_since: float = math.inf) -> None:
        """Of the samplers that count together the least recently used beyond `most` go, but none with requests under way."""
        theirs = sorted((one.used, key, one.busy) for key, (_, one) in self.samplers.items() if one.of == of)
        for used, sampler_id, busy in theirs[: -max(1, most)]:
            if not busy and used < unused_since:
                self._let_go(sampler_id)

    def _trim_silent(self) -> None:
        """Of a client that may be gone one sampler stays: the one that a loop which was only asleep goes on with."""
        rows = self.store.rows("SELECT id FROM sessions WHERE finished IS NULL AND seen < ?", time.time() - SILENT_SECONDS)
        silent = {row["id"] for row in rows}
        for of in {one.of for key, (_, one) in self.samplers.items() if key.partition(":")[0] in silent}:
            self._trim(of, 1, time.monotonic() - SILENT_SECONDS)

    def _let_go(self, sampler_id: str) -> None:
        """What was saved is loaded again when it is asked for."""
        del self.samplers[sampler_id]
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk: the row says no more than that it was there
            if self.store.run_sql("DELETE FROM samplers WHERE id = ? AND path = ''", sampler_id):
                self.joined.pop(sampler_id, None)

    async def load_sampler(self, uri: str, owner: str) -> SamplingClient:
        """A saved adapter; sessions of one checkpoint share it."""
        checkpoint = self.store.checkpoint(uri, owner)
        key = (checkpoint.uri, checkpoint.created)
        async with self._loading:  # who asks for it meanwhile gets the same
            client = self._by_path.get(key)
            if client is None:
                directory = self.store.directory_of(checkpoint.run, checkpoint.kind, checkpoint.name)
                try:
                    client = await self.service.create_sampling_client(directory, self.base_model_of(checkpoint))
                except ValueError as error:
                    raise Refusal(400, self.store.told(error)) from error
                self._by_path[key] = client
        return client

    def lora_of(self, checkpoint: Checkpoint) -> dict:
        return asdict(read_lora_config(self.store.directory_of(checkpoint.run, checkpoint.kind, checkpoint.name)))

    def base_model_of(self, checkpoint: Checkpoint) -> str:
        name = read_base_model(self.store.directory_of(checkpoint.run, checkpoint.kind, checkpoint.name))
        return self.check_model(name)
