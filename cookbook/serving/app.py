"""The FastAPI application: routers, errors, limits; and its life from the first request to the last checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cookbook.serving import looking, openai_api, tinker_api, tinker_rest, tinker_sampling, tinker_sessions
from cookbook.serving.door import BodyLimit
from cookbook.serving.meter import RequestTimes
from cookbook.serving.openai_generate import CLIENT_LEFT
from cookbook.serving.openai_models import Models
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Server


def create_app(server: Server, tell_ready: Callable[[], None] = lambda: None) -> FastAPI:
    """The application around an open Server, which it closes at its end; `tell_ready` is called when it starts."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        tell_ready()
        chores = asyncio.create_task(server.housekeeping())
        try:
            yield
        finally:
            chores.cancel()
            app.state.openai.recent.clear()
            await server.close()

    app = FastAPI(title="cook serve", lifespan=life, docs_url=None, redoc_url=None)
    app.state.server, app.state.openai = server, Models(server)
    for module in (tinker_api, tinker_sampling, tinker_rest, tinker_sessions, openai_api, looking):
        app.include_router(module.router)
    app.add_middleware(BodyLimit, limits=server.limits)
    app.add_middleware(RequestTimes, meter=server.meter)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(OSError, _disk)
    app.add_exception_handler(sqlite3.OperationalError, _disk)
    return app


def _reply(request: Request, status: int, detail: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error as the protocol that was spoken writes it."""
    if request.url.path.startswith(f"{openai_api.router.prefix}/"):
        return JSONResponse(openai_api.error_json(status, detail, param, code), status)
    return JSONResponse({"detail": detail}, status)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return _reply(request, error.status, error.detail, error.param, error.code)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """One line per field, without what was sent."""
    assert isinstance(error, RequestValidationError)
    lines = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()]
    detail = "; ".join(lines)[:2000]
    if not request.url.path.startswith(f"{openai_api.router.prefix}/"):
        return _reply(request, 422, detail)
    where = error.errors()[0]["loc"]
    return _reply(request, 400, detail, where[1] if len(where) > 1 and isinstance(where[1], str) else None)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    reply = _reply(request, error.status_code, str(error.detail))
    reply.headers.update(error.headers or {})
    return reply


async def _left(request: Request, error: Exception) -> Response:
    """Gone before its body was whole: nobody reads this."""
    return Response(status_code=CLIENT_LEFT)


async def _disk(request: Request, error: Exception) -> JSONResponse:
    return _reply(request, 507, f"the server's store cannot be written: {error}")
