"""The file that `wandb sweep` reads, for the axes of a sweep of ours: W&B's agents then run `cook` themselves."""

from __future__ import annotations

from collections.abc import Sequence

from cookbook.errors import UsageError
from cookbook.multirun import DEFAULT_METRIC, ComposeJob, axes, check_words, sorted_words
from cookbook.run_reader import falls


def sweep_file(kind: str, words: Sequence[str], metric: str | None, compose: ComposeJob) -> str:
    """YAML. UsageError for what no job could be composed with."""
    import yaml

    parts = sorted_words(words)
    if not parts.swept:
        raise UsageError("no key has several values, as in learning_rate=1e-4,3e-4")
    if parts.hydra:
        raise UsageError(f"{parts.hydra[0]} is for -m: W&B has launchers and a search of its own")
    check_words(compose, parts.constant, parts.swept)
    name = metric or DEFAULT_METRIC[kind]
    goal = "minimize" if falls(name) else "maximize"
    return yaml.safe_dump(
        {
            "program": "cook",
            "method": "grid",
            "metric": {"name": name, "goal": goal},
            "parameters": {key: {"values": [_typed(value) for value in values]} for key, values in axes(parts.swept).items()},
            "command": ["${env}", "cook", kind, *parts.constant, "log.wandb=online", "${args_no_hyphens}"],
        },
        sort_keys=False,
    )


def _typed(text: str) -> object:
    """1e-4 as a number: W&B would sort and plot text otherwise."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "null": None}.get(text, text)
