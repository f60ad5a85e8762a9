"""Configuration of a run: a recipe's Config < conf/model, conf/env, conf/data < conf/experiment < the command line.

The one module that touches Hydra (its loader; not its app, argparse, cwd or logging). What comes out is a plain
dataclass; every mistake is a UsageError of one line. A Config with an env section is composed twice: to learn env.name,
then with the keys of that env.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cookbook import TREE
from cookbook.config import PromptsConfig, check_values
from cookbook.environments import as_recipe_config, env_paths, with_env_keys
from cookbook.errors import UsageError
from cookbook.keys import (
    CONF,
    declared,
    did_you_mean,
    group_files,
    group_options,
    groups,
    is_mapping,
    is_text,
    root_keys,
    sections,
    type_name,
)
from cookbook.overrides import Entry, checked_entry, key_of, one_line, spelt_out
from cookbook.rows import ENDINGS
from envs.source_file import load_file

DEFAULT_RECIPE = {"sft": "chat", "rl": "reinforce", "dpo": "pairs"}  # recipes/<kind>/<this>.py
SCHEMA, SAVED, PRIMARY = "cook_schema", "cook_saved", "cook_primary"  # names of our nodes in Hydra's ConfigStore


@dataclass(frozen=True)
class Composed:
    """What a run is started with."""

    config: Any  # an instance of the recipe's own Config
    yaml: str
    overrides: list[str]  # as typed
    recipe: str  # "sft/chat", or the path of somebody's own file
    choices: dict[str, str | None]  # group -> file: {"model": "qwen3-8b", ...}
    config_dir: Path | None = None  # somebody's own files of groups


def compose(kind: str, overrides: list[str], recipe: str | None = None, config_dir: Path | None = None) -> Composed:
    """Compose conf/<kind>.yaml over the Config of recipes/<kind>/<recipe>.py; `recipe=<file>` may be an override."""
    rest = [override for override in spelt_out(overrides) if not override.startswith("recipe=")]
    named = [override.removeprefix("recipe=") for override in overrides if override.startswith("recipe=")]
    file = (named or [recipe or DEFAULT_RECIPE[kind]])[-1]
    name = f"{kind}/{file}"
    return _compose(name, load_recipe(name), overrides, rest, config_dir, primary=kind)


def compose_file(path: Path, overrides: list[str], config_dir: Path | None = None) -> Composed:
    """Compose the Config of somebody's own recipe file; model=, data= and the like work for the sections it has."""
    name = str(path.absolute())
    return _compose(name, load_recipe(name), overrides, spelt_out(overrides), config_dir)


def recompose(
    recipe: str, saved: Mapping[str, object], overrides: list[str], config_dir: Path | None = None
) -> Composed:
    """Compose over the values of a run's config.yaml; a newly chosen group (model=...) replaces its whole section."""
    rest, module = spelt_out(overrides), load_recipe(recipe)
    chosen = {key_of(override) for override in rest}
    replaced = {key for key in chosen if isinstance(saved.get(key), Mapping)}
    if _prompts_replace_env(module.Config) and chosen & CHOOSE_PROMPTS:
        replaced.add("env")
    elif _prompts_replace_env(module.Config) and "env" in chosen:
        replaced |= {"data", "reward", "rewards", "judge"}
    kept = {key: value for key, value in saved.items() if key not in replaced}
    return _compose(recipe, module, overrides, rest, config_dir, saved=kept)


def typed_config(recipe: str, overrides: list[str]) -> type:
    """The Config of a recipe ("rl/reinforce", or a file) with the keys of the env chosen so far, for completion."""
    config_type = load_recipe(recipe).Config
    primary = PRIMARY if recipe.endswith(".py") else recipe.split("/")[0]
    try:
        return _with_env_keys(config_type, _prompts_or_env(config_type, spelt_out(overrides)), None, primary, None)
    except UsageError:  # half-typed
        return config_type


def load_recipe(recipe: str) -> ModuleType:
    """The module of "sft/chat" or of a path ending in .py; it must hold `Config` (a dataclass) and `main`."""
    if recipe.endswith(".py"):
        module = _load_file(Path(recipe))
    else:
        kind, _, file = recipe.partition("/")
        known = recipe_files(kind)
        if file not in known:
            raise UsageError(f"recipe={file}: recipes/{kind} has {', '.join(known)}{did_you_mean(file, known)}")
        module = importlib.import_module(f"recipes.{kind}.{file}")
    config_type = getattr(module, "Config", None)
    if not (isinstance(config_type, type) and is_dataclass(config_type) and callable(getattr(module, "main", None))):
        raise UsageError(f"{recipe} is not a recipe: it needs a dataclass `Config` and a function `main(config)`")
    return module


def recipe_files(kind: str) -> dict[str, Path]:
    """File name without .py -> path, of recipes/<kind>."""
    return {path.stem: path for path in sorted((TREE / "recipes" / kind).glob("*.py")) if path.stem != "__init__"}


def plugins_on_path() -> None:
    """Our launchers lie in Hydra's namespace package, below ours: the wheel claims one name. Before Hydra looks for plugins."""
    folder = str(Path(__file__).parent / "_plugins")
    if folder not in sys.path:
        sys.path.append(folder)


