"""The tokens of one request as they are sampled, for a reader that does not want to wait for the end."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from core.datum import SampleResponse
from core.futures import Future


@dataclass(frozen=True)
class StreamedToken:
    """One sampled token; `sequence` counts the samples of the request from 0, logprob is as in SampledSequence."""

    sequence: int
    token: int
    logprob: float


class TokenStream:
    """Iterate over the tokens in the order in which they were sampled; `future` is the whole response.

    The request is given up when the stream is closed, when the `with` block around it is left, and when nobody holds the
    stream any more. What makes the request fail is raised by the iteration.
    """

    def __init__(self, begin: Callable[[Callable[[StreamedToken], None]], Future[SampleResponse]]) -> None:
        """`begin` submits the request with what is to be called for each token."""
        tokens: queue.SimpleQueue[StreamedToken | None] = queue.SimpleQueue()  # None: there are no more
        self._tokens = tokens
        self.future = begin(tokens.put)
        self.future.add_done_callback(lambda: tokens.put(None))
        self._finalizer = weakref.finalize(self, self.future.cancel)
        self._finalizer.atexit = False

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> StreamedToken:
        found = self._tokens.get()
        if found is None:
            self._tokens.put(None)  # for whoever asks again
            if self._finalizer.alive:
                self.future.result()
            raise StopIteration
        return found

    def close(self) -> None:
        """Give up what is not sampled yet; iteration ends with the tokens that have come by now."""
        self._finalizer()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def tell(future: Future[SampleResponse], on_token: Callable[[StreamedToken], None], found: StreamedToken) -> None:
    """Call `on_token`; what it raises fails its own request, not the step that others share."""
    try:
        on_token(found)
    except Exception as error:
        future.set_exception(error)
