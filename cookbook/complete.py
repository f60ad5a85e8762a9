"""Shell completion, `cook sft model=q<TAB>`: keys from the recipe's Config, commands and flags from Typer."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cookbook.compose import DEFAULT_RECIPE, load_recipe, recipe_files, typed_config
from cookbook.environments import env_module
from cookbook.keys import declared, group_options, groups, is_mapping, is_text, sections
from cookbook.launch import MAY_CHANGE
from cookbook.run_reader import RUNS, name_of, run_directories
from envs import MODULES

# Bash breaks words at = and :, so its answers are what stands after the last of them.
# No shell gets a space after `steps=`, `lora.` and `dir/`.
_BASH = """\
_cook() {
    local IFS=$'\\n'
    COMPREPLY=( $(cook _complete bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null) )
    if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=./] ]]; then compopt -o nospace; fi
}
complete -o nosort -F _cook cook
"""
_ZSH = """\
#compdef cook
_cook() {
    local -a found open
    found=("${(@f)$(cook _complete zsh "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    open=("${(@M)found:#*[=./]}")
    found=("${(@)found:#*[=./]}")
    compadd -Q -S '' -- "${(@)open:#}"
    compadd -Q -- "${(@)found:#}"
}
compdef _cook cook
"""
_FISH = "complete -c cook -f -a '(cook _complete fish (commandline -cp) 2>/dev/null)'\n"
ON_SEVERAL_RUNS = ("report",)
ON_RUNS = (*ON_SEVERAL_RUNS, "chat", "sample", "eval", "generate", "export", "push")  # commands of cli_runs.py that take a run
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def answers(root: Any, shell: str, line: str) -> list[str]:
    """What the last, perhaps empty, word of `line` could become; never raises. `root`: Typer's command tree."""
    try:
        *before, word = _words(line)
        found = [option for option in _options(root, before[1:], word) if option.startswith(word)]
    except Exception:  # half-typed words, a recipe that does not import: a prompt has no place for it
        return []
    cut = max(word.rfind("="), word.rfind(":")) + 1 if shell == "bash" else 0
    return [option[cut:] for option in dict.fromkeys(found)]


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError:  # an open quote
        words = line.split()
    return words if line and not line[-1].isspace() else [*words, ""]


def _options(command: Any, before: list[str], word: str) -> Iterator[str]:
    path: list[str] = []
    while hasattr(command, "commands") and before and before[0] in command.commands:
        path.append(before[0])
        command, before = command.commands[before[0]], before[1:]
    if hasattr(command, "commands"):
        yield from (name for name, sub in command.commands.items() if not sub.hidden)
    elif before and before[-1] == "--cfg":
        yield "job"
    elif before and before[-1] == "--config-dir":
        yield from _paths(word)
    elif word.startswith("-"):
        yield from (option for parameter in command.params for option in parameter.opts if option.startswith("--"))
        yield "--help"
    else:
        yield from _arguments(" ".join(path), [w for w in before if not w.startswith("-")], word)


def _arguments(command: str, before: list[str], word: str) -> Iterator[str]:
    if command in ("resume", "rerun", *ON_RUNS) and (not before or command in ON_SEVERAL_RUNS):
        yield from _runs(word)
    elif command == "run" and not before:
        yield from _paths(word, ".py")
    elif command == "completion":
        yield from SCRIPTS
    elif command == "resume":
        yield from (key for key in _keys(load_recipe("sft/chat").Config, word) if MAY_CHANGE.match(key.rstrip("=")))
    elif command == "run":
        yield from _keys(typed_config(before[0], before[1:]), word)
    elif command in ("envs play", "envs check"):
        yield from _env_arguments(before, word)
    elif command in ("sft", "rl", "dpo", "rerun", "data check", "data show"):
        kind = command if command in DEFAULT_RECIPE else "sft"
        recipe = next((w.removeprefix("recipe=") for w in before if w.startswith("recipe=")), DEFAULT_RECIPE[kind])
        yield from (f"recipe={name}" for name in recipe_files(kind) if word.startswith("r"))
        yield from _keys(typed_config(f"{kind}/{recipe}", before), word)
        if command.startswith("data") and not before and "=" not in word:
            yield from _paths(word)


def _env_arguments(before: list[str], word: str) -> Iterator[str]:
    """A name, then the keys of that env, as `cook envs check` takes them: without `env.`."""
    if not before:
        yield from MODULES
        return
    keys = declared(env_module(before[0]).Config)
    yield from (f"{name}." if is_mapping(keys[name]) else f"{name}=" for name in keys)
    yield from _values(keys, word)


def _keys(config_type: type, word: str) -> Iterator[str]:
    """Before the =, keys (one level at a time); after it, group files, true and false, or paths."""
    keys = declared(config_type)
    key, equals, value = word.partition("=")
    if not equals:
        yield from (f"{name}=" for name in groups(config_type))
        yield from (f"{name}." for name in sections(config_type) if "." not in word)
        leaves = [name for name in keys if "." in word or "." not in name]
        yield from (f"{name}." if is_mapping(keys[name]) else f"{name}=" for name in leaves)
    elif key in groups(config_type):
        yield from (f"{key}={option}" for option in group_options(key, config_type))
        if key == "data":
            yield from (f"data={path}" for path in _paths(value))
    else:
        yield from _values(keys, word)


def _values(keys: Mapping[str, object], word: str) -> Iterator[str]:
    """After the = of a key: paths for a text, true and false."""
    key, equals, value = word.partition("=")
    if equals and is_text(keys.get(key)):
        yield from (f"{key}={path}" for path in _paths(value))
    elif equals and "bool" in str(keys.get(key)):
        yield from (f"{key}=true", f"{key}=false")


def _runs(word: str) -> Iterator[str]:
    names = map(name_of, run_directories())
    yield from (f"{RUNS}/{name}" if word.startswith(str(RUNS)) else name for name in names)
    yield from _paths(word)


def _paths(word: str, suffix: str = "") -> Iterator[str]:
    """Files (ending in `suffix`) and directories/ that start with `word`, hidden ones left out."""
    typed = word.rpartition("/")
    folder = Path(typed[0] + typed[1] or ".").expanduser()
    for path in sorted(folder.glob(f"{typed[2]}*")):
        if not path.name.startswith(".") and (path.is_dir() or path.name.endswith(suffix)):
            yield typed[0] + typed[1] + path.name + ("/" if path.is_dir() else "")