def to_yaml(config: Any) -> str:
    """The text of config.yaml for a Config instance."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"no such recipe file: {path}")
    return load_file(path, "recipe")


def _compose(
    recipe: str,
    module: ModuleType,
    overrides: list[str],
    rest: list[str],
    config_dir: Path | None,
    *,
    primary: str = PRIMARY,
    saved: Mapping[str, object] | None = None,
) -> Composed:
    """One composition. Without a primary file in conf, a node takes its place: every group optional, over `saved`."""
    if config_dir is not None and not config_dir.is_dir():
        raise UsageError(f"--config-dir {config_dir}: no such directory")
    rest = _epochs_or_steps(module.Config, _prompts_or_env(module.Config, rest))
    config_type = _with_env_keys(module.Config, rest, config_dir, primary, saved)
    cfg = _loaded(config_type, rest, config_dir, primary, saved)
    chosen = {group: cfg.hydra.runtime.choices.get(group) for group in groups(config_type, config_dir)}
    del cfg["hydra"]
    try:
        config = as_recipe_config(module.Config, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise UsageError(one_line(error)) from error
    check_values(config)
    return Composed(config, to_yaml(config), overrides, recipe, chosen, config_dir)


def _loaded(
    config_type: type, overrides: list[str], config_dir: Path | None, primary: str, saved: Mapping[str, object] | None
) -> DictConfig:
    schema = _schema(config_type)
    checked = [_checked(override, config_type, schema, config_dir) for override in overrides]
    choosable = groups(config_type, config_dir)
    store = ConfigStore.instance()
    store.store(SCHEMA, schema)
    if primary == PRIMARY:
        store.store(SAVED, dict(saved or {}))
        store.store(PRIMARY, {"defaults": [SCHEMA, SAVED, *({f"optional {group}": None} for group in choosable), "_self_"]})
    cfg = _load(primary, [word for word in checked if isinstance(word, str)], config_dir, list(declared(config_type)))
    for entry in checked:
        if isinstance(entry, Entry):
            entry.put(cfg)
    return cfg


def _with_env_keys(
    config_type: type, overrides: list[str], config_dir: Path | None, primary: str, saved: Mapping[str, object] | None
) -> type:
    """The Config with the keys of its envs, their names learnt by composing what chooses them."""
    paths = env_paths(config_type)
    if not paths:
        return config_type
    choosing = {*groups(config_type, config_dir), *paths, *(f"{path}.name" for path in paths), *CHOOSE_PROMPTS}
    cfg = _loaded(config_type, [word for word in overrides if key_of(word) in choosing], config_dir, primary, saved)
    names = {path: OmegaConf.select(cfg, f"{path}.name") for path in paths}
    if _prompts_replace_env(config_type) and (cfg.data.name or cfg.data.path):
        names["env"] = None
    return with_env_keys(config_type, names)


CHOOSE_PROMPTS = {"data", "data.name", "data.path"}


def _prompts_replace_env(config_type: type) -> bool:
    hints = get_type_hints(config_type)
    return hints.get("data") is PromptsConfig and is_mapping(hints.get("env"))


def _prompts_or_env(config_type: type, overrides: list[str]) -> list[str]:
    """Prompts of one's own take the place of the env that the primary file chooses."""
    prompts = [word for word in overrides if key_of(word) in CHOOSE_PROMPTS and not word.endswith("=null")]
    envs = [word for word in overrides if key_of(word).split(".")[0] == "env"]
    if not prompts or not _prompts_replace_env(config_type):
        return overrides
    if chosen := [word for word in envs if word not in ("env=null", "~env")]:
        raise UsageError(f"{chosen[0]} and {prompts[0]}: a run learns from an env or from prompts of your own; give one")
    return overrides if envs else [*overrides, "env=null"]


def _epochs_or_steps(config_type: type, overrides: list[str]) -> list[str]:
    """Passes over the rows that somebody asks for take the place of the steps that a file, or an earlier session, chose."""
    typed = {key_of(word) for word in overrides}
    if "epochs" not in typed or "steps" in typed:
        return overrides
    may_be_null = type(None) in get_args(get_type_hints(config_type).get("steps"))
    return [*overrides, "steps=null"] if may_be_null else overrides


def _schema(config_type: type) -> DictConfig:
    try:
        return OmegaConf.structured(config_type)
    except OmegaConfBaseException as error:
        raise UsageError(f"Config of {config_type.__module__} is no valid schema: {one_line(error)}") from error


def _load(primary: str, overrides: list[str], config_dir: Path | None, keys: list[str]) -> DictConfig:
    plugins_on_path()
    version.setbase("1.3")
    search_path = create_config_search_path(str(CONF))
    if config_dir is not None:
        search_path.prepend("user", f"file://{config_dir.absolute()}")
    try:
        cfg = ConfigLoaderImpl(search_path).load_configuration(primary, overrides, RunMode.RUN)
        OmegaConf.set_struct(cfg, False)
        return cfg
    except (HydraException, OmegaConfBaseException) as error:
        told = one_line(error) + _key_hint(error, keys)
        if told.startswith(f"In '{SAVED}': "):
            what = told.partition("composing config: ")[2]
            told = f"the run's config.yaml is of another version ({what}): change it there, or use the version of run.json"
        raise UsageError(told) from error


