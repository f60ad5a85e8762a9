"""Ctrl-C and SIGTERM: the first asks for one checkpoint and a clean exit, a second Ctrl-C exits at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType

STOP: ContextVar[threading.Event | None] = ContextVar("stop", default=None)  # set from outside: a thread of a sweep


class Interrupts:
    """Holds the two signals between `install` and `restore`. Only the main thread can; elsewhere both do nothing."""

    def __init__(self, log: Callable[[str], None], last_words: Callable[[], object]) -> None:
        self.stop = STOP.get() or threading.Event()
        self._log = log  # must not print: a handler may run in the middle of another print
        self._last_words = last_words
        self._before: dict[int, object] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.stop.is_set():
            self.stop.set()
            self._say(f"{name}: stopping after this step with a checkpoint (Ctrl-C exits at once)")
        elif number == signal.SIGINT:  # a second SIGTERM is a scheduler repeating itself
            try:
                self._say("second interrupt: exiting at once")
                self._last_words()
            finally:
                os._exit(130)  # no atexit, no joining of an engine thread that may be minutes from done

    def _say(self, text: str) -> None:
        self._log(text)
        show_cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""
        with contextlib.suppress(OSError):
            os.write(2, show_cursor + b"\n" + text.encode() + b"\n")
