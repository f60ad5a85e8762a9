"""reasoning_gym: any of its 105 generated tasks, or a mixture by weight (extra: gym)."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, final

from envs.answers import tagged, text_of
from envs.checker import checker
from envs.env import Attempts, Env, Message, StepResult
from envs.streams import check_split, generator, held_apart

Entry: TypeAlias = dict[str, Any]  # reasoning_gym's: question, answer (None where many are right), metadata

TASKS = tuple("""
ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation binary_matrix
bitwise_arithmetic boxnet caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio coin_flip color_cube_rotation
complex_arithmetic count_bits count_primes countdown course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice
emoji_mystery family_relationships figlet_font fraction_simplification futoshiki game_of_life game_of_life_halting gcd
graph_color group_anagrams gsm_symbolic intermediate_integration isomorphic_strings jugs kakurasu knight_swap
knights_knaves largest_island lcm leg_counting letter_counting letter_jumble list_functions mahjong_puzzle
manipulate_matrix maze mini_sudoku modulo_grid n_queens needle_haystack number_filtering number_format number_sequence
number_sorting palindrome_generation palindrome_partitioning path_star polynomial_equations polynomial_multiplication
pool_matrix power_function prime_factorization products propositional_logic puzzle24 quantum_lock ransom_note rearc
rectangle_count rotate_matrix rotten_oranges rubiks_cube rush_hour self_reference sentence_reordering shortest_path
simple_equations simple_geometry simple_integration sokoban spell_backward spiral_matrix string_insertion
string_manipulation string_splitting string_synthesis sudoku survo syllogism time_intervals tower_of_hanoi tsumego
word_ladder word_sequence_reversal word_sorting zebra_puzzles
""".split())  # noqa: SIM905  written out: importing the package takes seconds
PROMPTS = ("default", "simple", "direct", "chain_of_draft", "DeepSeekZero")  # the package's own, all ask for <answer> tags
ANSWERS = ("any", "tags")

CHUNK = 500  # entries made by one dataset object: some tasks work out all of them at the start
MAX_FAILURES = 100  # entries in a row that a task may fail to make
JUNK = "I do not know"

# Scorers that evaluate what the policy wrote get it only in a form that can do no harm: no calls but of functions of algebra.
_LISTS = re.compile(r"(?!.*\bfor\b)[\w\s\[\],'\"-]*", re.DOTALL)
_SUMS = re.compile(r"(?!.*\*\s*\*)[0-9+\-*/()\s]*", re.DOTALL)
_FUNCTIONS = "sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|pi|Abs"
_TOWERS = r"(?!.*\*\*\s*[\w.]+\s*\*\*)(?!.*\*\*\s*\(?\s*-?\s*[0-9]{3})"  # 9**9**9, x**999
_ALGEBRA = re.compile(
    rf"{_TOWERS}(?:[0-9+\-*/^(),\s]|\.(?![A-Za-z])|(?<![A-Za-z0-9_])(?:{_FUNCTIONS}|[A-Za-z])(?![A-Za-z0-9_]))*",
    re.DOTALL,
)
_HARMLESS = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _LISTS),
    **dict.fromkeys(("countdown", "puzzle24"), _SUMS),
    **dict.fromkeys(("intermediate_integration", "polynomial_multiplication", "simple_integration"), _ALGEBRA),
    "coin_flip": re.compile(r"[-+0-9./\s]*"),  # to Fraction, for which 1e999999999 is a number like any other
}
_SLOW = {task for task, pattern in _HARMLESS.items() if pattern is _ALGEBRA}  # sympy may never end: a process of its own
MAX_ALGEBRA = 500  # characters


@dataclass
class Config:
    task: str = "leg_counting"  # a name of reasoning_gym's
    tasks: dict[str, float] = field(default_factory=dict)  # a mixture in place of `task`: name -> weight
    params: dict[str, Any] = field(default_factory=dict)  # the task's settings {max_animals: 3}; of a mixture {task: {...}}
    system_prompt: str | None = "Reply with the answer only."  # a text; default, simple, direct, chain_of_draft, DeepSeekZero
    answer: str = "any"  # any: inside <answer> tags, else the whole reply; tags: none without them
    partial: bool = False  # keep scores between 0 and 1, but those that junk gets too; false: all or nothing


@final
class GymTask(Env):
    """Reward: the task's own score. Metric `score_error`: the scorer failed on the reply, which counts as 0."""

    def __init__(self, config: Config, task: str, dataset: Any, entry: Entry, prompt: str | None) -> None:
        self.config, self.task, self.dataset, self.entry, self.prompt = config, task, dataset, entry, prompt

    def reset(self) -> list[Message]:
        system = [{"role": "system", "content": self.prompt}] if self.prompt else []
        return [*system, {"role": "user", "content": self.entry["question"].strip()}]

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        inside = tagged(text)
        answer = text if inside is None and self.config.answer == "any" else inside
        score = self._score(answer) if answer else 0.0
        metrics = {"correct": float(score == 1.0), "score_error": float(score is None)}
        if self.config.answer == "tags":
            metrics["format"] = float(inside is not None)
        reward = score or 0.0
        if reward < 1 and not (self.config.partial and reward > (self._score(JUNK) or 0.0)):
            reward = 0.0
        return StepResult(reward=reward, metrics=metrics)

    def _score(self, answer: str) -> float | None:
        """0 to 1; None when the scorer fails."""
        if self.task == "game_of_life_halting":  # its own scorer takes any text for True
            return float(answer.strip().removesuffix(".").lower() == str(self.entry["answer"]).lower())
        if self.task in _HARMLESS and not _HARMLESS[self.task].fullmatch(answer):
            return 0.0
        if self.task in _SLOW:
            if len(answer) > MAX_ALGEBRA:
                return 0.0
            return checker("gym").ask(self.task, _params(self.config, self.task), self.entry, answer)
        try:
            score = float(self.dataset.score_answer(answer, self.entry))
        except Exception:  # prime_factorization on words, for one
            return None
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else None


