"""Tinker's REST calls about sessions and keys: list and search sessions, their projects and traces; the key that one has."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from cookbook.serving import keys
from cookbook.serving.door import Owner, Serving, StrictRoute, given_key
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Server
from cookbook.serving.tinker_rest import LINK_SECONDS, Limit, Offset, check_link, signature_of, time_text

router = APIRouter(prefix="/api/v1", route_class=StrictRoute)
FINISHED = ("success", "errored", "interrupted")  # what a client says at its end


@router.get("/sessions")
async def sessions(server: Serving, owner: Owner, limit: Limit = 20, offset: Offset = 0) -> dict:
    rows = server.store.rows(
        "SELECT id FROM sessions WHERE owner = ? ORDER BY created DESC LIMIT ? OFFSET ?", owner, limit, offset
    )
    return {"sessions": [row["id"] for row in rows]}


@router.get("/sessions/{session_id}")
async def session(session_id: str, server: Serving, owner: Owner) -> dict:
    row = _own_session(server, session_id, owner)
    runs = server.store.rows("SELECT id FROM runs WHERE session = ? ORDER BY created", session_id)
    samplers = server.store.rows("SELECT id FROM samplers WHERE session = ? ORDER BY created", session_id)
    return {
        "training_run_ids": [one["id"] for one in runs], "sampler_ids": [one["id"] for one in samplers],
        "user_metadata": json.loads(row["metadata"])["user_metadata"], "display_name": row["display_name"],
    }  # fmt: skip


def _own_session(server: Server, session_id: str, owner: str) -> sqlite3.Row:
    """One that is over, too."""
    row = server.store.row("SELECT * FROM sessions WHERE id = ? AND owner = ?", session_id, owner)
    if row is None:
        raise Refusal(404, f"no session {session_id}")
    return row


# ---- projects, which are labels


class Project(BaseModel):
    project_id: str = Field(min_length=1, max_length=200)


@router.put("/sessions/{session_id}/project")
async def set_project(session_id: str, body: Project, server: Serving, owner: Owner) -> dict:
    """The session's training runs and samplers go with it."""
    _own_session(server, session_id, owner)
    update = "UPDATE sessions SET metadata = json_set(metadata, '$.project_id', ?) WHERE id = ?"
    server.store.run_sql(update, body.project_id, session_id)
    return {}


# ---- search


class Status(BaseModel):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = Field(default=None, min_length=1)


class Whose(BaseModel):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = []


class Place(BaseModel):
    last_created_at: datetime
    last_session_id: str


class Search(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a filter that is not known would find too much

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = Field(default=None, min_length=1)
    owner: Whose = Whose()
    statuses: list[Status] | None = Field(default=None, min_length=1)
    limit: int = Field(default=50, ge=1, le=200)
    cursor: Place | None = None


@router.post("/sessions/search")
async def search(body: Search, server: Serving, owner: Owner) -> dict:
    """Newest first. Sessions of other owners are never found, whoever is asked for."""
    found = [*islice(_found(body, server, owner), body.limit + 1)]
    page = [_summary(server, row) for row in found[: body.limit]]
    last = page[-1] if len(found) > body.limit else None
    cursor = {"last_created_at": last["created_at"], "last_session_id": last["session_id"]} if last else None
    return {"sessions": page, "next_cursor": cursor}


def _found(body: Search, server: Server, owner: str) -> Iterator[sqlite3.Row]:
    if body.owner.type == "user" and owner not in body.owner.owner_urns:
        return
    where, values = "owner = ?", [owner]
    if body.cursor is not None:
        last = _own_session(server, body.cursor.last_session_id, owner)
        where, values = f"{where} AND (created, id) < (?, ?)", [owner, last["created"], last["id"]]
    for row in server.store.rows(f"SELECT * FROM sessions WHERE {where} ORDER BY created DESC, id DESC", *values):
        if _matches(body, row):
            yield row


def _matches(body: Search, row: sqlite3.Row) -> bool:
    about = json.loads(row["metadata"])
    if body.session_id is not None or body.display_name is not None:  # either of them will do
        name = (row["display_name"] or "").lower()
        named = body.display_name is not None and all(word in name for word in body.display_name.lower().split())
        if not (named or row["id"] == body.session_id):
            return False
    if body.project_ids is not None and about["project_id"] not in body.project_ids:
        return False
    if not body.user_metadata.items() <= about["user_metadata"].items():
        return False
    return body.statuses is None or any(_has_status(row["finished"], one) for one in body.statuses)


def _has_status(finished: str | None, wanted: Status) -> bool:
    if wanted.type == "active":
        return finished is None
    return wanted.type == "client_finished" and finished in (wanted.reasons or FINISHED)


def _summary(server: Server, row: sqlite3.Row) -> dict[str, Any]:
    count = "SELECT count(*) AS n, coalesce(sum(size), 0) AS size FROM checkpoints WHERE run IN"
    total = server.store.rows(f"{count} (SELECT id FROM runs WHERE session = ?)", row["id"])[0]
    finished, status = row["finished"], None
    if finished is None:
        status = {"type": "active"}
    elif finished in FINISHED:
        status = {"type": "client_finished", "reason": {"type": finished}}
    about = json.loads(row["metadata"])
    return {
        "session_id": row["id"], "created_at": time_text(row["created"]), "owner": row["owner"],
        "project_id": about["project_id"] or "", "status": status, "display_name": row["display_name"],
        "user_metadata": about["user_metadata"], "checkpoints_count": total["n"], "checkpoint_storage_bytes": total["size"],
    }  # fmt: skip


# ---- traces


@router.get("/sessions/{session_id}/trace_export")
async def trace_export(session_id: str, request: Request, server: Serving, owner: Owner) -> dict:
    """A link that needs no key to what the engine did for a session."""
    _own_session(server, session_id, owner)
    if not server.traces.has(session_id):
        return {"status": "failed", "error": f"no operation of session {session_id} has ended, or it was too long ago"}
    expires = int(time.time() + LINK_SECONDS)
    signature = signature_of(server, "trace", session_id, expires)
    base = str(request.base_url).rstrip("/")
    return {"status": "ready", "url": f"{base}/api/v1/trace/{session_id}?expires={expires}&signature={signature}"}


@router.get("/trace/{session_id}")
def trace(session_id: str, expires: int, signature: str, server: Serving) -> Response:
    """In a thread: it may be long."""
    check_link(signature_of(server, "trace", session_id, expires), signature, expires)
    body = server.traces.chrome(session_id)
    if not body:
        raise Refusal(404, f"the trace of session {session_id} is no longer kept")
    return Response(body, media_type="application/json")


# ---- the key that one has


@router.get("/auth/apikey/me")
async def own_key(request: Request, server: Serving, owner: Owner) -> dict:
    """For `tinker auth login`; without keys there is nobody but the one owner."""
    key_id = keys.id_of(given_key(request)) if server.needs_key else "0"
    return {
        "key_id": int(key_id, 16), "name": key_id if server.needs_key else owner, "note": "",
        "details": {"org_details": {"name": "cook serve"}, "user_details": {"email": owner}},
    }  # fmt: skip


@router.delete("/auth/apikey/me")
async def revoke_own_key(request: Request, server: Serving, owner: Owner) -> dict:
    if server.needs_key:
        keys.revoke(server.store, keys.id_of(given_key(request)))
    return {}
