"""Environments: a module each, with a `Config` dataclass and `problems(config, split, seed)`, a stream of problems.

The first line of a module's docstring is its line in `cook envs`. Names are not file names: `math.py` or `code.py` would
hide modules of the standard library.
"""

from importlib import import_module
from types import ModuleType

MODULES = {
    "arithmetic": "envs.arithmetic",
    "calculator": "envs.calculator",
    "class": "envs.own_class",
    "code": "envs.code_problems",
    "gsm8k": "envs.gsm8k",
    "guess_number": "envs.guess_number",
    "math": "envs.math_problems",
    "python": "envs.python_tool",
    "reasoning_gym": "envs.gym_tasks",
    "search": "envs.search_tool",
    "text_to_sql": "envs.text_to_sql",
    "textarena": "envs.text_games",
    "tictactoe": "envs.tictactoe",
}


def load(name: str) -> ModuleType:
    """The module of an environment; KeyError for an unknown name."""
    return import_module(MODULES[name])
