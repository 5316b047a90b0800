"""Countdown problems: two to four small numbers, and a target that two of them reach; train and test share none."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from grpo_trainer.task import Split

__all__ = ["MOST", "Countdown", "calculations", "generate", "split_of", "stream"]

_NUMBERS = range(1, 13)
MOST: Mapping[Split, int] = {"train": 5_086, "test": 740}  # different problems that there are
_LARGEST = 20  # of targets and of what is calculated on the way


@dataclass(frozen=True)
class Countdown:
    """A problem.

    Args:
        numbers: two to four different ones, in falling order.
        target: what to reach; none of the numbers.
    """

    numbers: tuple[int, ...]
    target: int

    @property
    def question(self) -> str:
        """The text put to the policy."""
        return f"Reach {self.target} from {', '.join(map(str, self.numbers))}. Use each number at most once."

    @property
    def solution(self) -> str:
        """A completion that is right."""
        text = next(text for text, value in calculations(self.numbers).items() if value == self.target)
        return f"{text}={self.target} {self.target}? yes\nanswer: {text}"


def generate(split: Split, count: int) -> list[Countdown]:
    """Make distinct problems, at most ``MOST[split]``; fewer of them are a prefix of more."""
    problems: dict[Countdown, None] = {}
    for problem in stream(split):
        problems[problem] = None
        if len(problems) == count:
            break
    return list(problems)


def stream(split: Split, *, seed: int = 0) -> Iterator[Countdown]:
    """Make problems without end; one may come again."""
    rng = random.Random(f"grpo-countdown/{split}/{seed}")
    while True:
        numbers = tuple(sorted(rng.sample(_NUMBERS, rng.randint(2, 4)), reverse=True))
        target = rng.choice(list(calculations(numbers).values()))
        if target not in numbers and split_of(numbers, target) == split:
            yield Countdown(numbers, target)


def split_of(numbers: Sequence[int], target: int) -> Split:
    """Say which split a problem belongs to, whatever the order of its numbers; one in eight is for testing."""
    key = f"{sorted(numbers)} {target}"
    return "test" if zlib.crc32(key.encode()) % 8 == 0 else "train"


def calculations(numbers: Sequence[int]) -> dict[str, int]:
    """Every calculation with two of the numbers that comes to a small positive one, and what it comes to."""
    results: dict[str, int] = {}
    for b, a in combinations(sorted(numbers), 2):
        results |= {f"{a}+{b}": a + b, f"{a}-{b}": a - b, f"{a}*{b}": a * b}
        if a % b == 0:
            results[f"{a}/{b}"] = a // b
    # To multiply or divide by 1 is a step without effect.
    return {text: value for text, value in results.items() if 1 <= value <= _LARGEST and text[-2:] not in ("*1", "/1")}
