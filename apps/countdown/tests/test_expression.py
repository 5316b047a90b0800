"""Expressions: exact values, and no text that does harm."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_countdown.expression import LONGEST, calculate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("3+7*2", 17),
        ("(3+7)*2", 20),
        ("10-4-3", 3),
        ("10-(4-3)", 9),
        ("24/4/3", 2),
        ("24/(4/2)", 12),
        ("5/2*4", 10),
        ("8/3", Fraction(8, 3)),
        ("1/3+1/3+1/3", 1),
        ("0*5", 0),
        (" ( 3 + 7 ) * 2 ", 20),
        ("3×7−8÷2", 17),
        ("2-5", -3),
        ("((((4))))", 4),
    ],
)  # fmt: skip
def test_values_are_exact(text: str, value: int | Fraction) -> None:
    result = calculate(text)
    assert result is not None
    assert result[0] == value


def test_numbers_are_counted() -> None:
    assert calculate("(3+7)*3") == (30, Counter({3: 2, 7: 1}))
    assert calculate("37+3") == (40, Counter({37: 1, 3: 1}))


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "3+", "*3", "3 7", "3(7)", "(3+7", "3+7)", "3++7", "-3+7", "+3", "3*-7",
        "9**9", "9**9**9", "9^9", "9e9", "9E99999999", "1.5", "1,000", "0x10", "1_000", "3!", "3%2", "3//2", "1<<9",
        "5/0", "5/(3-3)", "0/0",
        "٣+٤", "３+７", "²+1", "Ⅷ", "3＋7",
        "1234567", "0000000", "9" * 100,
        "abs(3)", "__import__('os')", "3;7", "3=3", "3+7=10", "3+7#", "3\x00+7", "lambda: 3", "3 if 1 else 2",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    assert calculate(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "(" * 99 + "1" + ")" * 99,
        "(" * 50 + "1" + ")" * 50,
        "(" * 5_000 + "1" + ")" * 5_000,
        "(" * LONGEST,
        "1+" * 5_000 + "1",
        " " * 10_000,
        "9" * 10_000,
        "9*" * 5_000 + "9",
    ],
    ids=["nested", "just too long", "deeply nested", "open", "long", "blank", "one number", "product"],
)
def test_length_and_depth_are_bounded(text: str) -> None:
    assert calculate(text) is None


def test_the_largest_result_is_small() -> None:
    """No text comes to more than a product of the largest numbers that fit: there is no power to write."""
    product = "*".join(["999999"] * 14)
    assert len(product) <= LONGEST
    assert calculate(product) == (999_999**14, Counter({999_999: 14}))


def test_the_deepest_expression_is_read() -> None:
    assert calculate("(" * 49 + "1" + ")" * 49) == (1, Counter({1: 1}))


@given(st.text(st.sampled_from("0123456789+-*/() ×÷−.e"), max_size=60))
def test_agrees_with_python_on_what_both_read(text: str) -> None:
    """Python's own arithmetic on fractions is the oracle for whatever the parser accepts."""
    result = calculate(text)
    if result is None:
        return
    value, numbers = result
    tokens = Counter(int(number) for number in "".join(c if c.isdigit() else " " for c in text).split())
    assert numbers == tokens
    exact = "".join(f"Fraction({run})" if run.isdigit() else run for run in _runs(text))
    assert value == eval(exact.translate(str.maketrans("×÷−", "*/-")), {"Fraction": Fraction})  # noqa: S307


def _runs(text: str) -> list[str]:
    """Digits together without leading zeros, all else character by character."""
    runs: list[str] = []
    for char in text.strip():
        if char.isdigit() and runs and runs[-1].isdigit():
            runs[-1] += char
        else:
            runs.append(char)
    return [str(int(run)) if run.isdigit() else run for run in runs]
