"""The FastAPI application: routers, errors, limits; and its life from loading the models to the last checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cookbook.serving import tinker_api, tinker_rest, tinker_sampling
from cookbook.serving.door import BodyLimit
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Server


def create_app(server: Server, tell_ready: Callable[[], None] = lambda: None) -> FastAPI:
    """The application around an unopened Server; its models load when it starts, then `tell_ready` is called."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await server.open()
        tell_ready()
        chores = asyncio.create_task(server.housekeeping())
        try:
            yield
        finally:
            chores.cancel()
            await server.close()

    app = FastAPI(title="cook serve", lifespan=life, docs_url=None, redoc_url=None)
    app.state.server = server
    for router in (tinker_api.router, tinker_sampling.router, tinker_rest.router):
        app.include_router(router)
    app.add_middleware(BodyLimit, limit=server.limits.body_mb << 20)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(OSError, _disk)
    app.add_exception_handler(sqlite3.OperationalError, _disk)
    return app


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return JSONResponse({"detail": error.detail}, error.status)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """One line per field, without what was sent."""
    assert isinstance(error, RequestValidationError)
    lines = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()]
    return JSONResponse({"detail": "; ".join(lines)[:2000]}, 422)


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)


async def _disk(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": f"the server's store cannot be written: {error}"}, 507)
