"""From a composed configuration to a recipe at work: the run's name and directory, earlier runs resumed or repeated."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cookbook import records
from cookbook.compose import DEFAULT_RECIPE, Composed, load_recipe, recompose, to_yaml
from cookbook.errors import UsageError
from cookbook.origin import adapter_of, of_rerun
from cookbook.run_reader import RUNS, PastRun, read_run

MAY_CHANGE = re.compile(r"(steps|epochs|eval_every|save_every|save_minutes|keep_last|log\..+|service)$")  # on resume


def launch(composed: Composed, run_dir: Path | None = None) -> int | None:
    """Write the run's record and call the recipe's main(config); `run_dir` is given when an existing run goes on."""
    config = composed.config  # name and run_dir are the two keys that every recipe's Config has
    directory = run_dir or _new_directory(composed)
    config = replace(config, name=config.name or directory.name, run_dir=str(directory))
    _make_absolute(config)
    from cookbook.run_record import prepare

    is_new = not directory.exists()
    try:
        prepare(directory, recipe=composed.recipe, config_yaml=to_yaml(config), overrides=composed.overrides)
    except OSError as error:
        if is_new:
            shutil.rmtree(directory, ignore_errors=True)
        raise UsageError(
            f"cannot write {directory}: {error.strerror}; put it right, or choose another run_dir="
        ) from error
    try:
        status = load_recipe(composed.recipe).main(config)
    except UsageError as error:
        begun = any((directory / name).exists() for name in ("metrics.jsonl", "checkpoints.jsonl"))
        if is_new and not begun and not records.disk_full(error.__cause__):
            shutil.rmtree(directory)  # a mistyped path leaves no run behind, and its name= is free again
        raise
    if getattr(config, "service", "local") != "local":
        _bring_home(directory)
    return status


def check_start(composed: Composed) -> None:
    """For a dry run: UsageError where a run would find its directory taken, or nothing to log to."""
    from cookbook.tracking import check_log

    _new_directory(composed)
    if log := getattr(composed.config, "log", None):  # somebody's own may lack it
        check_log(log)


def _bring_home(directory: Path) -> None:
    """The newest adapter of a run on a server, so that chat, eval and export do without it; they try again if this fails."""
    from rich.console import Console

    from cookbook.progress import CONSOLE

    past = read_run(directory)
    if not past.checkpoints:
        return
    try:
        line = f"adapter     {past.adapter()}"
        adapter_of(past)
    except UsageError as error:
        line = f"adapter     {error}"
    (CONSOLE.get() or Console()).print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def reopen(run: str, overrides: list[str]) -> tuple[Composed, Path]:
    """The configuration to resume a run with, and its directory (where it lies now)."""
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        if not MAY_CHANGE.match(key):
            raise UsageError(
                f"{override}: a resumed run keeps its {key}; steps, epochs, eval_every, save_*, keep_last, log.*, service may "
                f"change (a new run with this change: cook rerun {run} {override})"
            )
    past = _saved(run)
    composed = recompose(past.recipe, past.config, overrides)
    steps, done = getattr(composed.config, "steps", None), past.newest["step"] if past.newest else 0
    if steps is not None and steps < done:
        raise UsageError(f"steps={steps}, but {done} are done: give more, or train anew (cook rerun {run} steps={steps})")
    return composed, past.directory


def repeat(run: str, overrides: list[str], config_dir: Path | None) -> Composed:
    """The configuration of a run under a new name, with changes."""
    past = _saved(run)
    start = {"init_from": of_rerun(past)} if "init_from" in past.config else {}
    composed = recompose(past.recipe, past.config | start | {"name": None, "run_dir": None}, overrides, config_dir)
    kept = [override for override in past.overrides if not override.startswith(("name=", "run_dir="))]
    return replace(composed, overrides=[*kept, *overrides])


def _new_directory(composed: Composed) -> Path:
    config = composed.config
    name = config.name or _name(composed)
    directory = Path(config.run_dir or RUNS / name).absolute()
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"run_dir={directory} is a file; give a directory")
    if (directory / "config.yaml").exists():
        raise UsageError(f"{directory} holds a run: cook resume {directory}, or choose another name= or run_dir=")
    return directory


def _name(composed: Composed) -> str:
    """sft-qwen3-8b-no_robots-1122-134501; a second run within the same second gets a -2."""
    kind, _, file = composed.recipe.partition("/")
    if composed.recipe.endswith(".py"):
        recipe = Path(composed.recipe).stem
    else:
        recipe = kind if file == DEFAULT_RECIPE[kind] else f"{kind}-{file}"
    env = getattr(composed.config, "env", None)
    asks = env.get("name") if isinstance(env, dict) else None
    parts = [recipe, _label(composed, "model", ("name",)), asks, _label(composed, "data", ("path", "name"))]
    name = "-".join([*filter(None, parts), time.strftime("%m%d-%H%M%S")])
    taken = {path.name for path in RUNS.glob(f"{name}*")}
    return next(n for n in [name, *(f"{name}-{i}" for i in range(2, 1000))] if n not in taken)


def _label(composed: Composed, section: str, fields: tuple[str, ...]) -> str:
    """The chosen file of the group, or what stands in the section when it was spelt out (model.name=..., data=file)."""
    choice = composed.choices.get(section)
    spelt_out = any(override.startswith(f"{section}.{field}=") for override in composed.overrides for field in fields)
    if choice and choice != "file" and not spelt_out:
        return choice
    values = [getattr(getattr(composed.config, section, None), field, None) for field in fields]
    value = next((value for value in values if value), "")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(value).stem if Path(value).is_file() else Path(value).name)


def _make_absolute(config: Any) -> None:
    """Files named relative to here are still found when the run is resumed from elsewhere."""
    model, data, judge = (getattr(config, name, None) for name in ("model", "data", "judge"))  # somebody's own may lack them
    files = [(config, "init_from"), (model, "name"), (model, "chat_template"), (data, "path"), (judge, "prompt")]
    for section, field in files:
        value = getattr(section, field, None)
        if value and _is_path(value):
            setattr(section, field, str(Path(value).absolute()))
    for section, field in [(data, "sources"), (config, "rewards")]:
        if entries := getattr(section, field, None):
            setattr(section, field, {_absolute(name): weight for name, weight in entries.items()})
    if getattr(config, "reward", None):
        config.reward = _absolute(config.reward)
    for section in filter(None, (config, getattr(config, "eval", None))):
        if isinstance(env := getattr(section, "env", None), dict):
            section.env = {k: _absolute(v) if k != "name" and isinstance(v, str) else v for k, v in env.items()}


def _absolute(text: str) -> str:
    """my.jsonl, or the file of my.py:score, from the root; any other text as it is."""
    file, colon, name = text.partition(".py:")
    path = Path(file + ".py") if colon else Path(text)
    return str(path.absolute()) + (f":{name}" if colon else "") if text and _is_path(str(path), file=True) else text


def _is_path(text: str, file: bool = False) -> bool:
    try:
        return Path(text).is_file() if file else Path(text).exists()
    except (OSError, ValueError):  # a text too long for a name
        return False


def _saved(run: str) -> PastRun:
    """A run whose record is whole enough to start from."""
    past = read_run(run)
    if past.unreadable:
        raise UsageError(f"{past.directory}: its record cannot be used: {'; '.join(past.unreadable)}")
    return past
