"""Which samples of a client have finished: one poll for all of them (retrieve_futures) instead of one for each."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field

from cookbook.serving.refusal import Refusal
from cookbook.serving.results import Result

CLONES = 10**9  # a client's samples are numbered from its own number times this on


def group_of(sampler_id: str, clone: int) -> str:
    return f"{sampler_id}#{clone}"


@dataclass(eq=False)
class _Group:
    finished: dict[str, tuple[int, Result]] = field(default_factory=dict)  # request -> its place in the order, its result
    news: asyncio.Event = field(default_factory=asyncio.Event)
    polls: int = 0


class Completions:
    """Cursors are places in one order of everything that finished, which begins anew, and later, with every start."""

    def __init__(self) -> None:
        self._start = self._last = time.time_ns() // 1000
        self._groups: defaultdict[str, _Group] = defaultdict(_Group)

    def add(self, group: str, request_id: str, result: Result) -> None:
        self._last += 1
        known = self._groups[group]
        known.finished[request_id] = (self._last, result)
        known.news.set()

    def forget(self, group: str, request_id: str) -> None:
        known = self._groups.get(group)
        if known is not None:
            known.finished.pop(request_id, None)
            self._tidy_up(group)

    async def after(self, group: str, cursor: int, seconds: float) -> dict:
        """The reply: what finished after `cursor`, once there is something or `seconds` are over.

        Refusal 410 for a cursor of before the server's start: what its client waits for would never come.
        """
        if 0 < cursor < self._start:
            raise Refusal(410, "the server was restarted, and samples that it had not answered are lost: sample again")
        known = self._groups[group]
        self._trim(known, cursor)
        known.polls += 1
        try:
            if not known.finished:
                known.news.clear()
                await asyncio.wait_for(known.news.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            known.polls -= 1
            self._tidy_up(group)
        found = [(request_id, *rest) for request_id, rest in known.finished.items() if rest[0] > cursor]
        return {
            "completions": [_completion(request_id, result) for request_id, _, result in found],
            "cursor": max((place for _, place, _ in found), default=max(cursor, self._start)),
        }

    def _trim(self, known: _Group, cursor: int) -> None:
        """What the client has seen."""
        for request_id in [one for one, (place, _) in known.finished.items() if place <= cursor]:
            del known.finished[request_id]

    def _tidy_up(self, group: str) -> None:
        known = self._groups[group]
        if not (known.finished or known.polls):
            del self._groups[group]


def _completion(request_id: str, result: Result) -> dict:
    if result.failed:
        return {"state": "failed", "request_id": request_id}
    return {"state": "finished", "request_id": request_id, "response_payload_uncompressed_size": result.size}
