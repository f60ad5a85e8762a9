"""The key=value words of a command line, before Hydra: short forms spelt out, entries of mappings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cookbook.errors import UsageError
from cookbook.keys import did_you_mean, is_text


def spelt_out(overrides: list[str]) -> list[str]:
    """Short forms as the groups know them: data=my.jsonl (a file) is data=file data.path=my.jsonl, env.name=x is env=x."""
    words: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "data" and ("." in value or "/" in value) and Path(value).is_file():
            words += ["data=file", f"data.path={value}"]
        else:
            words.append(f"env={value}" if key == "env.name" else override)
    return words


def key_of(override: str) -> str:
    """ "++data.path=x" -> "data.path"."""
    return override.lstrip("+~").partition("=")[0]


def typed_words(record: Mapping[str, Any]) -> list[str]:
    """Of run.json: those of the beginning and of every resume, the newest last."""
    sessions = [record["overrides"], *(session["overrides"] for session in record.get("resumed", []))]
    return list(dict.fromkeys(word for words in reversed(sessions) for word in reversed(words)))[::-1]


@dataclass(frozen=True)
class Entry:
    """Entries of a mapping, set after composing: their names may hold what Hydra's grammar does not (my.py:score, a.jsonl)."""

    mapping: str
    values: Mapping[str, object] | None  # None: take out `name`
    name: str = ""

    def put(self, cfg: DictConfig) -> None:
        node = OmegaConf.select(cfg, self.mapping)
        if self.values is not None:
            for name, value in self.values.items():
                node[name] = value
        elif self.name in node:
            del node[self.name]
        else:
            names = [str(name) for name in node]
            meant = did_you_mean(self.name, names)
            raise UsageError(f"~{self.mapping}.{self.name}: no such entry{meant}; there are {', '.join(names) or 'none'}")


def checked_entry(override: str, mapping: str, name: str, value: str, hint: object, schema: DictConfig) -> Entry:
    """mapping.name=value, or mapping={name: value, ...}."""
    loader = yaml.BaseLoader if is_text(get_args(hint)[1]) else yaml.SafeLoader  # a text is taken as typed
    try:
        read = value if name and loader is yaml.BaseLoader else yaml.load(value, loader)
    except yaml.YAMLError:
        raise UsageError(f"{override}: cannot read the value {value!r}") from None
    values = {name: read} if name else read
    if not isinstance(values, dict):
        raise UsageError(f"{override}: {mapping} is a mapping: {mapping}.<name>=<value>, or '{mapping}={{<name>: <value>}}'")
    entry = Entry(mapping, {str(key): item for key, item in values.items()})
    try:
        entry.put(schema.copy())
    except OmegaConfBaseException as error:
        raise UsageError(f"{override}: {one_line(error)}") from error
    return entry


def one_line(error: BaseException) -> str:
    """The sentences of an error of Hydra or OmegaConf and of its cause, without their indented details."""
    texts = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    details = ("full_key:", "object_type=", "reference_type=", "Search path:", "provider=", "See ")
    return " ".join(line for line in lines if line and not line.startswith(details))
