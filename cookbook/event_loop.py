"""One event loop for the life of the process, in a thread of its own: connections of envs and judges belong to a loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def submit(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Run a coroutine beside the caller. Plain functions that it hands to `asyncio.to_thread` get a thread each."""
    return asyncio.run_coroutine_threadsafe(work, _loop())


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_default_executor(_Threads())

    def run() -> None:
        while True:
            with contextlib.suppress(SystemExit):  # of a task that an env started
                loop.run_forever()

    threading.Thread(target=run, name="rollouts", daemon=True).start()
    return loop


class _Threads(ThreadPoolExecutor):
    """A daemon thread per call: as many as there are envs, and one that hangs holds up neither the others nor the exit."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # whoever gives up waiting leaves the call alone

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except (StopIteration, SystemExit) as error:  # an event loop lets neither through
                stopped = RuntimeError(f"{type(error).__name__}: {error}")
                future.set_exception(stopped.with_traceback(error.__traceback__))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="env", daemon=True).start()
        return future
