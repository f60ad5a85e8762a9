"""What a run was set to: its config.yaml as dotted keys, beside the defaults of its recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cookbook.run_reader import PastRun

NOT_SETTINGS = ("name", "run_dir")  # say which run it is


def settings_of(run: PastRun) -> dict[str, object]:
    """Dotted key -> value: {"steps": 60, "lora.rank": 32, ...}."""
    return {key: value for key, value in flat(run.config).items() if key not in NOT_SETTINGS}


def defaults_of(run: PastRun) -> dict[str, object]:
    """Those of the recipe's Config and of the env chosen; empty for a recipe that is gone or of another version."""
    from cookbook.compose import load_recipe
    from cookbook.environments import env_module

    try:
        defaults = flat(dataclasses.asdict(load_recipe(run.recipe).Config()))
    except Exception:  # somebody's file, which may have moved or changed into anything
        return {}
    env = run.config.get("env")
    if isinstance(env, Mapping) and env.get("name"):
        try:
            own = flat(dataclasses.asdict(env_module(str(env["name"])).Config()))
        except Exception:  # an env of the user's own that is not here
            own = {}
        defaults = {**{f"env.{key}": value for key, value in own.items()}, **defaults}
    return defaults


def changed(run: PastRun) -> dict[str, tuple[object, object]]:
    """Key -> (value, default), where they differ. Empty when the defaults are not known."""
    defaults = defaults_of(run)
    if not defaults:
        return {}
    return {
        key: (value, defaults.get(key)) for key, value in settings_of(run).items() if _plain(value) != _plain(defaults.get(key))
    }


def differing(runs: Mapping[str, PastRun]) -> dict[str, list[object]]:
    """Key -> its value in each run (None: not there), for the keys in which they differ."""
    settings = [settings_of(run) for run in runs.values()]
    keys = dict.fromkeys(key for values in settings for key in values)
    rows = {key: [values.get(key) for values in settings] for key in keys}
    return {key: row for key, row in rows.items() if any(_plain(value) != _plain(row[0]) for value in row)}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted keys; an empty mapping is a value."""
    values: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def _plain(value: object) -> object:
    """1 and 1.0 are one value, None and an empty mapping too."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None if value == {} else value


def shown(value: object) -> str:
    """As one types it: null, true, 0.0003, [1, 2]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
