"""Small functions to write, with their tests, drawn from a seed: what the env `code` has without a file."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from envs.streams import Row

NUMBERS, TEXT, NUMBER = "numbers: list[int]", "text: str", "n: int"

# Name, argument, what it returns, its body as an expression; {k} is 2 to 9, {c} a letter.
_TASKS = (
    ("sum_of_multiples", NUMBERS, "the sum of those numbers that are divisible by {k}",
     "sum(x for x in numbers if x % {k} == 0)"),
    ("count_above", NUMBERS, "how many of the numbers are greater than {k}", "sum(x > {k} for x in numbers)"),
    ("every_nth", NUMBERS, "a list of every {k}th number, beginning with the first", "numbers[::{k}]"),
    ("rotated", NUMBERS, "the list with its first {k} numbers moved to its end, if it has more than {k}; else the same list",
     "numbers[{k}:] + numbers[:{k}] if len(numbers) > {k} else numbers"),
    ("largest_ones", NUMBERS, "the {k} largest numbers, or all if there are fewer, from large to small",
     "sorted(numbers, reverse=True)[:{k}]"),
    ("differences", NUMBERS, "a list of {k} times the difference of each number from the one before it",
     "[{k} * (b - a) for a, b in zip(numbers, numbers[1:])]"),
    ("without_letter", TEXT, "the text in lower case and without the letter '{c}'", "text.lower().replace('{c}', '')"),
    ("count_words", TEXT, "how many words of the text have at least {k} characters",
     "sum(len(w) >= {k} for w in text.split())"),
    ("chunks", TEXT, "the text cut into a list of pieces of {k} characters; the last may be shorter",
     "[text[i:i + {k}] for i in range(0, len(text), {k})]"),
    ("starts_with", TEXT, "a list of the words of the text that start with '{c}', whatever their case, sorted",
     "sorted(w for w in text.split() if w.lower().startswith('{c}'))"),
    ("digit_sum", NUMBER, "the sum of the digits of {k} times n", "sum(map(int, str({k} * n)))"),
    ("in_base", NUMBER, "a list of the digits of n in base {k}, the most significant first; [0] for 0",
     "(lambda f: f(f, n) or [0])(lambda f, m: f(f, m // {k}) + [m % {k}] if m else [])"),
)  # fmt: skip
_WORDS = ("apple", "river", "Stone", "cloud", "Tree", "a", "of", "Market", "sea", "bread", "coat", "Rain", "tin", "east")


def draw_task(rng: random.Random, num_tests: int = 8) -> Row:
    """A task in HumanEval's shape: prompt, test, entry_point, canonical_solution."""
    name, argument, returned, expression = rng.choice(_TASKS)
    values = {"k": rng.randrange(2, 10), "c": rng.choice("abcert")}
    solution = expression.format(**values)
    function: Callable[[Any], object] = eval(f"lambda {argument.partition(':')[0]}: {solution}")
    lines = []
    for given in (_argument(argument, rng, size) for size in (0, *(rng.randrange(1, 12) for _ in range(num_tests - 1)))):
        lines.append(f"    assert candidate({given!r}) == {function(given)!r}\n")
    head = f'def {name}({argument}):\n    """Return {returned.format(**values)}."""\n'
    test = f"def check(candidate):\n{''.join(lines)}"
    return {"prompt": head, "test": test, "entry_point": name, "canonical_solution": f"    return {solution}\n"}


def _argument(kind: str, rng: random.Random, size: int) -> list[int] | str | int:
    if kind == NUMBERS:
        return [rng.randrange(-20, 50) for _ in range(size)]
    if kind == TEXT:
        return " ".join(rng.choices(_WORDS, k=size))
    return rng.randrange(10**size) if size else 0
