"""Preference pairs made from generated problems: the worked solution, and the same solution with one thing wrong.

Three kinds of wrong: `final`, the answer line contradicts the last step; `step`, a step is left out; `operand`, a number in a
step is replaced by another number of the problem. In each row one kind, in turn where the solution allows it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from cookbook.generated import SEED, gsm_symbolic

NUMBER = re.compile(r"\d+(?:\.\d+)?")
PRODUCT_OR_SUM = re.compile(r"(\d+(?:\.\d+)?)(\s*[-+*/x]\s*)(\d+(?:\.\d+)?)")  # the first operation of a step


def gsm_symbolic_pairs(size: int) -> list[dict[str, object]]:
    """`size` rows {"prompt": messages, "chosen": messages, "rejected": messages, "kind"}."""
    return [pair(str(row["question"]), str(row["answer"]), i) for i, row in enumerate(gsm_symbolic(size))]


def pair(question: str, answer: str, index: int) -> dict[str, object]:
    """The pair of problem `index`: of the three kinds the first that its solution allows, from kind `index % 3` on."""
    rng = random.Random(f"pair {SEED} {index} {question}")
    names = list(KINDS)
    for kind in (names[(index + turn) % len(names)] for turn in range(len(names))):
        wrong = KINDS[kind](question, answer, rng)
        if wrong is not None and wrong != answer:
            return {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": answer}],
                "rejected": [{"role": "assistant", "content": wrong}],
                "kind": kind,
            }
    raise AssertionError(f"no way to spoil {answer!r}")  # `final` always finds one


def wrong_final(question: str, answer: str, rng: random.Random) -> str:
    """Another number in the answer line, near the right one and of the same form."""
    steps, _, final = answer.rpartition("\n")
    old = NUMBER.search(final)
    assert old is not None
    value = float(old[0])
    off = rng.choice([1, 2, 3, 5, 10, max(1, round(value / 10)), max(1, round(value / 2))])
    new = value + off if value < off or rng.random() < 0.5 else value - off
    text = f"{new:.1f}" if "." in old[0] else f"{new:.0f}"
    return f"{steps}\n{final[: old.start()]}{text}{final[old.end() :]}"


def dropped_step(question: str, answer: str, rng: random.Random) -> str | None:
    """Without one of the steps before the last one."""
    *steps, last, final = answer.splitlines()
    if not steps:
        return None
    left_out = rng.randrange(len(steps))
    return "\n".join([*steps[:left_out], *steps[left_out + 1 :], last, final])


def swapped_operand(question: str, answer: str, rng: random.Random) -> str | None:
    """A step that reckons with another number of the problem; its result stays."""
    lines = answer.splitlines()
    numbers = list(dict.fromkeys(NUMBER.findall(question)))
    places = [(i, found) for i, line in enumerate(lines[:-1]) if (found := PRODUCT_OR_SUM.search(line))]
    if not places:
        return None
    index, found = rng.choice(places)
    group = rng.choice((1, 3))
    others = [number for number in numbers if number not in (found[1], found[3])]
    if not others:
        return None
    start, end = found.span(group)
    lines[index] = lines[index][:start] + rng.choice(others) + lines[index][end:]
    return "\n".join(lines)


KINDS: dict[str, Callable[[str, str, random.Random], str | None]] = {
    "final": wrong_final,
    "step": dropped_step,
    "operand": swapped_operand,
}
