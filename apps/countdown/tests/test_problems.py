"""The generator: solvable problems, disjoint splits."""

from itertools import combinations, islice

import pytest

from grpo_countdown.expression import calculate
from grpo_countdown.problems import MOST, Countdown, calculations, generate, split_of, stream
from grpo_countdown.task import TASK
from grpo_trainer.data.sources import DataError


@pytest.fixture(scope="module")
def train() -> list[Countdown]:
    return generate("train", 2_000)


@pytest.fixture(scope="module")
def test() -> list[Countdown]:
    return generate("test", 300)


def keys(problems: list[Countdown]) -> set[tuple[frozenset[int], int]]:
    return {(frozenset(problem.numbers), problem.target) for problem in problems}


def test_problems_are_solvable(train: list[Countdown], test: list[Countdown]) -> None:
    for problem in [*train, *test]:
        assert 2 <= len(set(problem.numbers)) == len(problem.numbers) <= 4
        assert all(1 <= number <= 12 for number in problem.numbers)
        assert 1 <= problem.target <= 20
        assert problem.target not in problem.numbers
        working, answer = problem.solution.split("\n")
        result = calculate(answer.removeprefix("answer: "))
        assert result is not None
        value, used = result
        assert value == problem.target
        assert set(used) <= set(problem.numbers)
        assert set(used.values()) == {1}
        assert working == f"{answer.removeprefix('answer: ')}={problem.target} {problem.target}? yes"


def test_calculations_are_right_and_none_is_missing() -> None:
    """Every pair and operator by the parser, whose own oracle is Python's arithmetic."""
    for numbers in combinations(range(1, 13), 3):
        expected = {}
        for a in numbers:
            for b in numbers:
                for operator in "+-*/":
                    result = calculate(f"{a}{operator}{b}")
                    if a != b and result is not None and result[0] in range(1, 21):
                        expected[f"{a}{operator}{b}"] = result[0]
        found = calculations(numbers)
        assert found.items() <= expected.items()
        # Left out: what only changes the order, and a 1 that changes nothing.
        for text in expected.keys() - found.keys():
            a, operator, b = text.partition(next(sign for sign in "+-*/" if sign in text))
            assert (operator in "+*" and int(a) < int(b)) or (operator in "*/" and "1" in (a, b))


def test_train_and_test_share_no_numbers_with_target(train: list[Countdown], test: list[Countdown]) -> None:
    assert len(keys(test)) == len(test) == 300
    assert len(keys(train)) == len(train) == 2_000
    assert not keys(test) & keys(train)
    assert not keys(test) & keys(list(islice(stream("train", seed=1), 5_000)))
    assert not {problem.question for problem in train} & {problem.question for problem in test}


def test_the_split_does_not_see_the_order_of_numbers() -> None:
    assert all(split_of((a, b, 3), 9) == split_of((3, b, a), 9) for a in range(1, 11) for b in range(1, 11))


def test_all_operators_and_sizes_come(train: list[Countdown], test: list[Countdown]) -> None:
    for problems in (train, test):
        assert {len(problem.numbers) for problem in problems} == {2, 3, 4}
        assert all(any(sign in problem.solution for problem in problems) for sign in "+-*/")


def test_fewer_are_a_prefix(train: list[Countdown]) -> None:
    assert generate("train", 50) == train[:50]


def test_no_more_are_asked_for_than_there_are() -> None:
    there = {"train": 0, "test": 0}
    for size in (2, 3, 4):
        for numbers in combinations(range(1, 13), size):
            for target in set(calculations(numbers).values()) - set(numbers):
                there[split_of(numbers, target)] += 1
    assert there == MOST
    assert len(generate("test", MOST["test"])) == MOST["test"]
    with pytest.raises(DataError, match=r"eval.problems must be at most 740, .*'embedded' generates: got 741"):
        TASK.problems("embedded", "test", 741)
