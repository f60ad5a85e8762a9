"""Answers out of replies: the text of a reply, <answer> tags, LaTeX boxes, and the number a solution ends on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from envs.env import Message

# 1,234.50 · -3 · -$5 · .5 · 3/4 · 2e3. A minus after a digit or letter is an operator; "x2" holds no number, "5km" does.
_NUMBER = re.compile(
    r"(?<!\w)(?<![0-9]\.)(?P<sign>[-+−–]?)[$€£]?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]{1,400}+)(?:\.[0-9]{1,400}+)?|(?<!\.)\.[0-9]{1,400}+)"
    r"(?P<power>[eE][-+]?[0-9]{1,3}+)?(?:\s?/\s?(?P<over>[0-9]{1,400}+)(?!\.[0-9]|\s?/))?"
)
_LATEX = (
    (re.compile(r"(?<![0-9])\\[dtc]?frac\s*\{\s*([0-9.,]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r"\1/\2 "),
    (re.compile(r"(?<![0-9])\\[dtc]?frac\s*([0-9])\s*([0-9])"), r"\1/\2 "),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!;]\s?)(?=[0-9]{3})"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
)
_HASHES = re.compile(r"####\s*(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s*)?([^A-Za-z\s][^\n]*)", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:f?boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def text_of(reply: Message) -> str:
    """What a reply says, thinking left out: all of it where a <think> is never closed."""
    content = reply.get("content") or ""
    if not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content)
    said = content.rpartition("</think>")[2]
    return said.partition("<think>")[0].strip()


def tagged(text: str, tag: str = "answer") -> str | None:
    """Inside the last <answer>...</answer>; None without one."""
    closed = text.rfind(f"</{tag}>")
    opened = text.rfind(f"<{tag}>", 0, max(closed, 0))
    return text[opened + len(tag) + 2 : closed].strip() if opened >= 0 else None


def boxed(text: str) -> str | None:
    r"""Inside the last \boxed{...} whose braces close; None without one."""
    opened: list[tuple[int, bool]] = []  # where braces open, and whether those of a box
    last = (-1, -1)
    for brace in _BRACES.finditer(text):
        if brace[0].endswith("{") and brace[0] != "\\{":
            opened.append((brace.end(), len(brace[0]) > 1))
        elif brace[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                last = max(last, (start, brace.start()))
    return text[last[0] : last[1]].strip() if last[0] >= 0 else None


def numbers(text: str) -> Iterator[Fraction]:
    """The numbers of a text in order, exact: '$1,200.50', '3/4', '-7'; '50 %' is 50."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    for found in _NUMBER.finditer(text):
        if (number := _exact(found)) is not None:
            yield number


def first_number(text: str) -> Fraction | None:
    return next(numbers(text), None)


def final_number(text: str) -> Fraction | None:
    r"""The number a solution ends on: that after the last '####', else in the last \boxed{}, else the last of the text."""
    for marked in (_after_hashes(text), boxed(text)):
        if marked is not None and (found := first_number(marked.rpartition("=")[2])) is not None:
            return found
    last = None
    for last in numbers(text):  # noqa: B007  the last one is wanted
        pass
    return last


def is_number(text: str) -> bool:
    """Whether a text is one number and nothing else but a full stop."""
    return _NUMBER.fullmatch(text.strip().removesuffix(".")) is not None


def _after_hashes(text: str) -> str | None:
    """The rest of the last '####' line that is no heading: '#### 42', not '#### Step 2'."""
    lines = _HASHES.findall(text)
    return lines[-1] if lines else None


def _exact(found: re.Match[str]) -> Fraction | None:
    over = int(found["over"] or 1)
    if over == 0:
        return None
    value = Fraction(found["digits"].replace(",", "") + (found["power"] or "")) / over
    return -value if found["sign"] in ("-", "−", "–") else value