# What was typed is checked before Hydra sees it: its own messages depend on its version and say little to a person.


def _checked(override: str, config_type: type, schema: DictConfig, config_dir: Path | None) -> str | Entry:
    """The override as Hydra is to read it; UsageError for an unknown key, group option or a value of the wrong type."""
    prefix = override[: len(override) - len(override.lstrip("+~"))]
    key, equals, value = override[len(prefix) :].partition("=")
    keys, choosable = declared(config_type), groups(config_type, config_dir)
    if not equals and not prefix.startswith("~"):
        raise UsageError(_bare_word(override, [*keys, *choosable], choosable, config_dir))
    if key in choosable and not value.startswith("{"):
        return _checked_choice(prefix, key, value, config_type, config_dir)
    mapping = next((name for name in keys if is_mapping(keys[name]) and f"{key}.".startswith(f"{name}.")), None)
    if prefix.startswith("~"):
        if mapping is None or mapping == key:
            raise UsageError(f"{override}: only entries of a mapping can be taken out; to unset a key write {key}=null")
        return Entry(mapping, None, key.removeprefix(f"{mapping}."))
    if mapping is not None:
        return checked_entry(override, mapping, key.removeprefix(mapping).removeprefix("."), value, keys[mapping], schema)
    if key not in keys and not (key in sections(config_type) and value.startswith("{")):
        raise UsageError(_unknown_key(key, value, config_type, choosable))
    return _checked_value(override, key, value, keys.get(key), schema)


def _checked_value(override: str, key: str, value: str, hint: object, schema: DictConfig) -> str:
    parsed = _parse(f"{key}={value}")
    if parsed is not None and parsed.is_sweep_override():
        quote = f"; a text with commas is quoted twice: '{key}=\"{value}\"'" if is_text(hint) else ""
        raise UsageError(f"{override}: several values for one run, give one{quote}")
    if is_text(hint) and value != "null" and (parsed is None or not isinstance(parsed._value, QuotedString)):
        value = QuotedString(value, Quote.single).with_quotes()  # a text is taken as typed: s3://b/k=1, 007, a(1).jsonl
        parsed = _parse(f"{key}={value}")
    if parsed is None:
        raise UsageError(f"{override}: cannot read the value {value!r}; quote it: '{key}=\"{value}\"'")
    try:
        OmegaConf.update(schema.copy(), key, parsed.value(), merge=True)
    except OmegaConfBaseException as error:
        if hint is None:
            raise UsageError(f"{override}: {one_line(error)}") from error
        raise UsageError(f"{override}: expected {type_name(hint)}, got {value}") from error
    return f"{key}={value}"


def _parse(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _checked_choice(prefix: str, group: str, option: str, config_type: type, config_dir: Path | None) -> str:
    options = list(group_options(group, config_type, config_dir))
    if prefix.startswith("~") or option == "null":
        return f"~{group}"
    if option in options:
        return f"{group}={option}"
    there = f"there are {', '.join(options)}"
    if path := group_files(group, config_dir).get(option):
        foreign = ", ".join(sorted(root_keys(path) - set(get_type_hints(config_type))))
        raise UsageError(f"{group}={option} is for another recipe: this one has no {foreign}; {there}")
    if group == "data" and ("/" in option or "." in option):
        near = [str(path) for path in Path(option).parent.glob("*") if path.is_file()]
        hub = f"; a hub set: data.path={option}" if option.count("/") == 1 and not option.endswith(ENDINGS) else ""
        raise UsageError(f"data={option}: no such file{did_you_mean(option, near)}{hub}; {there}")
    instead = f"; a hub id or a directory: model.name={option}" if group == "model" else ""
    raise UsageError(f"{group}={option}: no such {group}{did_you_mean(option, options)}; {there}{instead}")


def _bare_word(word: str, known: list[str], choosable: list[str], config_dir: Path | None) -> str:
    if word in known:
        return f"{word!r} has no value: {word}=..."
    for group in choosable:
        if word in group_files(group, config_dir):
            return f"{word!r} is not key=value (did you mean {group}={word}?)"
    return f"{word!r} is not key=value, as in steps=100 or model=qwen3-8b"


def _unknown_key(key: str, value: str, config_type: type, choosable: list[str]) -> str:
    keys = declared(config_type)
    if key in sections(config_type):
        inside = [name for name in keys if name.startswith(f"{key}.")]
        return f"{key}={value}: {key} is a group of keys; set one of {', '.join(inside)}"
    return f"unknown key {key}{did_you_mean(key, [*keys, *choosable])}; all keys: --cfg job"


def _key_hint(error: BaseException, keys: list[str]) -> str:
    """Did-you-mean for a key that a conf file sets and no Config declares."""
    text = str(error)
    if "not in '" not in text or "full_key: " not in text:
        return ""
    return did_you_mean(text.split("full_key: ")[1].splitlines()[0].strip(), keys)
