"""A real server over a tiny model, in a thread of its own, for real clients."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from cookbook.serving.app import create_app
from cookbook.serving.cli import _listen as listen
from cookbook.serving.server import Server
from cookbook.serving.settings import Limits
from cookbook.serving.store import Store
from tests.tiny import service_at, tiny_model_dir

MODEL = str(tiny_model_dir())


@contextlib.contextmanager
def serving(
    store: Path, models: Sequence[str] = (MODEL,), port: int = 0, **limits: int | float
) -> Iterator[tuple[str, Server]]:
    """Its URL and its state; it is shut down at the end as by SIGTERM."""
    server = Server(service_at(store), [*models], Store(store), Limits(**limits))  # type: ignore[arg-type]
    server.open()
    listening = listen("127.0.0.1", port)
    config = uvicorn.Config(create_app(server), log_level="warning", timeout_graceful_shutdown=2)
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, args=([listening],), daemon=True)
    thread.start()
    while not web.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        web.should_exit = True
        thread.join(20)
        server.store.close()
        assert not thread.is_alive()
