"""Environments by name: the keys that their modules add to a recipe's Config, and their streams of problems."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast, get_type_hints

from cookbook.config import JudgeConfig, PromptsConfig
from cookbook.errors import UsageError
from cookbook.keys import did_you_mean, is_mapping
from envs import MODULES, load
from envs.env import Problem

if TYPE_CHECKING:
    from rich.console import Console

# A Config says `env: dict[str, Any]`. Once its env.name is known, the mapping is checked as a dataclass made of `name`
# and the fields of the module's own Config; the recipe gets a mapping again, with every field in it.


def env_paths(config_type: type, prefix: str = "") -> list[str]:
    """Where a recipe's Config has an `env` section: ["env"], perhaps also "eval.env"."""
    hints = get_type_hints(config_type)
    paths: list[str] = []
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hint := hints[field.name]):
            assert isinstance(hint, type)
            paths += env_paths(hint, f"{prefix}{field.name}.")
        elif field.name == "env" and is_mapping(hint):
            paths.append(f"{prefix}env")
    return paths


def with_env_keys(config_type: type, names: Mapping[str, str | None], prefix: str = "") -> type:
    """The same Config with each env section as a dataclass; `names`: path of the section -> env.name."""
    hints, fields = get_type_hints(config_type), []
    for field in dataclasses.fields(config_type):
        hint, path = hints[field.name], f"{prefix}{field.name}"
        is_section = dataclasses.is_dataclass(hint) and any(name.startswith(f"{path}.") for name in names)
        if path not in names and not is_section:
            fields.append((field.name, hint, _same_default(field)))
            continue
        typed = _section(names[path], path) if path in names else with_env_keys(cast(type, hint), names, f"{path}.")
        assert field.default_factory is not dataclasses.MISSING, f"{field.name}: a section has a default_factory"
        default = field.default_factory()
        fields.append((field.name, typed, dataclasses.field(default_factory=functools.partial(_retyped, typed, default))))
    return dataclasses.make_dataclass(config_type.__name__, fields)


def as_recipe_config(config_type: type, value: Any) -> Any:
    """An instance of the recipe's own Config from one of `with_env_keys`; a section without a name becomes {}."""
    hints, values = get_type_hints(config_type), {}
    for field in dataclasses.fields(config_type):
        hint, given = hints[field.name], getattr(value, field.name)
        if dataclasses.is_dataclass(hint):
            given = given if type(given) is hint else as_recipe_config(cast(type, hint), given)
        elif is_mapping(hint) and not isinstance(given, dict):
            given = dataclasses.asdict(given) if given.name else {}
        values[field.name] = given
    return config_type(**values)


def _section(name: str | None, path: str) -> type:
    if name is None:
        return dataclasses.make_dataclass("NoEnv", [("name", str | None, dataclasses.field(default=None))])
    config_type = env_module(name, path).Config
    hints = get_type_hints(config_type)
    fields = [(field.name, hints[field.name], _same_default(field)) for field in dataclasses.fields(config_type)]
    return dataclasses.make_dataclass(f"env={name}", [("name", str, dataclasses.field(default=name)), *fields])


def _same_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=field.default)


def _retyped(typed: type, default: Any) -> Any:
    """The default of a field of the recipe's Config as an instance of the type made for that field."""
    if isinstance(default, dict):
        return typed(**default) if default.get("name") == typed().name else typed()
    values = {}
    for field in dataclasses.fields(typed):
        value, hint = getattr(default, field.name), cast(type, field.type)
        values[field.name] = _retyped(hint, value) if dataclasses.is_dataclass(hint) and type(value) is not hint else value
    return typed(**values)


def env_module(name: str, path: str = "env") -> ModuleType:
    """The module of an env. UsageError for an unknown name, or for a package that it misses."""
    if name not in MODULES:
        meant = did_you_mean(name, MODULES)
        raise UsageError(f"{path}.name={name}: no such env{meant}; there are {', '.join(MODULES)}")
    return load(name)


def open_env(env: Mapping[str, Any]) -> tuple[ModuleType, Any]:
    """(module, its Config) of an env section {"name": "arithmetic", ...}; fields left out have their defaults."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not env.get("name"):
        raise UsageError("nothing to learn: env=arithmetic (`cook envs` lists them), or data=prompts.jsonl reward=my.py:score")
    module = env_module(env["name"])
    values = {key: value for key, value in env.items() if key != "name"}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(module.Config), values)
    except OmegaConfBaseException as error:
        known = [field.name for field in dataclasses.fields(module.Config)]
        unknown = next((key for key in values if key not in known), None)
        if unknown is not None:
            raise UsageError(f"env={env['name']}: unknown key {unknown}{did_you_mean(unknown, known)}") from error
        raise UsageError(f"env={env['name']}: {str(error).splitlines()[0]}") from error
    return module, OmegaConf.to_object(merged)


def problem_stream(env: Mapping[str, Any], split: str, seed: int, skip: int = 0) -> Iterator[Problem]:
    """Problems `skip`, `skip` + 1, ... of an env; its complaints are UsageErrors, and so is having no problem at all."""
    module, config = open_env(env)
    problems = _explained(lambda: module.problems(config, split, seed), env["name"])
    first = next(problems, None)
    if first is None:
        raise UsageError(f"env={env['name']}: there are no problems in its {split} split; look at env.*: --cfg job")
    return itertools.islice(itertools.chain([first], problems), skip, None)


def _explained(open_stream: Callable[[], Iterator[Problem]], name: str) -> Iterator[Problem]:
    try:
        yield from open_stream()
    except ValueError as error:
        said = " ".join(str(error).split())
        raise UsageError(said if said.startswith("env") else f"env={name}: {said}") from error


class Task(Protocol):
    """The keys of an RL recipe's Config that say what is learnt: an env, or prompts of one's own with their rewards."""

    seed: int
    env: dict[str, Any]
    data: PromptsConfig
    reward: str | None
    rewards: dict[str, float]
    judge: JudgeConfig


def problems_of(config: Task, split: str, skip: int = 0, console: Console | None = None) -> Iterator[Problem]:
    """Problems `skip`, `skip` + 1, ... of whatever the Config chooses; `console` gets a few lines on prompts read."""
    data = config.data
    if data.name is not None or data.path is not None:
        from cookbook.prompts import prompt_stream

        if config.env:
            raise UsageError(f"env={config.env['name']} and data={data.path or data.name}: give one of them (or env=null)")
        scoring = {"reward": config.reward, "rewards": config.rewards, "judge": config.judge}
        return prompt_stream(data, split, config.seed, skip, **scoring, console=console)
    if spec := config.reward or next(iter(config.rewards), None):
        raise UsageError(
            f"reward {spec}: an env has its own reward; this one is for prompts of your own: data=prompts.jsonl reward={spec}"
        )
    return problem_stream(config.env, split, config.seed, skip)
