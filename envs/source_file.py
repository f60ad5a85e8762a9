"""A Python file of the user's as a module."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType

_loading = threading.RLock()  # one file at a time: runs may be threads of a sweep, and a module under way lacks its functions


def load_file(path: Path, kind: str) -> ModuleType:
    """Loaded once, as cook_<kind>_<stem>; its neighbours can be imported. Raises what the file raises."""
    name, path = f"cook_{kind}_{path.stem}", path.absolute()
    with _loading:
        loaded = sys.modules.get(name)
        if loaded is not None and loaded.__file__ == str(path):
            return loaded
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up their module by name
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # its neighbours, after ours
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
