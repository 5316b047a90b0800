"""A share of right answers with the uncertainty it comes with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_trainer.evaluate.estimates import Difference

__all__ = ["Accuracy", "verdict"]

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of all.

    Args:
        correct: problems answered rightly.
        total: problems asked, at least 1.
    """

    correct: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total or self.total < 1:
            raise ValueError(f"need 0 <= correct <= total and total >= 1: got {self.correct} of {self.total}")

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share.

        Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
        """
        n, p, z2 = self.total, self.share, _Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
        low = 0.0 if self.correct == 0 else max(0.0, centre - half)
        high = 1.0 if self.correct == self.total else min(1.0, centre + half)
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} ({low:.1%} to {high:.1%}, {self.correct} of {self.total})"


def verdict(steps: int, accuracy: Mapping[str, Any], seconds: float, *, paired: Difference | None = None) -> str:
    """The last line of a run: what was learned, and in what time.

    Args:
        steps: that the run took.
        accuracy: evaluations named `before` and `after`, with `correct` and `total`.
        seconds: that the run took.
        paired: `after` against `before`, problem by problem.

    Returns:
        One line.
    """
    before, after = (
        Accuracy(accuracy[when]["correct"], accuracy[when]["total"]) if when in accuracy else None
        for when in ("before", "after")
    )
    took = f"{steps} steps in {seconds:.0f} s"
    if before is None or after is None:
        return f"{took}; held-out accuracy {after or before or 'not measured (eval.before, eval.after are off)'}"
    gain = paired or f"{100 * (after.share - before.share):+.1f} points"
    return f"{took}; held-out accuracy before {before}, after {after}: {gain}"
