"""Countdown problems: two to four small numbers and a target that they reach; train and test share none."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grpo_trainer.task import Split

__all__ = ["Term", "combine", "generate", "split_of", "stream"]

_NUMBERS = range(1, 11)  # the small numbers of the television game
_LARGEST = 20  # of targets and of what is calculated on the way


@dataclass(frozen=True)
class Term:
    """A number, or two terms joined by an operator (`parts`)."""

    value: int
    text: str
    working: tuple[str, ...] = ()  # every calculation, in the order they are done
    parts: tuple[Term, str, Term] | None = None

    @property
    def solution(self) -> str:
        """The term as a completion: its working, then the expression."""
        return "\n".join([*self.working, f"answer: {self.text}"])


def generate(split: Split, count: int) -> dict[str, Term]:
    """Make distinct questions, each with a term that solves it; fewer of them are a prefix of more."""
    solved: dict[str, Term] = {}
    for question, term in stream(split):
        solved.setdefault(question, term)
        if len(solved) == count:
            break
    return solved


def stream(split: Split, *, seed: int = 0) -> Iterator[tuple[str, Term]]:
    """Make questions with their terms without end; one that comes again may be solved otherwise."""
    rng = random.Random(f"grpo-countdown/{split}/{seed}")
    while True:
        numbers = sorted(rng.sample(_NUMBERS, rng.randint(2, 4)), reverse=True)
        term = _draw(numbers, rng)
        if term is not None and term.value not in numbers and split_of(numbers, term.value) == split:
            yield f"Reach {term.value} from {', '.join(map(str, numbers))}. Use each number at most once.", term


def split_of(numbers: Sequence[int], target: int) -> Split:
    """Say which split a problem belongs to, whatever the order of its numbers; one in eight is for testing."""
    key = f"{sorted(numbers)} {target}"
    return "test" if zlib.crc32(key.encode()) % 8 == 0 else "train"


def combine(left: Term, operator: str, right: Term) -> Term | None:
    """Join two terms; None where the result is no whole number from 1 to the largest allowed."""
    if operator in "+*" and left.value < right.value:
        left, right = right, left
    a, b = left.value, right.value
    value = {"+": a + b, "-": a - b, "*": a * b, "/": 0 if a % b else a // b}[operator]
    if not 1 <= value <= _LARGEST:
        return None
    first = _bracketed(left) if operator in "*/" else left.text
    second = right.text if operator == "+" else _bracketed(right, products=operator == "/")
    working = *left.working, *right.working, f"{a}{operator}{b}={value}"
    return Term(value, f"{first}{operator}{second}", working, (left, operator, right))


def _bracketed(term: Term, *, products: bool = False) -> str:
    needed = term.parts is not None and (products or term.parts[1] in "+-")
    return f"({term.text})" if needed else term.text


def _draw(numbers: Sequence[int], rng: random.Random) -> Term | None:
    """Join some of the numbers at random; None where two of them cannot be joined."""
    terms = [Term(number, str(number)) for number in rng.sample(numbers, rng.randint(2, len(numbers)))]
    while len(terms) > 1:
        left, right = terms.pop(), terms.pop()
        # To multiply or divide by 1 is a step without effect.
        operators = "+-" if 1 in (left.value, right.value) else "+-*/"
        joined = {operator: term for operator in operators if (term := combine(left, operator, right)) is not None}
        if not joined:
            return None
        # Two numbers can nearly always be added: drawn evenly, most problems would be sums.
        weights = [1 if operator == "+" else 2 for operator in joined]
        terms.insert(rng.randrange(len(terms) + 1), rng.choices(list(joined.values()), weights)[0])
    return terms[0]
