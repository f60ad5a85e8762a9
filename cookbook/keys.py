"""The keys a recipe's Config declares: dotted names, types, the groups of conf files over them, did-you-mean."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

from cookbook import TREE

CONF = TREE / "conf"


def declared(config_type: type, prefix: str = "") -> dict[str, object]:
    """Dotted name -> type of every leaf of a Config dataclass: {"steps": int | None, "lora.rank": int, ...}."""
    hints = typing.get_type_hints(config_type)
    keys: dict[str, object] = {}
    for field in dataclasses.fields(config_type):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            keys |= declared(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = hint
    return keys


def sections(config_type: type) -> list[str]:
    """The fields that are groups of keys: ["model", "lora", ...]."""
    hints = typing.get_type_hints(config_type)
    return [f.name for f in dataclasses.fields(config_type) if dataclasses.is_dataclass(hints[f.name])]


def group_files(group: str, config_dir: Path | None = None) -> dict[str, Path]:
    """Option -> file of conf/<group>, the user's directory first: {"qwen3-8b": .../conf/model/qwen3-8b.yaml, ...}."""
    folders = [CONF / group, *([config_dir / group] if config_dir else [])]
    files = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    return dict(sorted(files.items(), key=lambda item: _by_size(item[0])))


def groups(config_type: type, config_dir: Path | None = None) -> list[str]:
    """What `group=option` may choose for this Config: its sections that have files in conf, and `experiment`."""
    hints = typing.get_type_hints(config_type)
    envs = ["env"] if is_mapping(hints.get("env")) else []  # before its keys are known
    return [name for name in [*sections(config_type), *envs, "experiment"] if group_files(name, config_dir)]


def group_options(group: str, config_type: type, config_dir: Path | None = None) -> dict[str, Path]:
    """The files of a group, but those that set root keys of another recipe: batch_size is none of `cook rl`."""
    known = {field.name for field in dataclasses.fields(config_type)}
    return {name: path for name, path in group_files(group, config_dir).items() if not root_keys(path) - known}


def root_keys(path: Path) -> set[str]:
    """The keys that a conf file sets beside its own section."""
    text = path.read_text(encoding="utf-8")
    if "@package _global_" not in text:
        return set()
    import yaml

    values = yaml.safe_load(text)
    return {key for key in values if key != "defaults"} if isinstance(values, dict) else set()


def is_text(hint: object) -> bool:
    return hint is str or hint == (str | None)


def is_mapping(hint: object) -> bool:
    return typing.get_origin(hint) is dict


def type_name(hint: object) -> str:
    """int | None -> 'int or null'."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(type_name(arg) for arg in typing.get_args(hint))
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option probably meant: same last part (rank -> lora.rank), initials (lr -> learning_rate), or spelling."""
    options = list(options)
    last = {option: option.rsplit(".", 1)[-1] for option in options}
    for fits in (lambda o: last[o] == word, lambda o: len(word) > 1 and _initials(last[o]) == word):
        if found := [option for option in options if fits(option)]:
            return found[0]
    close = difflib.get_close_matches(word, options, n=1) or difflib.get_close_matches(word, last.values(), n=1)
    if not close:
        return next((option for option in options if option.startswith(word)), None) if len(word) > 2 else None
    return close[0] if close[0] in last else next(option for option in options if last[option] == close[0])


def did_you_mean(word: str, options: Sequence[str] | Iterable[str]) -> str:
    """' (did you mean learning_rate?)', or nothing."""
    found = nearest(word, options)
    return f" (did you mean {found}?)" if found else ""


def _by_size(name: str) -> list[tuple[float, str]]:
    """qwen3-8b before qwen3-14b."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]


def _initials(name: str) -> str:
    return "".join(part[0] for part in name.split("_") if part)
