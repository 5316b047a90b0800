"""Arithmetic expressions: read by a parser of our own, calculated exactly, and never run as code."""

from __future__ import annotations

import operator
import re
from collections import Counter
from fractions import Fraction

__all__ = ["LONGEST", "calculate"]

LONGEST = 100  # characters; bounds the depth of parentheses, the size of the result and the time it takes
_TOKEN = re.compile(r"[0-9]{1,6}(?![0-9])|[-+*/()]")
_SIGNS = str.maketrans("×÷−", "*/-")
_OPERATORS = ({"+": operator.add, "-": operator.sub}, {"*": operator.mul, "/": operator.truediv})


def calculate(text: str) -> tuple[Fraction, Counter[int]] | None:
    """Calculate an expression of whole numbers, + - * / (or × ÷ −) and parentheses.

    Args:
        text: at most 100 characters; numbers have at most six digits, 0 to 9, and no sign.

    Returns:
        The exact value and how often each number is used; None if the text is anything else or divides by zero.
    """
    text = text.translate(_SIGNS)
    tokens = _TOKEN.findall(text) if len(text) <= LONGEST else []
    if "".join(tokens) != text.replace(" ", ""):
        return None
    numbers = Counter(int(token) for token in tokens if token.isdigit())
    tokens.reverse()
    try:
        value = _read(tokens, 0)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else (value, numbers)


def _read(tokens: list[str], level: int) -> Fraction:
    """Take a sum (level 0), a product (1) or a factor (2) off the end of the reversed tokens."""
    if level < len(_OPERATORS):
        value = _read(tokens, level + 1)
        while tokens and tokens[-1] in _OPERATORS[level]:
            value = _OPERATORS[level][tokens.pop()](value, _read(tokens, level + 1))
        return value
    token = tokens.pop()
    if token != "(":
        return Fraction(int(token))
    value = _read(tokens, 0)
    if tokens.pop() != ")":
        raise ValueError("every ( must have its )")
    return value
