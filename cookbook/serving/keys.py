"""API keys: `tml-<id>-<secret>`, of which the store holds a hash. The owner named at creation owns what is made with it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

from cookbook.errors import UsageError
from cookbook.serving.store import Store

PREFIX = "tml-"  # the SDK refuses keys without it
ANYONE = "local"  # the owner of everything while there are no keys (loopback only)


def create(store: Store, owner: str) -> str:
    """A new key, shown once."""
    if not owner or owner == ANYONE or not owner.isprintable():
        raise UsageError(f"owner {owner!r}: expected a printable name other than '{ANYONE}'")
    key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    key = f"{PREFIX}{key_id}-{secret}"
    store.run_sql("INSERT INTO keys VALUES (?, ?, ?, ?, NULL)", key_id, owner, _digest(key), time.time())
    return key


def revoke(store: Store, key_id: str) -> None:
    """At once, for a running server too."""
    if not store.run_sql("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", time.time(), key_id):
        known = [row["id"] for row in store.rows("SELECT id FROM keys WHERE revoked IS NULL")]
        raise UsageError(f"no valid key with id '{key_id}', there are: {', '.join(known) or 'none'}")


def any_valid(store: Store) -> bool:
    return bool(store.rows("SELECT 1 FROM keys WHERE revoked IS NULL LIMIT 1"))


def any_made(store: Store) -> bool:
    """Once there has been a key, the store is not open to anyone again."""
    return bool(store.rows("SELECT 1 FROM keys LIMIT 1"))


def owner_of(store: Store, key: str) -> str | None:
    """The owner of a valid key, compared in constant time."""
    key_id = id_of(key)
    row = store.row("SELECT owner, digest FROM keys WHERE id = ? AND revoked IS NULL", key_id)
    expected = row["digest"] if row else bytes(32)
    return row["owner"] if hmac.compare_digest(_digest(key), expected) and row else None


def id_of(key: str) -> str:
    """What `cook serve keys list` calls it by."""
    return key.removeprefix(PREFIX).split("-", 1)[0]


def _digest(key: str) -> bytes:
    """The secret has 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(key.encode()).digest()
