"""The cookbook: translates (messages <-> tokens) and drives (command line, configuration, run log) the engine.

`core`, `envs` and `recipes` are imported by these plain names. They lie next to this package in a checkout and
inside it in a wheel (`cookbook/_tree`), and other distributions use the same names: our tree goes first on
sys.path, and a foreign one already imported is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent
TREE = _PACKAGE / "_tree" if (_PACKAGE / "_tree").is_dir() else _PACKAGE.parent  # holds core, envs, recipes, conf


def _claim(names: tuple[str, ...]) -> None:
    """Put TREE first on sys.path; ImportError when one of `names` was imported from elsewhere."""
    for name in names:
        module = sys.modules.get(name)
        if module is not None and TREE not in _home(module).parents:
            raise ImportError(
                f"package {name!r} is already imported from {_home(module)}, cookbook needs its own in {TREE}: "
                f"import cookbook first, or run it in an environment without the other {name!r}"
            )
    if sys.path[:1] != [str(TREE)]:
        sys.path.insert(0, str(TREE))


def _home(module: ModuleType) -> Path:
    return Path(next(iter(module.__path__)) if hasattr(module, "__path__") else module.__file__ or "/").resolve()


_claim(("core", "envs", "recipes"))


def __getattr__(name: str) -> object:
    """`from cookbook import ServiceClient`: the engine's public names, imported when asked for."""
    if not name.startswith("_"):
        import core

        if name in getattr(core, "__all__", ()):
            return getattr(core, name)
    raise AttributeError(f"module 'cookbook' has no attribute {name!r}")
