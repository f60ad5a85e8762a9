"""Tools: their schemas, what a wrong call is told, and hostile expressions."""

from __future__ import annotations

import asyncio
import time
from fractions import Fraction
from typing import Literal

import pytest

from envs.expressions import evaluate
from envs.tools import ToolError, call, schema


class Shop:
    """Methods are tools as functions are."""

    def __init__(self) -> None:
        self.sold: list[tuple[str, int]] = []

    def sell(self, item: str, count: int = 1, size: Literal["small", "large"] = "small") -> str:
        """Sell something.

        Args:
            item: What is sold
            count: How many of it
            size: Of each

        Returns:
            A receipt
        """
        self.sold.append((item, count))
        return f"{count} {size} {item}"

    async def prices(self, items: list[str]) -> dict[str, float]:
        """Look up prices.

        Args:
            items: Names
        """
        await asyncio.sleep(0)
        return dict.fromkeys(items, 1.5)

    def closes(self) -> None:
        """Close the shop."""
        raise SystemExit(1)

    def ends(self) -> None:
        """Come to an end."""
        raise StopIteration

    def asks_back(self) -> None:
        """Refuse in its own words."""
        raise ToolError("failed", "come back tomorrow")

    def lists(self, count: int) -> str:
        """List things.

        Args:
            count: Of characters
        """
        return "a" * (count // 2) + "z" * (count // 2)


def use(name: str, arguments, shop: Shop | None = None, **options) -> str:
    shop = shop or Shop()
    tools = [shop.sell, shop.prices, shop.closes, shop.ends, shop.asks_back, shop.lists]
    return asyncio.run(call(tools, name, arguments, **options))


def refusal(name: str, arguments) -> tuple[str, str]:
    with pytest.raises(ToolError) as caught:
        use(name, arguments)
    return caught.value.kind, str(caught.value)


def test_a_schema_comes_from_signature_and_docstring():
    assert schema(Shop().sell) == {
        "type": "function",
        "function": {
            "name": "sell",
            "description": "Sell something.",
            "parameters": {
                "type": "object",
                "properties": {
                    "item": {"type": "string", "description": "What is sold"},
                    "count": {"type": "integer", "description": "How many of it"},
                    "size": {"type": "string", "enum": ["small", "large"], "description": "Of each"},
                },
                "required": ["item"],
            },
        },
    }


def test_a_function_that_says_too_little_is_no_tool():
    def silent(a: int) -> int:
        return a

    def untyped(a):
        """Do it."""

    with pytest.raises(ValueError, match=r"silent cannot be a tool: .* no docstring"):
        schema(silent)
    with pytest.raises(ValueError, match="untyped cannot be a tool: Argument a is missing a type hint"):
        schema(untyped)


def test_calls_run_and_give_text():
    shop = Shop()
    assert use("sell", {"item": "tea", "count": 2}, shop) == "2 small tea"
    assert use("sell", '{"item": "tea", "count": "3", "size": "large"}', shop) == "3 large tea"
    assert use("sell", {"item": 7}, shop) == "1 small 7"
    assert shop.sold == [("tea", 2), ("tea", 3), ("7", 1)]
    assert use("prices", {"items": ["tea"]}) == '{"tea": 1.5}'


def test_a_long_result_loses_its_middle():
    text = use("lists", {"count": 10_000})
    assert text == "a" * 2000 + "\n[... 6000 characters left out ...]\n" + "z" * 2000
    assert use("lists", {"count": 10}, limit=4) == "aa\n[... 6 characters left out ...]\nzz"
    assert use("lists", {"count": 4000}) == "a" * 2000 + "z" * 2000


SELL = "it takes item: str, count: int = 1, size: Literal['small', 'large'] = 'small'"
BAD_CALLS = [
    ("sel", {}, "unknown_tool",
     "unknown tool 'sel' (did you mean 'sell'?); tools: sell, prices, closes, ends, asks_back, lists"),
    ("sell", {}, "bad_arguments", f"sell: argument 'item' is missing; {SELL}"),
    ("sell", {"itme": "tea"}, "bad_arguments", f"sell: no argument 'itme' (did you mean 'item'?); {SELL}"),
    ("sell", {"item": "tea", "count": "three"}, "bad_arguments", "sell: argument 'count' should be int, got 'three'"),
    ("sell", {"item": "tea", "count": 1.5}, "bad_arguments", "sell: argument 'count' should be int, got 1.5"),
    ("sell", {"item": None}, "bad_arguments", "sell: argument 'item' should be str, got None"),
    ("sell", {"item": "tea", "size": "huge"}, "bad_arguments",
     "sell: argument 'size' should be Literal['small', 'large'], got 'huge'"),
    ("prices", {"items": "tea"}, "bad_arguments", "prices: argument 'items' should be list[str], got 'tea'"),
    ("prices", {"items": ["tea", {}]}, "bad_arguments", "prices: argument 'items' should be list[str], got ['tea', {}]"),
    ("sell", '{"item": "tea"', "bad_arguments", "sell: arguments are not JSON: '{\"item\": \"tea\"'"),
    ("sell", ["tea"], "bad_arguments", "sell: arguments should be an object of names and values, got ['tea']"),
    ("sell", "[" * 100_000, "bad_arguments", "sell: arguments are not JSON: '" + "[" * 76 + "..."),
    ("closes", {"now": True}, "bad_arguments", "closes: no argument 'now'; it takes none"),
    ("closes", None, "failed", "closes failed: SystemExit: 1"),
    ("ends", "", "failed", "ends failed: StopIteration"),
    ("asks_back", {}, "failed", "come back tomorrow"),
    ("lists", {"count": 10**5000}, "failed", "lists failed: OverflowError: cannot fit 'int' into an index-sized integer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "kind", "said"), BAD_CALLS)
def test_a_wrong_call_is_told_what_is_wrong_in_one_line(name, arguments, kind, said):
    assert refusal(name, arguments) == (kind, said)


def test_without_tools_every_call_is_unknown():
    with pytest.raises(ToolError, match=r"^unknown tool 'add'; there are no tools$"):
        asyncio.run(call([], "add", {}))


# ---- expressions

VALUES = [
    ("347 * 829", 287663), ("(12 + 3) * 4 - -2", 62), ("7 / 2", Fraction(7, 2)), ("0.1 + 0.2", Fraction(3, 10)),
    ("-7 // 2", -4), ("7 % 4", 3), ("2 ** 10", 1024), ("2^10", 1024), ("2 ** -2", Fraction(1, 4)), ("9 ** 0.5", 3),
    ("1,234 × 2", 2468), ("[1 + 2] ÷ 3 =", 1), ("1 ** 99999999999", 1), ("(-1) ** 99999999999", -1), ("0 ** 9999999999", 0),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "value"), VALUES)
def test_expressions_are_exact(expression, value):
    assert evaluate(expression) == value


HOSTILE = [
    ("9**9**9", "'9**9**9' is too large"),
    ("((9**99)**99)**99", "'((9**99)**99)**99' is too large"),
    ("*".join(["9**999"] * 20), "'9**999*9**999*9**999*9**999*9**999*9*...' is too large"),
    ("0.9**99999999999", "'0.9**99999999999' is too large"),
    ("2**0.5**-99999", "'2**0.5**-99999' is too large"),
    ("(-8) ** 0.5", "'(-8) ** 0.5' is not complete arithmetic"),
    ("9" * 201, "'" + "9" * 37 + "...' has 201 characters, more than 200"),
    ("(" * 190 + "1", "'" + "(" * 37 + "...' is not complete arithmetic"),
    ("(" * 99 + "1" + ")" * 99, None),
    ("-" * 199 + "1", None),
    ("1/0", "'1/0' divides by zero"),
    ("0 ** -1", "'0 ** -1' divides by zero"),
    ("1 2", "'1 2' is not complete arithmetic"),
    ("5(3)", "'5(3)' is not complete arithmetic"),
    ("1 +", "'1 +' is not complete arithmetic"),
    ("()", "'()' is not complete arithmetic"),
    ("...", "'...' is not complete arithmetic"),
    ("", "'' is not arithmetic: use numbers, + - * / // % ** and brackets only"),
    ("x + 1", "'x + 1' is not arithmetic: use numbers, + - * / // % ** and brackets only"),
    ("__import__('os')", '"__import__(\'os\')" is not arithmetic: use numbers, + - * / // % ** and brackets only'),
    ("1\x00", "'1\\x00' is not arithmetic: use numbers, + - * / // % ** and brackets only"),
]


@pytest.mark.parametrize(("expression", "said"), HOSTILE)
def test_a_hostile_expression_is_answered_at_once(expression, said):
    start = time.monotonic()
    if said is None:
        assert abs(evaluate(expression)) == 1
    else:
        with pytest.raises(ValueError) as caught:
            evaluate(expression)
        assert str(caught.value) == said
    assert time.monotonic() - start < 0.5
