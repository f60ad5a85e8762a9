"""What finished operations leave in memory until it has been read, bounded: what is missed least is let go of first."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field

PROTOBUF, JSON = "application/x-protobuf", "application/json"


@dataclass(eq=False)
class Result:
    """The body of an answer, as it goes out. None while there is none, and after it was let go."""

    body: bytes | None = None
    media_type: str = JSON
    failed: bool = False
    waiting: int = 0  # polls that are held open for it

    @property
    def size(self) -> int:
        return len(self.body or b"")

    def settle(self, value: bytes | dict) -> None:
        """Protobuf or JSON."""
        if isinstance(value, bytes):
            self.body, self.media_type = value, PROTOBUF
        else:
            self.body, self.failed = json.dumps(value).encode(), "error" in value


@dataclass(eq=False)
class _Kept:
    """One owner's, each in the order in which they came."""

    read: dict[Result, None] = field(default_factory=dict)
    unread: dict[Result, None] = field(default_factory=dict)
    size: int = 0

    def victim(self) -> Result | None:
        return next(iter(self.read), None) or next((one for one in self.unread if not one.waiting), None)


class Results:
    """All results that are in memory. Over `most` bytes whoever keeps most loses first what was read, then what is oldest."""

    def __init__(self, most: int) -> None:
        self.most, self.size = most, 0
        self._kept: defaultdict[str, _Kept] = defaultdict(_Kept)

    def add(self, owner: str, result: Result) -> None:
        kept = self._kept[owner]
        kept.unread[result] = None
        kept.size += result.size
        self.size += result.size
        self._shrink(result)

    def note_read(self, owner: str, result: Result) -> None:
        """Repetitions of the poll are answered while there is room."""
        kept = self._kept[owner]
        if result in kept.unread:
            del kept.unread[result]
            kept.read[result] = None
        self._shrink()

    def drop(self, owner: str, result: Result) -> None:
        kept = self._kept[owner]
        if result not in kept.read and result not in kept.unread:
            return
        kept.read.pop(result, None)
        kept.unread.pop(result, None)
        kept.size -= result.size
        self.size -= result.size
        result.body = None
        if not (kept.read or kept.unread):
            del self._kept[owner]

    def _shrink(self, spared: Result | None = None) -> None:
        """Without what has only just come: a single result may be larger than all that may be kept."""
        while self.size > self.most:
            for owner, kept in sorted(self._kept.items(), key=lambda item: -item[1].size):
                victim = kept.victim()
                if victim is not None and victim is not spared:
                    self.drop(owner, victim)
                    break
            else:
                return
