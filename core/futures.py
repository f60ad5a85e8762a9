"""A result that is both waited for (`future.result(timeout)`) and awaited (`await future`)."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Future(Generic[T]):
    """What every verb of a client returns at once."""

    def __init__(self) -> None:
        self._inner: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._inner.set_running_or_notify_cancel()  # a cancelled await gives up waiting; the operation runs all the same

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

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self._inner).__await__()

    def resolve(self, work: Callable[[], T]) -> None:
        """Run `work` and settle with its value or exception (engine side)."""
        try:
            self._inner.set_result(work())
        except BaseException as error:
            self._inner.set_exception(error)

    def set_result(self, value: T) -> None:
        self._inner.set_result(value)

    def set_exception(self, error: BaseException) -> None:
        if not self._inner.done():
            self._inner.set_exception(error)
