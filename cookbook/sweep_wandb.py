"""The file that `wandb sweep` reads, for the axes of a sweep of ours: W&B's agents then run `cook` themselves."""

from __future__ import annotations

from collections.abc import Sequence

from cookbook.errors import UsageError
from cookbook.multirun import DEFAULT_METRIC, OWN, Axis, ComposeJob, axes, check_words, sorted_words
from cookbook.overrides import key_of
from cookbook.run_reader import falls


def sweep_file(kind: str, words: Sequence[str], metric: str | None, compose: ComposeJob, options: Sequence[str] = ()) -> str:
    """YAML; `options` go into the command. UsageError for what no job could be composed with."""
    import yaml

    if named := [word for word in words if key_of(word) in OWN]:
        raise UsageError(f"{named[0]}: each job of W&B's agents makes a name of its own; leave it out")
    parts = sorted_words([word for word in words if key_of(word) != "log.wandb"])
    if not parts.swept:
        raise UsageError("no key has several values, as in learning_rate=1e-4,3e-4")
    if parts.hydra:
        raise UsageError(f"{parts.hydra[0]} is for -m: W&B has launchers and a search of its own")
    check_words(compose, parts.constant, parts.swept)
    name = metric or DEFAULT_METRIC[kind]
    goal = "minimize" if falls(name) else "maximize"
    found = axes(parts.swept)
    return yaml.safe_dump(
        {
            "program": "cook",
            "method": "random" if any(axis.is_interval for axis in found.values()) else "grid",
            "metric": {"name": name, "goal": goal},
            "parameters": {key: _parameter(key, axis) for key, axis in found.items()},
            "command": ["${env}", "cook", kind, *parts.constant, *options, "log.wandb=online", "${args_no_hyphens}"],
        },
        sort_keys=False,
    )


def _parameter(key: str, axis: Axis) -> dict[str, object]:
    values = [_typed(value) for value in axis.values]
    if not axis.is_interval:
        return {"values": values}
    is_int = all(isinstance(value, int) for value in values)
    if is_int and axis.is_log:
        raise UsageError(f"{key}: whole numbers on a logarithmic scale are best listed, as in {key}=2,8,32")
    distribution = "int_uniform" if is_int else "log_uniform_values" if axis.is_log else "uniform"
    return {"distribution": distribution, "min": values[0], "max": values[1]}


def _typed(text: str) -> object:
    """1e-4 as a number: W&B would sort and plot text otherwise."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "null": None}.get(text, text)
