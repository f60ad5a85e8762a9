"""The adapter of a checkpoint that lies on a server, brought into its run's directory: for chat, eval, export, init_from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook.errors import UsageError

if TYPE_CHECKING:
    from cookbook.remote import RemoteService

FILES = ("adapter_config.json", "adapter_model.safetensors")
EXPORT_SECONDS = 3600  # the server drops what a download that was cut off left behind


def place_of(run_dir: Path, uri: str) -> Path:
    """RUN/checkpoints/<training run>/weights/<name>, where a checkpoint of a run in process lies."""
    if not re.fullmatch(r"tinker://[^/\\.][^/\\]*/weights/[^/\\.][^/\\]*", uri):
        raise UsageError(f"{uri} in checkpoints.jsonl of {run_dir} is no tinker://<training run>/weights/<name>")
    return run_dir / "checkpoints" / uri.removeprefix("tinker://")


def local_adapter(run_dir: Path, service: object, uri: str) -> Path:
    """The directory with the adapter; fetched from the server that the run was trained on if it is not here yet."""
    return fetched(run_dir, service, uri, place_of(run_dir, uri))


def fetched(run_dir: Path, service: object, uri: str, place: Path) -> Path:
    """`place`, with the adapter of that checkpoint in it."""
    if (place / FILES[0]).is_file():
        return place
    if not isinstance(service, str) or service == "local":
        raise UsageError(f"checkpoint {uri} of {run_dir} lies on a server that its config.yaml does not name (service)")
    try:
        fetch(service, uri, place)
    except UsageError as error:
        raise UsageError(f"checkpoint {uri} lies on a server, and cannot be fetched: {error}") from error
    return place


def fetch(service: str, uri: str, place: Path) -> None:
    """Loaded there as a training client, exported, downloaded; the export goes again."""
    from cookbook.config import EngineConfig
    from cookbook.service import connect_remote
    from core.checkpoints import write_atomically

    remote = connect_remote(service, EngineConfig())
    try:
        trainer = remote.create_training_client_from_state(uri).result()
        exported = trainer.save_weights_external("cook-download", EXPORT_SECONDS).result().path
        write_atomically(place, lambda aside: _download(remote, exported, aside))
        remote.delete_checkpoint(exported)
    finally:
        remote.close()


def _download(remote: RemoteService, exported: str, directory: Path) -> None:
    import httpx

    urls = remote.download_urls(exported)
    for name in FILES:
        try:
            with (
                httpx.stream("GET", urls[name], timeout=60, follow_redirects=True) as reply,
                (directory / name).open("wb") as file,
            ):
                reply.raise_for_status()
                for part in reply.iter_bytes():
                    file.write(part)
        except (KeyError, httpx.HTTPError) as error:
            raise UsageError(f"{name} of {exported}: {' '.join(str(error).split())}") from error
