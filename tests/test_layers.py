"""Imports point down only: recipes -> cookbook -> {core, envs}; core and envs know nobody."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "core": {"core"},
    "envs": {"envs"},
    "cookbook": {"cookbook", "core", "envs"},  # compose loads recipes by name
    "recipes": {"recipes", "cookbook", "core", "envs"},
}
OURS = {*MAY_IMPORT, "bench", "tests"}


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not [n for n in nodes if isinstance(n, ast.ImportFrom) and n.level], f"{path}: relative import"
    return {name.split(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_down(folder: str) -> None:
    upward = {str(p): bad for p in (ROOT / folder).rglob("*.py") if (bad := imported(p) & OURS - MAY_IMPORT[folder])}
    assert not upward


def test_no_module_is_named_after_one_of_the_standard_library() -> None:
    import sys

    names = {path.stem for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py")}
    assert not names & set(sys.stdlib_module_names)


def test_click_is_never_imported_since_typer_carries_its_own() -> None:
    assert not [p for folder in MAY_IMPORT for p in (ROOT / folder).rglob("*.py") if "click" in imported(p)]
