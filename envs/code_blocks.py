"""Code out of a reply: the last fenced block, or the whole text where there is none."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?P<language>[\w+#-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def fenced(text: str, *languages: str) -> str | None:
    """The last block in one of `languages`, else the last that names none; None without either. It may be left open."""
    found = [(match["language"].lower(), match["code"]) for match in _BLOCK.finditer(text)]
    for wanted in (languages, ("",)):
        codes = [code for language, code in found if language in wanted]
        if codes:
            return codes[-1].strip("\n")
    return None


def code_in(text: str, *languages: str) -> str:
    code = fenced(text, *languages)
    return text.strip("\n") if code is None else code
