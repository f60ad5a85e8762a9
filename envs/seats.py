"""Seats at one table: whoever is not to move waits, and one that leaves wakes the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import final


@final
class Table:
    """Seats wait in one event loop; `leave` and `changed` may be called from any thread."""

    def __init__(self) -> None:
        self.left: set[int] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition`, which is looked at after every `changed` and `leave`, holds."""
        self._loop = asyncio.get_running_loop()
        while True:
            self._news.clear()  # before the look: what happens after it wakes us
            if condition():
                return
            await self._news.wait()

    def changed(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits
                self._loop.call_soon_threadsafe(self._news.set)

    def leave(self, seat: int) -> None:
        self.left.add(seat)
        self.changed()
