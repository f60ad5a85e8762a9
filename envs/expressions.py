"""Arithmetic as text, evaluated exactly and within bounds: whatever is asked for, the answer comes in milliseconds."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_BITS = 4096  # of a numerator or denominator: some 1,200 digits
_MEANT = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_ALLOWED = re.compile(r"[0-9.+\-*/%() ]*")
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def evaluate(expression: str) -> Fraction:
    """The value of numbers, + - * / // % ** and brackets. ValueError in one line for anything else and beyond the bounds."""
    shown = repr(expression if len(expression) <= 40 else expression[:37] + "...")
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"{shown} has {len(expression)} characters, more than {MAX_CHARACTERS}")
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", expression.translate(_MEANT).replace("^", "**")).strip()
    text = re.sub(r"\s+", " ", text.removesuffix("=").rstrip())
    if not text or not _ALLOWED.fullmatch(text):
        raise ValueError(f"{shown} is not arithmetic: use numbers, + - * / // % ** and brackets only")
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError):  # of the parser: incomplete, or nested too deep
        raise ValueError(f"{shown} is not complete arithmetic") from None
    except ZeroDivisionError:
        raise ValueError(f"{shown} divides by zero") from None
    except OverflowError:
        raise ValueError(f"{shown} is too large") from None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return _bounded(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        return _bounded(Fraction(_BINARY[type(node.op)](left, right)))  # both are bounded: one product is cheap
    raise SyntaxError  # two numbers in a row, brackets around nothing or called


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        root = float(base) ** float(exponent)
        if isinstance(root, complex):
            raise SyntaxError
        return Fraction(repr(root))
    if abs(base) not in (0, 1) and _bits(base) * abs(exponent) > MAX_BITS:
        raise OverflowError
    return Fraction(base**exponent.numerator)


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise OverflowError
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
