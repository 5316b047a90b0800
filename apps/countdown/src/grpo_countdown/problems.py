"""Countdown problems: two to four small numbers and a target that they reach; train and test share none."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from grpo_trainer.task import Split

__all__ = ["Countdown", "Term", "combine", "generate", "solution", "split_of", "stream"]

OPERATORS = "+-*/"
_NUMBERS = range(1, 11)  # the small numbers of the television game
_LARGEST = 20  # of targets and of what is calculated on the way
_TEST_SHARE = 8  # one problem in eight belongs to the test split


@dataclass(frozen=True)
class Term:
    """A number, or two terms joined by an operator.

    Args:
        value: what it comes to.
        text: how it is written, with no more parentheses than it needs.
        sums: whether its outermost operator is + or -, so that it needs parentheses within a product.
        products: whether its outermost operator is * or /.
        calculation: the last calculation, such as ``21-8=13``; empty for a number.
        parts: the terms that were joined and their operator; None for a number.
    """

    value: int
    text: str
    sums: bool = False
    products: bool = False
    calculation: str = ""
    parts: tuple[Term, str, Term] | None = None

    def working(self) -> list[str]:
        """Every calculation, in the order they are done."""
        if self.parts is None:
            return []
        left, _, right = self.parts
        return [*left.working(), *right.working(), self.calculation]


@dataclass(frozen=True)
class Countdown:
    """A problem and one of its solutions.

    Args:
        numbers: two to four different ones, in falling order.
        target: what to reach; none of the numbers.
        solution: a term that uses each number at most once and comes to the target.
    """

    numbers: tuple[int, ...]
    target: int
    solution: Term

    @property
    def question(self) -> str:
        """The text put to the policy."""
        return f"Reach {self.target} from {', '.join(map(str, self.numbers))}. Use each number at most once."

    @property
    def answer(self) -> str:
        """The solution, worked out."""
        return solution(self.solution)


def solution(term: Term) -> str:
    """Write a term as a completion: every calculation, then the expression."""
    return "\n".join([*term.working(), f"answer: {term.text}"])


def generate(split: Split, count: int) -> list[Countdown]:
    """Make distinct problems; fewer of them is a prefix of more."""
    return list(islice(stream(split), count))


def stream(split: Split, *, seed: int = 0, repeat: bool = False) -> Iterator[Countdown]:
    """Make problems without end.

    Args:
        split: which problems may come.
        seed: another seed gives other problems, or the same ones in another order and solved otherwise.
        repeat: whether a problem may come again.
    """
    rng = random.Random(f"grpo-countdown/{split}/{seed}")
    seen: set[tuple[tuple[int, ...], int]] = set()
    while True:
        numbers = tuple(sorted(rng.sample(_NUMBERS, rng.randint(2, 4)), reverse=True))
        solution = _draw(numbers, rng)
        if solution is None or solution.value in numbers:
            continue
        key = numbers, solution.value
        if split_of(*key) == split and (repeat or key not in seen):
            seen.add(key)
            yield Countdown(*key, solution)


def split_of(numbers: tuple[int, ...], target: int) -> Split:
    """Say which split a problem belongs to, whatever the order of its numbers."""
    key = f"{sorted(numbers)} {target}"
    return "test" if zlib.crc32(key.encode()) % _TEST_SHARE == 0 else "train"


def combine(left: Term, operator: str, right: Term) -> Term | None:
    """Join two terms; None where the result is no whole number from 1 to the largest allowed."""
    if operator in "+*" and left.value < right.value:
        left, right = right, left
    if operator == "/":
        value = left.value // right.value if left.value % right.value == 0 else 0
    else:
        a, b = left.value, right.value
        value = a + b if operator == "+" else a - b if operator == "-" else a * b
    if not 1 <= value <= _LARGEST:
        return None
    first = f"({left.text})" if left.sums and operator in "*/" else left.text
    bare = operator == "+" or (operator == "-" and not right.sums) or (operator == "*" and not right.sums)
    bare = bare or not (right.sums or right.products)
    second = right.text if bare else f"({right.text})"
    return Term(
        value,
        f"{first}{operator}{second}",
        sums=operator in "+-",
        products=operator in "*/",
        calculation=f"{left.value}{operator}{right.value}={value}",
        parts=(left, operator, right),
    )


def _draw(numbers: tuple[int, ...], rng: random.Random) -> Term | None:
    """Join some of the numbers at random; None where two of them cannot be joined."""
    terms = [Term(number, str(number)) for number in rng.sample(numbers, rng.randint(2, len(numbers)))]
    while len(terms) > 1:
        left, right = terms.pop(), terms.pop()
        # To multiply or divide by 1 is a step without effect.
        operators = "+-" if 1 in (left.value, right.value) else OPERATORS
        joined = [term for operator in operators if (term := combine(left, operator, right)) is not None]
        if not joined:
            return None
        # Two numbers can nearly always be added: drawn evenly, most problems would be sums.
        weights = [1 if term.parts[1] == "+" else 2 for term in joined]
        terms.insert(rng.randrange(len(terms) + 1), rng.choices(joined, weights)[0])
    return terms[0]
