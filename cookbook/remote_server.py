"""The other end of the wire: its address and key, whether it answers, and what goes wrong there said in one line."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from cookbook.errors import UsageError
from core import Future

log = logging.getLogger("cook.remote")
PATIENCE_SECONDS = 300.0  # without an answer, then a run gives up; the SDK by itself would wait for ever
HOSTED = "https://tinker.thinkingmachines.dev/services/tinker-prod"  # as in the SDK
KEY_PREFIXES = ("tml-", "eyJ")
NO_KEY = "tml-none"  # the SDK insists on a key, a `cook serve` without keys takes any


class Refused(UsageError):
    """The server will not do this, now or later."""


@dataclass(frozen=True)
class Server:
    """A Tinker server as `service=` names it."""

    service: str  # tinker, or a URL
    url: str
    key: str | None  # None: the SDK finds one that `tinker auth login` has stored

    @classmethod
    def named(cls, service: str) -> Server:
        """The key is TINKER_API_KEY. UsageError for what is no address, or no key."""
        key = os.environ.get("TINKER_API_KEY")
        if key and not key.startswith(KEY_PREFIXES):
            raise UsageError("TINKER_API_KEY is no key of a Tinker server: those begin with tml-")
        if service == "tinker":
            return cls(service, os.environ.get("TINKER_BASE_URL", HOSTED).rstrip("/"), key or None)
        parts = urllib.parse.urlsplit(service)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"service={service}: expected local, tinker, or the URL of a server such as http://box:8000")
        return cls(service, service.rstrip("/"), key or NO_KEY)

    def knock(self) -> None:
        """UsageError at once when nobody is there: the SDK would try for minutes."""
        start = "" if self.service == "tinker" else "start one (cook serve), or "
        headers = {} if self.key is None else {"X-API-Key": self.key}
        try:
            reply = httpx.post(f"{self.url}/api/v1/client/config", json={}, headers=headers, timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(
                f"service={self.service}: no server answers there ({reason}): {start}correct the address"
            ) from error
        if reply.status_code == 401 and self.key is not None:
            raise self._status_error(401, _detail(_json(reply), reply.text))
        if reply.status_code >= 400 and reply.status_code not in (401, 403, 429):
            raise UsageError(f"service={self.service}: what answers there is no Tinker server (HTTP {reply.status_code})")

    def answers(self) -> bool:
        """Whether anybody is there now."""
        try:
            return httpx.get(f"{self.url}/api/v1/healthz", timeout=5).status_code < 500
        except httpx.HTTPError:
            return False

    def meaning(self, error: BaseException) -> BaseException:
        """What the SDK raised, as our own one line; what is not the wire's fault stays what it is."""
        import tinker

        for one in _causes(error):
            if isinstance(one, tinker.APIStatusError):
                return self._status_error(one.status_code, _detail(one.body, one.message))
            if isinstance(one, tinker.APIConnectionError):
                return UsageError(f"{self.service} does not answer any more ({one.message.rstrip('.').lower()})")
            if isinstance(one, tinker.RequestFailedError):
                return self._failed(one)
        if isinstance(error, tinker.TinkerError):
            return UsageError(f"service={self.service}: {' '.join(str(error).split())}")
        return error

    def _status_error(self, status: int, detail: str) -> UsageError:
        if status == 401:
            given = self.key not in (None, NO_KEY)
            told = "does not take the key in TINKER_API_KEY" if given else "wants a key, set TINKER_API_KEY"
            return UsageError(f"{self.service} {told} ({detail})")
        if status == 410:
            return UsageError(f"{self.service} has lost what was under way ({detail})")
        if status >= 500 or status == 429:
            return UsageError(f"{self.service} fails with HTTP {status}: {detail}")
        return Refused(f"{self.service} refuses this (HTTP {status}): {detail}")

    def _failed(self, error: Any) -> Exception:
        """An operation that was accepted and then failed there."""
        wrapped = re.fullmatch(r"Request failed: (.*) for self\.request_id=.*", error.message, re.DOTALL)
        said = " ".join((wrapped[1] if wrapped else error.message).split())
        if "is not finite" in said:  # recipes say which rows it came from
            return FloatingPointError(said.removeprefix("FloatingPointError: "))
        if error.category.value == "user":
            return Refused(f"{self.service} refuses this: {said}")
        return UsageError(f"{self.service} failed: {said}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _detail(body: object, otherwise: str) -> str:
    """{"detail": "..."} as servers of this protocol say it."""
    said = body.get("detail", body) if isinstance(body, dict) else body
    return " ".join(str(said or otherwise).split())


def _json(reply: httpx.Response) -> object:
    try:
        return reply.json()
    except ValueError:
        return None


class Watch:
    """Fails the futures that wait for a server once it has been silent for `patience` seconds."""

    def __init__(self, server: Server, patience: float = PATIENCE_SECONDS) -> None:
        self._server, self._patience = server, patience
        self._waiting: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._looking = False

    def add(self, future: Future[Any]) -> None:
        with self._lock:
            self._waiting.add(future)
            begin, self._looking = not self._looking, True
        if begin:
            threading.Thread(target=self._look, name="cook remote watch", daemon=True).start()
        future.add_done_callback(self._forgetting(future))

    def _forgetting(self, future: Future[Any]) -> Callable[[], None]:
        def forget() -> None:
            with self._lock:
                self._waiting.discard(future)

        return forget

    def _look(self) -> None:
        heard, silent = time.monotonic(), False
        while True:
            time.sleep(min(10.0, self._patience / 4))
            with self._lock:
                if not self._waiting:
                    self._looking = False
                    return
            was_silent, silent = silent, not self._server.answers()
            if not silent:
                heard = time.monotonic()
            if silent is not was_silent:
                state = "does not answer, waiting for it" if silent else "answers again"
                log.warning("%s %s", self._server.service, state)
            if time.monotonic() - heard > self._patience:
                self._give_up()

    def _give_up(self) -> None:
        with self._lock:
            waiting = list(self._waiting)
        for future in waiting:
            future.set_exception(UsageError(f"{self._server.service} has not answered for {self._patience:.0f} seconds"))
