"""What every request passes: whose key it carries, how large it may be."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Annotated

import zstandard
from fastapi import Depends, HTTPException, Request

from cookbook.serving import keys
from cookbook.serving.futures import digest_of
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Server


def _server(request: Request) -> Server:
    return request.app.state.server


def _owner(request: Request) -> str:
    """From X-API-Key (Tinker) or Authorization: Bearer (OpenAI). Without any keys in the store everybody is the same owner."""
    return _known(request, request.headers.get("x-api-key") or _bearer(request))


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
    return request.headers.get("authorization", "").removeprefix("Bearer ").strip()


def _password(request: Request) -> str:
    scheme, _, packed = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(packed, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


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
    try:  # read no further than the limit, whatever size the frame announces
        unpacked = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(body)).read(limit + 1)
    except zstandard.ZstdError as error:
        raise Refusal(400, f"the body is no zstd frame: {error}") from error
    if len(unpacked) > limit:
        raise Refusal(413, f"the unpacked body has more than {limit:,} bytes (limits.body_mb)")
    return unpacked


async def body_digest(request: Request) -> str:
    """To tell a repetition from another operation under the same number."""
    return digest_of(await request.body())


class BodyLimit:
    """ASGI middleware: 413 as soon as a body is too long, read no further."""

    def __init__(self, app, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def limited() -> dict:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise Refusal(413, f"the body has more than {self.limit:,} bytes (limits.body_mb)")
            return message

        await self.app(scope, limited, send)
