"""`cook push`: an export with its model card to the Hugging Face hub. Nothing leaves before a yes."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook.errors import UsageError
from cookbook.exporting.card import card
from cookbook.exporting.export import AS_IT_IS, Format, export

if TYPE_CHECKING:
    from rich.console import Console

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def push(
    target: str, repository: str, form: Format, console: Console, checkpoint: str = "newest", *,
    public: bool = False, yes: bool = False, dry_run: bool = False, verify: bool = True,
) -> None:  # fmt: skip
    """Export aside, show card and files, ask, upload. UsageError without a token, before any work is done."""
    if not REPOSITORY.fullmatch(repository):
        raise UsageError(f"{repository}: expected ORGANISATION/NAME, as in my-name/my-model")
    token = None if dry_run else _token()
    with tempfile.TemporaryDirectory(prefix="cook-push-") as aside:
        done = export(target, Path(aside) / "export", form, console, checkpoint, verify=verify)
        text = card(done.subject, form, repository)
        (done.folder / "README.md").write_text(text, encoding="utf-8")
        console.rule("README.md")
        console.print(text, **AS_IT_IS)
        console.rule()
        total = sum(path.stat().st_size for path in done.folder.iterdir())
        seen = "public" if public else "private"
        where = f"{_endpoint()}/{repository} ({seen})"
        console.print(f"{len(done.files)} files, {total / 1e6:,.1f} MB, to {where}", **AS_IT_IS)
        if dry_run:
            console.print("nothing was sent (--dry-run)")
            return
        if not yes and not _agreed(console):
            console.print("nothing was sent")
            return
        console.print(
            f"sent: {_upload(done.folder, repository, str(token), private=not public)}", highlight=False, soft_wrap=True
        )


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _token() -> str:
    from huggingface_hub import get_token

    if token := get_token():
        return token
    raise UsageError("no token of the Hugging Face hub on this machine: `hf auth login`, or set HF_TOKEN; --dry-run needs none")


def _agreed(console: Console) -> bool:
    """Whether a person typed yes; nobody at the keyboard is a no."""
    try:
        return console.input("send? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _upload(folder: Path, repository: str, token: str, private: bool) -> str:
    """The address of what was made. An existing repository keeps being as public as it is."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by cook push"))
    except (HfHubHTTPError, httpx.HTTPError) as error:
        raise UsageError(f"the hub did not take {repository}: {' '.join(str(error).split())[:300]}") from error
