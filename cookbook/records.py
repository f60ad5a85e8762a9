"""Files that survive `kill -9`: rows are appended whole, rewrites are renamed into place, a torn line is no row."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cookbook.errors import UsageError

Row = dict[str, Any]  # one JSON object
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # JSON has no such numbers; `float()` reads these strings back


def encode(row: Mapping[str, object]) -> str:
    """One line of strict JSON."""
    return json.dumps(strict(row), ensure_ascii=False, allow_nan=False)


def strict(value: object) -> object:
    """The same value in plain JSON types; NaN and the infinities become the strings of NOT_FINITE."""
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars too; anything else is the caller's bug
    if math.isfinite(number):
        return number
    return NOT_FINITE[0] if math.isnan(number) else NOT_FINITE[1 if number > 0 else 2]


def append(path: Path, text: str, *, sync: bool = False) -> None:
    """Append `text` in one write. OSError (a full disk, say) leaves the file as it was."""
    data = text.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, data) != len(data):
            os.ftruncate(descriptor, before)  # half a row would swallow the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_row(path: Path, row: Mapping[str, object], *, sync: bool = False) -> None:
    append(path, encode(row) + "\n", sync=sync)


def sync(path: Path) -> None:
    """Make what was appended so far outlive the machine, not only the process."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def replace(path: Path, text: str) -> None:
    """Write the whole file aside and rename: readers see the old text or the new one, never half of either."""
    aside = path.with_name(
        f".{path.name}.aside"
    )  # one name, so that kills leave one stray at most; Lock keeps others out
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def amend(path: Path, **values: object) -> None:
    """Set keys of a file that holds one JSON object."""
    replace(path, json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}, indent=1) + "\n")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_full(error: BaseException | None) -> bool:
    """Also from libraries that keep only the text of the system's error (safetensors)."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error)


def read_rows(path: Path) -> list[Row]:
    """All complete rows; a torn last line is left out. UsageError names a broken line elsewhere."""
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UsageError(f"{path}:{number} is not a JSON object ({line[:40]!r}): repair or delete that line")
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    replace(path, "".join(encode(row) + "\n" for row in rows))


def keep_rows(path: Path, keep: Callable[[Row], bool]) -> list[Row]:
    """Cut `path` to whole lines and to the rows that `keep` accepts; returns them. Untouched if nothing changes."""
    kept = [row for row in read_rows(path) if keep(row)]
    data = path.read_bytes() if path.exists() else b""
    if data.count(b"\n") != len(kept) or (data and not data.endswith(b"\n")):
        write_rows(path, kept)
    return kept


class Lock:
    """One process per run directory. The system frees it with the process, however that ends."""

    def __init__(self, directory: Path) -> None:
        self._descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        for last in (False, True):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._sign()
                return
            except BlockingIOError:
                if last:
                    holder = os.pread(self._descriptor, 20, 0).decode() or "unknown"
                    os.close(self._descriptor)
                    raise UsageError(
                        f"{directory} is in use by another process (pid {holder}): wait for it or stop it first"
                    ) from None
                time.sleep(0.05)  # `is_locked` may have held it for an instant
            except OSError:
                return  # a file system without locks: two processes on one run are then the user's care

    def _sign(self) -> None:
        """Who holds it; a full disk is no reason not to hold it."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.close(self._descriptor)


def is_locked(directory: Path) -> bool:
    """Whether a process holds the run. False on a file system without locks."""
    try:
        descriptor = os.open(directory / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
