"""Estimates over samples and problems against enumeration, scipy and published examples."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from grpo_trainer.evaluate.estimates import estimate, majority_at_k, paired_difference, pass_at_k


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples: int) -> None:
    for right in range(samples + 1):
        flags = [n < right for n in range(samples)]
        for k in range(1, samples + 1):
            hits = [any(chosen) for chosen in combinations(flags, k)]
            assert pass_at_k(right, samples, k) == pytest.approx(np.mean(hits), abs=1e-12)


def majority_by_enumeration(answers: list[str], right: set[str], k: int) -> float:
    def score(chosen: tuple[str, ...]) -> float:
        votes = Counter(answer for answer in chosen if answer)
        first = [answer for answer, count in votes.items() if count == max(votes.values())]
        return sum(answer in right for answer in first) / len(first) if first else 0.0

    return float(np.mean([score(chosen) for chosen in combinations(answers, k)]))


@given(st.lists(st.sampled_from(["", "3", "4", "5", "6"]), min_size=1, max_size=8), st.sets(st.sampled_from("3456")))
def test_majorities_are_counted_over_all_subsets(answers: list[str], right: set[str]) -> None:
    for k in range(1, len(answers) + 1):
        found = majority_at_k(answers, [answer in right for answer in answers], k)
        assert found == pytest.approx(majority_by_enumeration(answers, right, k), abs=1e-12)


def test_a_large_majority_is_counted_without_overflow() -> None:
    answers = ["7"] * 40 + ["8"] * 24
    assert majority_at_k(answers, [answer == "7" for answer in answers], 64) == pytest.approx(1.0)
    assert majority_at_k(answers, [answer == "7" for answer in answers], 1) == pytest.approx(40 / 64)


@pytest.mark.parametrize(("right", "total"), [(0, 9), (9, 9), (3, 9), (611, 1319)])
def test_shares_have_wilsons_interval(right: int, total: int) -> None:
    found = estimate([1.0] * right + [0.0] * (total - right))
    wilson = binomtest(right, total).proportion_ci(method="wilson")
    assert (found.mean, found.low, found.high) == pytest.approx((right / total, wilson.low, wilson.high), abs=1e-12)


def test_means_have_an_interval_over_problems() -> None:
    """As wide as the central limit theorem says; samples of a problem count as one."""
    values = np.random.default_rng(1).beta(0.5, 0.5, size=500)
    found = estimate(values.tolist())
    half = 1.96 * values.std() / np.sqrt(500)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert estimate(values.tolist()) == found


def table(both: int, one: int, other: int, neither: int) -> tuple[list[float], list[float]]:
    first = [1.0] * both + [1.0] * one + [0.0] * other + [0.0] * neither
    second = [1.0] * both + [0.0] * one + [1.0] * other + [0.0] * neither
    return first, second


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 0), (3, 9), (40, 22), (600, 500)])
def test_mcnemar_is_the_binomial_test_of_problems_won(won: int, lost: int) -> None:
    found = paired_difference(*table(10, lost, won, 10))
    assert (found.won, found.lost) == (won, lost)
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


# Newcombe (1998), table III, method 10: right with both, only the first, only the second, neither; first minus second.
TABLE_III = [
    ((36, 12, 2, 0), (0.0569, 0.3404)),
    ((20, 12, 2, 16), (0.0562, 0.3292)),
    ((18, 12, 2, 18), (0.0562, 0.3290)),
    ((36, 14, 0, 0), (0.1528, 0.4167)),
    ((35, 14, 0, 1), (0.1461, 0.4175)),
    ((18, 14, 0, 18), (0.1441, 0.3963)),
    ((2, 97, 1, 0), (0.8721, 0.9854)),
]


@pytest.mark.parametrize(("cells", "interval"), TABLE_III)
def test_paired_shares_have_newcombes_interval(cells: tuple[int, int, int, int], interval: tuple[float, float]) -> None:
    first, second = table(*cells)
    found = paired_difference(second, first)
    assert (found.low, found.high) == pytest.approx(interval, abs=6e-5)
    mirrored = paired_difference(first, second)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


def test_the_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Over all tables of 12 problems, each with its probability."""
    n, chances = 12, (0.35, 0.1, 0.25, 0.3)  # both, only the first, only the second, neither
    log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    covered = 0.0
    for both in range(n + 1):
        for one in range(n + 1 - both):
            for other in range(n + 1 - both - one):
                cells = (both, one, other, n - both - one - other)
                found = paired_difference(*table(*cells))
                if found.low <= chances[2] - chances[1] <= found.high:
                    covered += np.exp(log[n] + sum(c * np.log(p) - log[c] for c, p in zip(cells, chances)))
    assert 0.93 <= covered <= 0.99


def test_means_are_compared_problem_by_problem() -> None:
    rng = np.random.default_rng(2)
    easy = rng.random(400)  # problems differ far more than policies do
    one, other = np.clip(easy, 0.1, 0.8), np.clip(easy, 0.1, 0.8) + 0.05 * rng.random(400)
    found = paired_difference(one.tolist(), other.tolist())
    assert found.p is None
    assert (found.won, found.lost) == (400, 0)
    half = 1.96 * (other - one).std() / np.sqrt(400)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.15 * half)
