"""Which chat template a model gets: its own, a built-in one, or a .jinja file; and the tokenizer it comes with."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook.config import ModelConfig
from cookbook.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of model `name`. Raises UsageError."""
    from transformers import AutoTokenizer

    from core.models import ModelNotFound, hub_answers, local_model

    try:
        source = local_model(name)
    except ModelNotFound as error:
        raise UsageError(str(error)) from error
    is_local = Path(source).is_dir()
    offline = not is_local and not hub_answers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline)
    except (OSError, ValueError) as error:
        if offline:
            raise UsageError(
                f"no network, and model '{name}' is not in the local cache: connect once to fetch it"
            ) from error
        why = "it cannot be loaded" if is_local else "no such id, or no access to it"
        raise UsageError(f"no tokenizer for model '{name}' ({why}): {str(error).strip().splitlines()[0]}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UsageError(f"model '{name}' has a {type(tokenizer).__name__}; a fast one (tokenizer.json) is needed")
    return tokenizer


def choose_template(tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> tuple[str, str | None]:
    """(name for people, Jinja source or None for the tokenizer's own). Raises UsageError."""
    chosen = model.chat_template
    if chosen is None:
        if tokenizer.chat_template:
            return f"of {model.name}", None
        chosen = "chatml" if not _missing(tokenizer, CHATML_TOKENS) else "plain"
    if (FOLDER / f"{chosen}.jinja").is_file():
        return f"'{chosen}' (built-in)", _built_in(tokenizer, chosen)
    path = Path(chosen).expanduser()
    if path.is_file():
        return str(path), path.read_text(encoding="utf-8")
    names = sorted(path.stem for path in FOLDER.glob("*.jinja"))
    close = difflib.get_close_matches(chosen, names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise UsageError(f"model.chat_template is '{chosen}', expected {', '.join(names)} or a .jinja file{hint}")


def _missing(tokenizer: PreTrainedTokenizerFast, needed: tuple[str, ...]) -> list[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return [token for token in needed if token not in added]


def _built_in(tokenizer: PreTrainedTokenizerFast, name: str) -> str:
    if name == "chatml" and (missing := _missing(tokenizer, CHATML_TOKENS)):
        raise UsageError(f"model.chat_template=chatml needs {' and '.join(missing)}, not in this tokenizer: take plain")
    if name == "plain" and tokenizer.eos_token is None:
        raise UsageError("model.chat_template=plain ends replies with eos_token, not in this tokenizer")
    puts_bos = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return ("{{- bos_token }}" if puts_bos else "") + (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