def problems(config: Config, split: str, seed: int) -> Iterator[Attempts]:
    check_split(split)
    weights = _weights(config)
    if config.answer not in ANSWERS:
        raise ValueError(f"env.answer={config.answer}: expected any or tags")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(
            "env=reasoning_gym needs the package reasoning-gym: `uv sync --extra gym`, or `pip install reasoning-gym`"
        )
    prompt = _prompt(config.system_prompt)
    for task in weights:
        _dataset(config, task, seed=0)  # refuses bad settings now
    return _mixed(config, weights, split, seed, prompt)


def _mixed(config: Config, weights: Mapping[str, float], split: str, seed: int, prompt: str | None) -> Iterator[Attempts]:
    """Problems of all tasks by weight; of an eval split, until each task has run out."""
    streams = {task: held_apart(_entries(config, task, split, seed), _question, split) for task in weights}
    rng = generator(split, seed, "mixture")
    while streams:
        (task,) = rng.choices(list(streams), [weights[task] for task in streams])
        drawn = next(streams[task], None)
        if drawn is None:
            del streams[task]
            continue
        dataset, entry = drawn
        answer = entry["answer"]
        shown = None if answer is None else f"<answer>{answer}</answer>"
        yield Attempts(partial(GymTask, config, task, dataset, entry, prompt), shown, task)


def _entries(config: Config, task: str, split: str, seed: int) -> Iterator[tuple[Any, Entry]]:
    failures = 0
    for chunk in itertools.count():
        dataset = _dataset(config, task, generator(split, seed, task, chunk).randrange(2**31))
        for index in range(CHUNK):
            try:
                entry = dataset[index]
                failures = 0
            except Exception as error:  # some tasks give up on an unlucky draw
                failures += 1
                if failures >= MAX_FAILURES:
                    raise ValueError(f"reasoning_gym task {task} makes no problem with these settings: {error}") from error
                continue
            yield dataset, entry


def _question(drawn: tuple[Any, Entry]) -> str:
    return str(drawn[1]["question"])


def _dataset(config: Config, task: str, seed: int) -> Any:
    reasoning_gym = _package()
    params = _params(config, task)
    try:
        return reasoning_gym.create_dataset(task, **params, seed=seed, size=CHUNK)
    except (TypeError, AssertionError, ValueError) as error:
        known = sorted(set(reasoning_gym.factory.DATASETS[task][1].__dataclass_fields__) - {"seed", "size"})
        said = " ".join(str(error).split()).removeprefix(f"{task}: ")
        raise ValueError(f"env.params of {task}: {said}; it takes {', '.join(known)}") from error


def _params(config: Config, task: str) -> dict[str, Any]:
    return dict(config.params.get(task) or {}) if config.tasks else dict(config.params)


def _weights(config: Config) -> dict[str, float]:
    weights = dict(config.tasks) or {config.task: 1.0}
    for task, weight in weights.items():
        if task not in TASKS:
            close = difflib.get_close_matches(task, TASKS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"reasoning_gym has no task {task!r}{hint}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"env.tasks.{task}={weight:g}: a weight is a positive number; to drop it, leave it out")
    strangers = [name for name in config.params if config.tasks and name not in config.tasks]
    if strangers:
        raise ValueError(f"env.params.{strangers[0]}: with env.tasks, params are given by task, one of {', '.join(weights)}")
    return weights


def _prompt(name: str | None) -> str | None:
    if not name:
        return None
    if name in PROMPTS:
        _package()
        from reasoning_gym.utils import SYSTEM_PROMPTS

        return SYSTEM_PROMPTS[name].strip()
    if " " not in name.strip():
        raise ValueError(f"env.system_prompt={name}: expected a sentence, null, or one of {', '.join(PROMPTS)}")
    return name


def _package() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages it brings along, at their first import
        import reasoning_gym
        import reasoning_gym.factory
    return reasoning_gym
