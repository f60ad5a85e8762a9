"""Tinker's REST calls: what runs and checkpoints there are; publish, expire, delete, copy and download them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import shutil
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel

from cookbook.serving.door import Owner, Serving, StrictRoute
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Server
from cookbook.serving.store import Checkpoint, checked_name
from cookbook.serving.tinker_api import checked_ttl
from core.checkpoints import KINDS, write_atomically

router = APIRouter(prefix="/api/v1", route_class=StrictRoute)
LINK_SECONDS = 3600.0  # how long a download link works
EXPORTED = ("adapter_config.json", "adapter_model.safetensors")
_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
Limit = Annotated[int, Query(ge=0, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**53)]


class WeightsPath(BaseModel):
    tinker_path: str


class Ttl(BaseModel):
    ttl_seconds: int | None


class Copy(BaseModel):
    source_path: str
    destination_project_id: str | None = None
    ttl_seconds: int | None = None


@router.get("/get_server_capabilities")
async def capabilities(server: Serving, owner: Owner) -> dict:
    models = [
        {"model_name": name, "max_context_length": client.engine.decoder.max_length, "trainable": True, "sampleable": True}
        for name, client in server.base.items()
    ]
    return {"supported_models": models}


@router.get("/healthz")
async def healthz() -> dict:
    return {"status": "ok"}


# ---- runs


@router.get("/training_runs")
async def training_runs(
    server: Serving, owner: Owner, limit: Limit = 20, offset: Offset = 0, project_id: str | None = None
) -> dict:
    where, values = "owner = ?", [owner]
    if project_id is not None:  # that of their session, or the one into which they were copied
        where += (
            " AND (session IN (SELECT id FROM sessions WHERE json_extract(metadata, '$.project_id') = ?)"
            " OR id IN (SELECT run FROM copies WHERE project = ?))"
        )
        values += [project_id, project_id]
    rows = server.store.rows(f"SELECT * FROM runs WHERE {where} ORDER BY seen DESC LIMIT ? OFFSET ?", *values, limit, offset)
    total = server.store.rows(f"SELECT count(*) AS n FROM runs WHERE {where}", *values)[0]["n"]
    runs = [_run(server, row) for row in rows]
    return {"training_runs": runs, "cursor": {"offset": offset, "limit": limit, "total_count": total}}


@router.get("/training_runs/{run}")
async def training_run(run: str, server: Serving, owner: Owner) -> dict:
    return _run(server, _own_run(server, run, owner))


@router.get("/training_runs/{run}/checkpoints")
async def run_checkpoints(run: str, server: Serving, owner: Owner) -> dict:
    _own_run(server, run, owner)
    return {"checkpoints": [_checkpoint(one) for one in server.store.checkpoints("run = ?", run)]}


def _own_run(server: Server, run: str, owner: str) -> sqlite3.Row:
    row = server.store.row("SELECT * FROM runs WHERE id = ? AND owner = ?", run, owner)
    if row is None:
        raise Refusal(404, f"no training run {run}")
    return row


def _run(server: Server, row: sqlite3.Row) -> dict:
    checkpoints = server.store.checkpoints("run = ?", row["id"])
    newest = {kind: next((one for one in checkpoints if one.kind == kind), None) for kind in KINDS}
    state, sampler = newest["weights"], newest["sampler_weights"]
    return {
        "training_run_id": row["id"], "base_model": row["base_model"], "model_owner": row["owner"], "is_lora": True,
        "lora_rank": json.loads(row["lora"])["rank"], "last_request_time": time_text(row["seen"]), "corrupted": False,
        "last_checkpoint": _checkpoint(state) if state else None,
        "last_sampler_checkpoint": _checkpoint(sampler) if sampler else None,
        "user_metadata": json.loads(row["metadata"]) if row["metadata"] else None,
    }  # fmt: skip


# ---- checkpoints


@router.get("/checkpoints")
async def checkpoints(server: Serving, owner: Owner, limit: Limit = 100, offset: Offset = 0) -> dict:
    found = server.store.checkpoints("owner = ?", owner)
    cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
    return {"checkpoints": [_checkpoint(one) for one in found[offset : offset + limit]], "cursor": cursor}


def _checkpoint(one: Checkpoint) -> dict:
    return {
        "checkpoint_id": f"{one.kind}/{one.name}", "checkpoint_type": _TYPES[one.kind], "time": time_text(one.created),
        "tinker_path": one.uri, "size_bytes": one.size, "public": one.public, "user_metadata": one.metadata,
        "expires_at": time_text(one.expires) if one.expires is not None else None,
    }  # fmt: skip


@router.delete("/training_runs/{run}/checkpoints/{kind}/{name}")
async def delete(run: str, kind: str, name: str, server: Serving, owner: Owner) -> dict:
    found = server.store.own_checkpoint(run, kind, name, owner)
    server.store.delete_checkpoint(found.run, found.kind, found.name)
    return {}


@router.post("/training_runs/{run}/checkpoints/{kind}/{name}/publish")
async def publish(run: str, kind: str, name: str, server: Serving, owner: Owner) -> dict:
    """Any key of this server may then load it and sample from it."""
    return _set_public(server, server.store.own_checkpoint(run, kind, name, owner), True)


@router.delete("/training_runs/{run}/checkpoints/{kind}/{name}/publish")
async def unpublish(run: str, kind: str, name: str, server: Serving, owner: Owner) -> dict:
    return _set_public(server, server.store.own_checkpoint(run, kind, name, owner), False)


def _set_public(server: Server, one: Checkpoint, public: bool) -> dict:
    if one.public is public:
        raise Refusal(409, f"{one.uri} is {'public' if public else 'private'} already")
    _update(server, one, "public", int(public))
    return {}


@router.put("/training_runs/{run}/checkpoints/{kind}/{name}/ttl")
async def set_ttl(run: str, kind: str, name: str, body: Ttl, server: Serving, owner: Owner) -> dict:
    ttl = checked_ttl(body.ttl_seconds)
    found = server.store.own_checkpoint(run, kind, name, owner)
    _update(server, found, "expires", None if ttl is None else time.time() + ttl)
    return {}


def _update(server: Server, one: Checkpoint, column: str, value: float | None) -> None:
    where = "WHERE run = ? AND kind = ? AND name = ?"
    server.store.run_sql(f"UPDATE checkpoints SET {column} = ? {where}", value, one.run, one.kind, one.name)


@router.post("/weights_info")
async def weights_info(body: WeightsPath, server: Serving, owner: Owner) -> dict:
    found = server.store.checkpoint(body.tinker_path, owner)
    lora = server.lora_of(found)
    targets = {key: lora[key] for key in ("train_unembed", "train_mlp", "train_attn")}
    return {"base_model": server.base_model_of(found), "is_lora": True, "lora_rank": lora["rank"], **targets}


@router.post("/copy_weights")
async def copy_weights(body: Copy, request: Request, server: Serving, owner: Owner) -> dict:
    """Into the caller's own store, as a run that is never trained: to keep what another owner has published.

    A retry, by its idempotency key, gets the same copy. The run is in the index before its files are there, so that
    `recover` finds them.
    """
    ttl, source = checked_ttl(body.ttl_seconds), server.store.checkpoint(body.source_path, owner)
    key = request.headers.get("x-idempotency-key") or f"{time.time()}"
    run = "copy-" + hashlib.sha256(f"{owner}\n{key}\n{source.uri}".encode()).hexdigest()[:16]
    async with server.copying:
        if server.store.find(run, source.kind, source.name) is None:
            now, base_model = time.time(), server.base_model_of(source)
            server.store.run_sql(
                "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, NULL, ?, ?)",
                run, "", owner, base_model, json.dumps(server.lora_of(source)), now, now,
            )  # fmt: skip
            server.store.run_sql("INSERT OR IGNORE INTO copies VALUES (?, ?)", run, body.destination_project_id or "")
            await asyncio.to_thread(_copy_files, server, source, run)
            server.store.add_checkpoint(run, source.kind, source.name, owner, ttl, source.metadata)
    return {"tinker_path": f"tinker://{run}/{source.kind}/{source.name}"}


def _copy_files(server: Server, source: Checkpoint, run: str) -> None:
    """Refusal 404 where the source is deleted meanwhile."""
    origin = server.store.directory_of(source.run, source.kind, source.name)
    target = server.store.directory_of(run, source.kind, source.name)
    try:
        write_atomically(target, lambda aside: _copy_tree(origin, aside))
    except OSError as error:
        if not origin.exists():
            raise Refusal(404, f"no checkpoint {source.uri}") from error
        raise


def _copy_tree(origin: Path, aside: Path) -> None:
    shutil.copytree(origin, aside, dirs_exist_ok=True)


# ---- downloads


@router.get("/training_runs/{run}/checkpoints/external_weights/{name}/external_weights_urls")
async def download_urls(run: str, name: str, request: Request, server: Serving, owner: Owner) -> dict:
    """Links that need no key, for as long as they are signed for."""
    found = server.store.own_checkpoint(run, "external_weights", name, owner)
    expires = int(time.time() + LINK_SECONDS)
    urls = {}
    for file in EXPORTED:
        signature = signature_of(server, found.run, found.name, file, expires)
        base = str(request.base_url).rstrip("/")
        place = "/".join(quote(part, safe="") for part in (found.run, found.name, file))
        urls[file] = f"{base}/api/v1/download/{place}?expires={expires}&signature={signature}"
    return {"urls": urls, "expires": time_text(expires)}


@router.get("/download/{run}/{name}/{file}")
async def download(run: str, name: str, file: str, expires: int, signature: str, server: Serving) -> FileResponse:
    check_link(signature_of(server, run, name, file, expires), signature, expires)
    path = server.store.directory_of(checked_name(run), "external_weights", checked_name(name)) / checked_name(file)
    if file not in EXPORTED or not path.is_file():
        raise Refusal(404, f"no file {file} of that export")
    return FileResponse(path)


def check_link(expected: str, given: str, expires: int) -> None:
    if not hmac.compare_digest(expected, given.encode("ascii", "replace").decode()) or expires < time.time():
        raise Refusal(403, "this link is not valid, or not any more: ask for a new one")


def signature_of(server: Server, *parts: str | int) -> str:
    """Of a link: whoever has it needs no key."""
    text = "\n".join(map(str, parts))
    return hmac.new(server.store.secret(), text.encode(), hashlib.sha256).hexdigest()


def time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
