"""What every request passes: whose key it carries, how large it may be, how its JSON is read."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import zstandard
from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from cookbook.serving import keys
from cookbook.serving.futures import digest_of
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Server
from cookbook.serving.settings import Limits


def _server(request: Request) -> Server:
    return request.app.state.server


def _owner(request: Request) -> str:
    """From X-API-Key (Tinker) or Authorization: Bearer (OpenAI). Without any keys in the store everybody is the same owner."""
    return _known(request, given_key(request))


def given_key(request: Request) -> str:
    return request.headers.get("x-api-key") or _bearer(request)


def _viewer(request: Request) -> str:
    """For pages that only show: HTTP Basic too, with the key as the password, since browsers know nothing else."""
    try:
        return _known(request, request.headers.get("x-api-key") or _password(request) or _bearer(request))
    except Refusal as refusal:
        ask = {"WWW-Authenticate": 'Basic realm="cook serve: any name, an API key as password", charset="UTF-8"'}
        raise HTTPException(refusal.status, refusal.detail, ask) from refusal


def _known(request: Request, given: str) -> str:
    server = _server(request)
    owner = (keys.owner_of(server.store, given) if given else None) if server.needs_key else keys.ANYONE
    if owner is None:
        raise Refusal(401, "no valid API key: give one made by `cook serve keys create NAME`")
    request.state.owner = owner
    return owner


def _bearer(request: Request) -> str:
    return _authorization(request, "bearer").strip()


def _authorization(request: Request, scheme: str) -> str:
    """What follows the scheme, whose letters may be of either case; "" for another one."""
    given, _, rest = request.headers.get("authorization", "").partition(" ")
    return rest if given.lower() == scheme else ""


def _password(request: Request) -> str:
    try:
        return base64.b64decode(_authorization(request, "basic"), validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


MOST_WINDOW = 1 << 27  # bytes that unpacking may look back
LARGE = 1 << 20  # bytes over which others are served meanwhile
PIECE = 1024  # bytes of a frame at a time: they become 32 MB at most
Serving = Annotated[Server, Depends(_server)]
Owner = Annotated[str, Depends(_owner)]
Viewer = Annotated[str, Depends(_viewer)]


async def raw_body(request: Request, limit: int) -> bytes:
    """The body, unpacked if it is a zstd frame. Refusal 413 beyond `limit` bytes, packed or not."""
    body = await request.body()
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "identity":
        return body
    if encoding != "zstd":
        raise Refusal(415, f"content-encoding {encoding!r}, expected zstd or none")
    try:
        return await asyncio.to_thread(_unpacked, body, limit)
    except zstandard.ZstdError as error:
        raise Refusal(400, f"the body is not one whole zstd frame: {error}") from error


def _unpacked(body: bytes, limit: int) -> bytes:
    """The content of one zstd frame: all of it, or Refusal 413, or ZstdError for a part of a frame or more than one."""
    too_much = Refusal(413, f"the unpacked body has more than {limit:,} bytes (limits.body_mb)")
    announced = zstandard.frame_content_size(body)  # -1: it does not say
    if announced > limit:
        raise too_much
    if announced >= 0:
        return zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    frame, parts, size = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).decompressobj(), [], 0
    for start in range(0, len(body), PIECE):
        parts.append(frame.decompress(body[start : start + PIECE]))
        size += len(parts[-1])
        if size > limit:
            raise too_much
        if frame.eof and (frame.unused_data or start + PIECE < len(body)):
            raise zstandard.ZstdError("something follows it")
    if not frame.eof:
        raise zstandard.ZstdError("it is cut off")
    return b"".join(parts)


class StrictRequest(Request):
    async def json(self) -> Any:
        """The body; 400 if it is none. Python's own reader lets lone surrogates in, which no index or answer can hold."""
        try:
            return from_json(await self.body())
        except ValueError as error:  # an HTTPException: FastAPI would put a text of its own in place of any other
            raise HTTPException(400, f"the body is no JSON in UTF-8 without lone surrogates: {error}") from error


class StrictRoute(APIRoute):
    """For routers: every JSON body is read by StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        read_and_answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await read_and_answer(StrictRequest(request.scope, request.receive))

        return handle


async def body_digest(request: Request) -> str:
    """To tell a repetition from another operation under the same number."""
    body = await request.body()
    return digest_of(body) if len(body) < LARGE else await asyncio.to_thread(digest_of, body)


class BodyLimit:
    """ASGI middleware: 413 as soon as a body is too long, read no further.

    JSON is parsed in one go, and everybody waits for it: only what carries tensors (protobuf) may be large.
    """

    def __init__(self, app, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        tensors = scope["path"].endswith("/forward_backward")
        name = "body_mb" if tensors or self.limits.body_mb < self.limits.json_mb else "json_mb"
        limit = getattr(self.limits, name) << 20
        received = _announced(scope["headers"])
        if received <= limit:  # what is announced is believed only where it is too much
            received = 0

        async def limited() -> dict:
            nonlocal received
            message = await receive() if received <= limit else {}
            received += len(message.get("body", b""))
            if received > limit:  # an HTTPException: FastAPI would take any other for a body that it cannot read
                raise HTTPException(
                    413, f"the body has more than {limit:,} bytes (limits.{name})", {"Connection": "close"}
                )
            return message

        await self.app(scope, limited, send)


def _announced(headers: list[tuple[bytes, bytes]]) -> int:
    """Content-Length, 0 without one."""
    return next((int(value) for name, value in headers if name == b"content-length" and value.isdigit()), 0)
