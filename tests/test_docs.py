"""The pages for people against what they speak of: every command, option, setting, link and picture in them exists.

docs/commands.md is made here, of the help texts: COOK_GOLDEN=write uv run pytest tests/test_docs.py
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cookbook.cli import app
from cookbook.compose import DEFAULT_RECIPE, compose
from cookbook.multirun import check_words, sorted_words

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "commands.md"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^ *```")
TYPED = re.compile(r"^ *(?:\$ )?(?:next +)?(?:uv run )?cook (?P<words>.*)$")  # a line of a code block
SHOWN = re.compile(r"`(?:uv run )?cook (?P<words>[^`]+)`")
LINK = re.compile(r"\]\((?P<to>[^)\s]+)\)|(?:src|href)=\"(?P<also>[^\"]+)\"")

ABOVE = """\
# Commands

What `cook COMMAND --help` says, on one page. Settings are `key=value` words: `cook sft --cfg job` prints all of them, and
`eval "$(cook completion bash)"` completes them.

"""


# ---- docs/commands.md


def commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that is not hidden, in the order of --help, and groups that do something by themselves."""
    below = getattr(command, "commands", {})
    if not below or (path and command.invoke_without_command):
        yield path, command
    for name, subcommand in below.items():
        if not subcommand.hidden:
            yield from commands(subcommand, *path, name)


def reference() -> str:
    found = list(commands(typer.main.get_command(app)))
    contents = " · ".join(f"[{' '.join(path)}](#cook-{'-'.join(path)})" for path, _ in found)
    contents = textwrap.fill(contents, 128, break_on_hyphens=False)
    return f"{ABOVE}{contents}\n\n" + "\n".join(section(path, command) for path, command in found)


def section(path: tuple[str, ...], command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(["cook", *path, "[OPTIONS]", *map(placeholder, arguments)])
    rows = [(placeholder(word), told(word)) for word in arguments] + [(flags(option), told(option)) for option in options]
    table = ["| | |", "|---|---|", *(f"| `{escaped(name)}` | {escaped(text)} |" for name, text in rows), ""] if rows else []
    return "\n".join([f"## cook {' '.join(path)}", "", "```", usage, "```", "", *said(command), "", *table])


def said(command: Any) -> list[str]:
    """Its help; what stands after a colon to be typed, as code."""
    words, colon, example = " ".join(command.help.split()).partition(": cook ")
    examples = re.split(r"(?:, or |; )(?=cook )", f"cook {example}")
    return [f"{words}:", "", "```", *examples, "```"] if colon else [words]


def placeholder(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def flags(option: Any) -> str:
    names = ", ".join([*sorted(option.opts, key=len), *option.secondary_opts])
    kind = option.type_descriptor
    value = "|".join(map(str, kind.choices)) if kind.is_choice else "PATH" if kind.is_path else option.bare_type().upper()
    return names if option.is_flag else f"{names} {option.metavar or value}"


def told(parameter: Any) -> str:
    value = parameter.opts[0] if parameter.default is True else parameter.default
    if value is None or value is False:
        return parameter.help + (" Required." if parameter.required and parameter.param_type_name == "option" else "")
    return f"{parameter.help.rstrip('.')}. Default: `{value}`."


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def test_the_page_of_commands_says_what_the_command_line_says() -> None:
    """Regenerate after a change of the command line: COOK_GOLDEN=write uv run pytest tests/test_docs.py"""
    text = reference()
    if os.environ.get("COOK_GOLDEN") == "write":
        REFERENCE.write_text(text)
    assert text == REFERENCE.read_text()


# ---- what people are told to type


def lines_of(page: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, the words after `cook`) of code blocks, and of commands inside a sentence."""
    in_block = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if FENCE.match(line):
            in_block = not in_block
        found = [TYPED.match(line)] if in_block else SHOWN.finditer(line)
        for words in (match["words"] for match in found if match):
            yield number, shlex.split(words.partition(" > ")[0], comments=True)


TOLD = [pytest.param(words, id=f"{page.name}:{number}") for page in PAGES for number, words in lines_of(page)]


@pytest.mark.parametrize("words", TOLD)
def test_a_command_that_a_page_shows_can_be_typed(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typer takes it, and its settings compose, each value of a sweep too."""
    monkeypatch.chdir(tmp_path)
    for name in ("my.jsonl", "pairs.jsonl", "rated.jsonl", "prompts.jsonl"):
        Path(name).write_text("{}\n")
    name, command, rest = "", typer.main.get_command(app), [word for word in words if word != "..."]
    while rest and rest[0] in getattr(command, "commands", {}):
        name, command = rest[0], command.commands[rest.pop(0)]
    assert name or rest[0] in ("--help", "COMMAND"), f"no command {rest[0]}"
    if not rest or "--help" in rest or "[" in " ".join(rest):  # named in a sentence, or how it is used
        return
    assert not hasattr(command, "commands"), f"{name} has no command {rest[0]}"
    typed = command.make_context(name, rest).params
    settings = typed.get("overrides") or []
    if name in DEFAULT_RECIPE and not any("KEY=" in word for word in settings):
        parts = sorted_words(settings)
        assert bool(parts.swept) == typed["many"]
        compose(name, parts.constant if parts.swept else settings)
        check_words(lambda some: compose(name, some), parts.constant, parts.swept)


# ---- where people are sent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_exist(page: Path) -> None:
    for link in LINK.finditer(page.read_text()):
        to = link["to"] or link["also"]
        if not to.startswith(("http://", "https://")):
            path, _, heading = to.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), to
            assert not heading or heading in headings(target), to


def headings(page: Path) -> set[str]:
    """As GitHub names them in addresses."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
