"""A result that is both waited for (`future.result(timeout)`) and awaited (`await future`)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Future(Generic[T]):
    """What every verb of a client returns at once.

    A cancelled await gives up waiting; the operation runs all the same, unless it is `cancellable` (sampling).
    """

    def __init__(self, cancellable: bool = False) -> None:
        self.begun: float | None = None  # by time.monotonic(): when the engine took the operation up
        self.ended: float | None = None  # when it had the result, or the error
        self._inner: concurrent.futures.Future[T] = concurrent.futures.Future()
        if not cancellable:
            self._inner.set_running_or_notify_cancel()

    @classmethod
    def completed(cls, value: T) -> Future[T]:
        future = cls()
        future._inner.set_result(value)
        return future

    def result(self, timeout: float | None = None) -> T:
        """The value, or the operation's exception; TimeoutError after `timeout` seconds."""
        return self._inner.result(timeout)

    def done(self) -> bool:
        return self._inner.done()

    def cancel(self) -> bool:
        """Give the operation up; False where it cannot be, or is over."""
        return self._inner.cancel()

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self._inner).__await__()

    def begin(self) -> None:
        """The operation starts now, unless it has started before (engine side)."""
        if self.begun is None:
            self.begun = time.monotonic()

    def resolve(self, work: Callable[[], T]) -> None:
        """Run `work` and settle with its value or exception (engine side)."""
        self.begin()
        try:
            value = work()
        except BaseException as error:
            self.set_exception(error)
        else:
            self.set_result(value)

    def set_result(self, value: T) -> None:
        self.ended = self.ended or time.monotonic()
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled in this moment
            self._inner.set_result(value)

    def set_exception(self, error: BaseException) -> None:
        self.ended = self.ended or time.monotonic()
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # settled already
            self._inner.set_exception(error)

    def then(self, change: Callable[[T], U]) -> Future[U]:
        """A future of what `change` makes of the value; an exception goes through."""
        changed: Future[U] = Future()

        def settle(_: object) -> None:
            changed.begun = self.begun
            changed.resolve(lambda: change(self._inner.result()))

        self._inner.add_done_callback(settle)
        return changed

    def add_done_callback(self, tell: Callable[[], None]) -> None:
        """Call `tell` once there is a result, an exception or a cancellation."""
        self._inner.add_done_callback(lambda _: tell())

    def add_error_callback(self, tell: Callable[[BaseException], None]) -> None:
        """Call `tell` with the exception, should there be one."""

        def settled(inner: concurrent.futures.Future[T]) -> None:
            if not inner.cancelled() and (error := inner.exception()) is not None:
                tell(error)

        self._inner.add_done_callback(settled)
