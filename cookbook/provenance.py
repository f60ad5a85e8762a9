"""What code a run was made with: versions, git revision, uncommitted difference. Read without importing any of it."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata

PACKAGES = ("cook-post-training", "torch", "transformers", "datasets", "safetensors", "hydra-core", "wandb")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_state() -> tuple[dict[str, str | bool] | None, str]:
    """({"revision", "dirty"}, diff to it) of the repository around the working directory; (None, "") outside of one."""
    revision = _git("rev-parse", "HEAD")
    if not revision:
        return None, ""
    diff = _git("diff", "HEAD") or ""
    return {"revision": revision.strip(), "dirty": bool(_git("status", "--porcelain"))}, diff


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
