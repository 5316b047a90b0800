"""The generator: solvable problems, disjoint splits."""

import ast
from itertools import islice

import pytest

from grpo_countdown.expression import calculate
from grpo_countdown.problems import Countdown, Term, combine, generate, split_of, stream


@pytest.fixture(scope="module")
def train() -> list[Countdown]:
    return generate("train", 2_000)


@pytest.fixture(scope="module")
def test() -> list[Countdown]:
    return generate("test", 300)


def test_every_solution_reaches_its_target(train: list[Countdown], test: list[Countdown]) -> None:
    for problem in [*train, *test]:
        assert 2 <= len(problem.numbers) <= 4
        assert all(1 <= number <= 10 for number in problem.numbers)
        assert 1 <= problem.target <= 20
        assert problem.target not in problem.numbers
        result = calculate(problem.solution.text)
        assert result.value == problem.target
        assert all(count <= problem.numbers.count(number) for number, count in result.numbers.items())


def test_the_working_is_right_and_ends_at_the_target(train: list[Countdown]) -> None:
    for problem in train:
        available = list(problem.numbers)
        for line in problem.solution.working():
            expression, value = line.split("=")
            result = calculate(expression)
            assert result.value == int(value)
            for number in result.numbers.elements():
                available.remove(number)
            available.append(int(value))
        assert available[-1] == problem.target


def test_solutions_have_no_parentheses_to_spare(train: list[Countdown]) -> None:
    """Python's own parser is the oracle: it writes an expression with the parentheses that precedence asks for."""
    for problem in train:
        text = problem.solution.text
        assert text.count("(") <= ast.unparse(ast.parse(text, mode="eval")).count("(")


def test_train_and_test_share_no_numbers_with_target(train: list[Countdown], test: list[Countdown]) -> None:
    def keys(problems: list[Countdown]) -> set[tuple[tuple[int, ...], int]]:
        return {(tuple(sorted(problem.numbers)), problem.target) for problem in problems}

    assert len(keys(train)) == len(train)
    assert len(keys(test)) == len(test)
    assert not keys(train) & keys(test)
    repeated = islice(stream("train", seed=1, repeat=True), 5_000)
    assert not keys(list(repeated)) & keys(test)


def test_the_split_does_not_see_the_order_of_numbers() -> None:
    assert all(split_of((a, b, 3), 9) == split_of((3, b, a), 9) for a in range(1, 11) for b in range(1, 11))


def test_all_operators_and_sizes_come(train: list[Countdown], test: list[Countdown]) -> None:
    for problems in (train, test):
        assert {len(problem.numbers) for problem in problems} == {2, 3, 4}
        assert {problem.solution.parts[1] for problem in problems if problem.solution.parts} == set("+-*/")


def test_fewer_are_a_prefix(train: list[Countdown]) -> None:
    assert generate("train", 50) == train[:50]


def test_what_leaves_the_small_whole_numbers_is_not_combined() -> None:
    two, seven, ten = Term(2, "2"), Term(7, "7"), Term(10, "10")
    assert combine(two, "-", seven) is None
    assert combine(seven, "/", two) is None
    assert combine(ten, "*", ten) is None
    assert combine(two, "-", two) is None
    assert combine(two, "+", seven) == combine(seven, "+", two)
