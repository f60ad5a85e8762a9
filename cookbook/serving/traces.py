"""When the operations of a session waited and ran: rows in the store, shown as a trace that Perfetto and Chrome open."""

from __future__ import annotations

import contextlib
import heapq
import json
import time
from collections import defaultdict
from pathlib import Path

from cookbook.serving.meter import Operation

MOST_BYTES = 16 << 20  # of one session's rows, about 100,000 operations; then no more are kept
KEEP_SECONDS = 7 * 86400.0  # after the last row
TOGETHER = 256  # rows that are written at a time


class Traces:
    """One file of rows per session: kind, of (a training run or sampling session), start, waited, ran. Seconds all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._new: defaultdict[str, list[str]] = defaultdict(list)

    def note(self, operation: Operation) -> None:
        """One that has ended; those that belong to no session are not kept."""
        future = operation.future
        if not operation.of or future is None or future.begun is None or future.ended is None:
            return
        row = {
            "kind": operation.kind, "of": operation.of, "start": time.time() - time.monotonic() + future.begun,
            "waited": future.begun - operation.arrived, "ran": future.ended - future.begun,
        }  # fmt: skip
        session = operation.of.partition(":")[0]
        rows = self._new[session]
        rows.append(json.dumps(row))
        if len(rows) >= TOGETHER:
            self._append(session)

    def write(self) -> None:
        """What is not on disk yet. A trace is not worth an error: on a full disk its rows are lost."""
        for session in list(self._new):
            self._append(session)

    def _append(self, session: str) -> None:
        rows, path = self._new.pop(session), self._path(session)
        with contextlib.suppress(OSError):
            self.directory.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                if file.tell() < MOST_BYTES:
                    file.write("".join(f"{row}\n" for row in rows))

    def _path(self, session: str) -> Path:
        return self.directory / f"{session}.jsonl"

    def has(self, session: str) -> bool:
        self.write()
        return self._path(session).is_file()

    def chrome(self, session: str) -> bytes:
        """The trace event format, in JSON: a complete event per operation, in microseconds. b"" if there is none."""
        try:
            lines = self._path(session).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return b""
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # half a row, of a crash or a full disk
                rows.append(json.loads(line))
        return json.dumps({"traceEvents": _events(rows), "displayTimeUnit": "ms"}).encode()

    def remove_old(self) -> None:
        for path in self.directory.glob("*.jsonl"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - KEEP_SECONDS:
                    path.unlink()


def _events(rows: list[dict]) -> list[dict]:
    """Operations of one run or sampling session that overlap go into lanes below each other."""
    lanes: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)  # heaps of when a lane is free again, its number
    events: list[dict] = []
    count = 0
    for row in sorted(rows, key=lambda row: row["start"]):
        own = lanes[row["of"]]
        if own and own[0][0] <= row["start"]:
            lane = heapq.heappop(own)[1]
        else:
            lane = count = count + 1
            events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": row["of"]}})
        heapq.heappush(own, (row["start"] + row["ran"], lane))
        events.append(
            {
                "name": row["kind"], "cat": row["kind"], "ph": "X", "pid": 1, "tid": lane,
                "ts": round(row["start"] * 1e6), "dur": round(row["ran"] * 1e6),
                "args": {"model_id": row["of"], "waited_ms": round(row["waited"] * 1e3, 3)},
            }
        )  # fmt: skip
    return events
