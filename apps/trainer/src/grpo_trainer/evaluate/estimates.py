"""What several samples of each problem say of a policy, and the difference between two policies, with uncertainty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_trainer.evaluate.accuracy import Accuracy

__all__ = ["Difference", "Estimate", "estimate", "majority_at_k", "paired_difference", "pass_at_k"]

_RESAMPLES = 10_000
_AT_ONCE = 2_000_000  # numbers of the resamples in memory


@dataclass(frozen=True)
class Estimate:
    """A mean over problems.

    Args:
        mean: in [0, 1].
        low, high: 95 % interval.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Difference:
    """One policy against another on the same problems.

    Args:
        mean: the other's mean minus the one's, in [-1, 1].
        low, high: 95 % interval.
        won: problems at which the other is better.
        lost: problems at which it is worse.
        p: two-sided p-value of McNemar's exact test; None where the values are not only 0 and 1.
    """

    mean: float
    low: float
    high: float
    won: int
    lost: int
    p: float | None

    def __str__(self) -> str:
        test = "" if self.p is None else f", McNemar p = {self.p:.2g}"
        return (
            f"{100 * self.mean:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f}), "
            f"{self.won} won, {self.lost} lost{test}"
        )


def pass_at_k(right: int, samples: int, k: int) -> float:
    """The probability that at least one of k samples is right, without bias.

    Args:
        right: right samples.
        samples: all samples, at least k.
        k: at least 1.

    Source: Chen et al. (2021), Evaluating large language models trained on code, equation 1.
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str], right: Sequence[bool], k: int) -> float:
    """The probability that the most frequent answer of k samples is right, over all ways to choose k of them.

    A sample without an answer has no vote. Of n answers with equally many votes, each is chosen with probability 1/n.

    Args:
        answers: as read from each sample; empty where none was found.
        right: whether each is right; equal answers are equally right.
        k: from 1 to the number of samples.
    """
    votes = Counter(answer for answer in answers if answer)
    silent = len(answers) - votes.total()
    correct = {answer for answer, is_right in zip(answers, right) if answer and is_right}
    return sum(
        _wins(votes[answer], [count for other, count in votes.items() if other != answer], silent, k)
        for answer in correct
    )


def _wins(own: int, others: Sequence[int], silent: int, k: int) -> float:
    """The probability that an answer with `own` votes wins."""
    ways = 0.0
    for votes in range(1, min(own, k) + 1):
        # Ways to choose further samples so that nobody has more votes: [answers with as many, samples chosen].
        rivals = np.zeros((k // votes, k - votes + 1))
        rivals[0, 0] = 1.0
        for count in others:
            chosen = np.zeros_like(rivals)
            for some in range(min(count, votes, k - votes) + 1):
                tied = int(some == votes)
                part = rivals[: len(rivals) - tied, : rivals.shape[1] - some]
                chosen[tied:, some:] += math.comb(count, some) * part
            rivals = chosen
        for some in range(min(silent, k - votes) + 1):
            tied = rivals[:, k - votes - some] / np.arange(1, len(rivals) + 1)
            ways += math.comb(own, votes) * math.comb(silent, some) * float(tied.sum())
    return ways / math.comb(own + sum(others) + silent, k)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over problems.

    The interval is Wilson's where all values are 0 or 1, and otherwise the percentile bootstrap's over problems, with
    a fixed seed: the samples of one problem are not independent, problems are.

    Args:
        values: one in [0, 1] for each problem.
    """
    array = np.asarray(values, float)
    low, high = Accuracy(int(array.sum()), len(array)).interval if _binary(array) else _bootstrap(array)
    return Estimate(float(array.mean()), low, high)


def paired_difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """The difference between two policies, problem by problem.

    The interval is Newcombe's where all values are 0 or 1, and otherwise the percentile bootstrap's over problems.

    Args:
        one: of the first policy, a value in [0, 1] for each problem.
        other: of the second, for the same problems.

    Source: Newcombe (1998), Improved confidence intervals for the difference between binomial proportions based on
        paired data, method 10. McNemar (1947), in its exact form.
    """
    a, b = np.asarray(one, float), np.asarray(other, float)
    won, lost = int((b > a).sum()), int((b < a).sum())
    p = None
    if _binary(a) and _binary(b):
        low, high = _newcombe(int((a * b).sum()), won, lost, int(((1 - a) * (1 - b)).sum()))
        tail = sum(math.comb(won + lost, count) for count in range(min(won, lost) + 1))
        p = min(1.0, tail / 2 ** (won + lost - 1)) if won + lost else 1.0
    else:
        low, high = _bootstrap(b - a)
    return Difference(float(b.mean() - a.mean()), low, high, won, lost, p)


def _newcombe(both: int, won: int, lost: int, neither: int) -> tuple[float, float]:
    total = both + won + lost + neither
    ours, theirs = Accuracy(both + won, total), Accuracy(both + lost, total)
    (low, high), (their_low, their_high) = ours.interval, theirs.interval
    margins = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    surplus = both * neither - won * lost
    surplus = max(0.0, surplus - total / 2) if surplus > 0 else surplus
    correlation = surplus / math.sqrt(margins) if margins else 0.0

    def reach(mine: float, others: float) -> float:
        return math.sqrt(max(0.0, mine**2 - 2 * correlation * mine * others + others**2))

    mean = ours.share - theirs.share
    down = reach(ours.share - low, their_high - theirs.share)
    up = reach(high - ours.share, theirs.share - their_low)
    return max(-1.0, mean - down), min(1.0, mean + up)


def _bootstrap(values_P: np.ndarray) -> tuple[float, float]:
    """Source: Efron (1979), Bootstrap methods; the percentile interval."""
    rng, count = np.random.default_rng(0), len(values_P)
    chunk = max(1, _AT_ONCE // count)
    means = [
        values_P[rng.integers(count, size=(min(chunk, _RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, _RESAMPLES, chunk)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _binary(values_P: np.ndarray) -> bool:
    return bool(np.isin(values_P, (0.0, 1.0)).all())
