"""What people and their monitors look at: whether the server is up, its figures for Prometheus, and a page to read."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from cookbook.serving.door import Serving, Viewer
from cookbook.serving.index_page import index_page
from cookbook.serving.metrics import exposition

router = APIRouter()
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NOTHING_BUT_STYLE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"


@router.get("/healthz")
async def healthz(server: Serving) -> Response:
    """For load balancers, without a key: 503 once the thread of a base model's engine has ended."""
    alive = all(client.engine.alive for client in server.base.values())
    return JSONResponse({"status": "ok"}) if alive else JSONResponse({"status": "the engine has stopped"}, 503)


@router.get("/metrics")
async def metrics(server: Serving, viewer: Viewer) -> Response:
    return Response(exposition(server, viewer), media_type=CONTENT_TYPE)


@router.get("/")
async def index(request: Request, server: Serving, viewer: Viewer) -> Response:
    headers = {"Content-Security-Policy": NOTHING_BUT_STYLE, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(index_page(server, viewer, str(request.base_url).rstrip("/")), headers=headers)
