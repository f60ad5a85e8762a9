"""The folder that a program of somebody else's works in: measured and removed to its bottom, however deep that is."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def own_folder() -> Iterator[str]:
    """An empty folder; whatever is in it at the end is removed."""
    folder = tempfile.mkdtemp(prefix="cook-")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _flatten(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _flatten(folder: str) -> None:
    """Empties all folders below: each comes to the top before it is looked into, so that no depth makes a path too long."""
    while below := [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]:
        for path in below:
            os.chmod(path, 0o700)
            for entry in list(os.scandir(path)):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)
                    os.rename(entry.path, tempfile.mkdtemp(dir=folder))
                else:
                    os.unlink(entry.path)
            os.rmdir(path)


def holds_more(folder: str, num_bytes: int, num_files: int) -> bool:
    """Than so many bytes or files and folders, or what cannot be measured: a folder not to be listed, a path too long."""
    count, waiting = 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    count += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    num_bytes -= _size(entry)
                    if num_bytes < 0 or count > num_files:
                        return True
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
