"""Where a sample ends: stop tokens, and stop strings that may lie across token boundaries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from core.models import hub_answers, local_model

MOST_BYTES = 4  # of one character: a stop string's last token may begin inside a character


def ends_at(stop: str | Sequence[str] | Sequence[int] | None, base_model: str) -> Callable[[list[int]], bool]:
    """Whether sampled tokens end in something to stop at, asked after each token. Raises ValueError."""
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    texts = [one for one in stops if isinstance(one, str)]
    ids = frozenset(one for one in stops if isinstance(one, int) and not isinstance(one, bool))
    if len(texts) + len(ids) < len(set(stops)) or not all(texts):
        raise ValueError(f"stop is {stop!r}, expected a string, strings or token ids (none empty)")
    if not texts:
        return lambda tokens: tokens[-1] in ids
    tokenizer = _tokenizer(base_model)
    window = max(len(text.encode()) for text in texts) + MOST_BYTES  # a token is at least one byte

    def ends(tokens: list[int]) -> bool:
        if tokens[-1] in ids:
            return True
        tail = tokenizer.decode(tokens[-window:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(text in tail for text in texts)

    return ends


@functools.cache
def _tokenizer(base_model: str):
    from pathlib import Path

    from transformers import AutoTokenizer

    source = local_model(base_model)
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=not (Path(source).is_dir() or hub_answers()))
    except (OSError, ValueError) as error:
        raise ValueError(f"stop strings need the tokenizer of '{base_model}': {str(error).splitlines()[0]}") from error
