"""Arithmetic expressions: read by a parser of our own, calculated exactly, and never run as code."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

__all__ = ["LONGEST", "ExpressionError", "Result", "calculate"]

LONGEST = 200  # characters; bounds the depth, the size of the result and the time it takes
_DEPTH = 20
_TOKEN = re.compile(r"\s*(?:([0-9]{1,6})(?![0-9])|([-+*/()]))")
_SIGNS = str.maketrans("×÷−", "*/-")


class ExpressionError(ValueError):
    """A text is not an expression, or it divides by zero."""


@dataclass(frozen=True)
class Result:
    """What an expression comes to.

    Args:
        value: exactly.
        numbers: how often each number is used.
    """

    value: Fraction
    numbers: Counter[int]


def calculate(text: str) -> Result:
    """Calculate an expression of whole numbers, + - * / (also × ÷ −) and parentheses.

    Args:
        text: at most 200 characters, parentheses at most 20 deep, numbers of at most six digits 0 to 9 and no sign.

    Returns:
        The result.

    Raises:
        ExpressionError: the text is anything else, or divides by zero.
    """
    if len(text) > LONGEST:
        raise ExpressionError(f"an expression must have at most {LONGEST} characters: got {len(text)}")
    parser = _Parser(_tokens(text.translate(_SIGNS).rstrip()))
    value = parser.sum(0)
    if parser.next() is not None:
        raise ExpressionError(f"an expression must end after its last number: got {parser.next()!r} there")
    return Result(value, parser.numbers)


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ExpressionError(
                f"an expression must hold numbers, + - * / and parentheses only: got {text[place:]!r}"
            )
        tokens.append(match[1] or match[2])
        place = match.end()
    return tokens


@dataclass
class _Parser:
    """Recursive descent: sums of products of atoms."""

    tokens: list[str]
    place: int = 0
    numbers: Counter[int] = field(default_factory=Counter)

    def next(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self) -> str:
        token = self.next()
        if token is None:
            raise ExpressionError("an expression must not end before its last number")
        self.place += 1
        return token

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value += sign * self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.next() in ("*", "/"):
            divides = self.take() == "/"
            factor = self.atom(depth)
            if divides and factor == 0:
                raise ExpressionError("an expression must not divide by zero")
            value = value / factor if divides else value * factor
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.take()
        if token == "(":
            if depth == _DEPTH:
                raise ExpressionError(f"parentheses must be at most {_DEPTH} deep")
            value = self.sum(depth + 1)
            if self.take() != ")":
                raise ExpressionError("every ( must have its )")
            return value
        if not token.isdecimal():
            raise ExpressionError(f"an expression must have a number or ( here: got {token!r}")
        self.numbers[int(token)] += 1
        return Fraction(int(token))
