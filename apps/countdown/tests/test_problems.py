"""The generator: solvable problems, disjoint splits."""

import ast
import re
from itertools import islice

import pytest

from grpo_countdown.expression import calculate
from grpo_countdown.problems import Term, combine, generate, split_of, stream

Problems = dict[str, Term]


@pytest.fixture(scope="module")
def train() -> Problems:
    return generate("train", 2_000)


@pytest.fixture(scope="module")
def test() -> Problems:
    return generate("test", 300)


def goal(question: str) -> tuple[int, frozenset[int]]:
    """Target and numbers."""
    target, *numbers = map(int, re.findall(r"\d+", question))
    assert 2 <= len(set(numbers)) == len(numbers) <= 4
    return target, frozenset(numbers)


def test_every_solution_reaches_its_target(train: Problems, test: Problems) -> None:
    for question, term in [*train.items(), *test.items()]:
        target, numbers = goal(question)
        assert all(1 <= number <= 10 for number in numbers)
        assert 1 <= target <= 20
        assert target not in numbers
        result = calculate(term.text)
        assert result is not None
        value, used = result
        assert value == term.value == target
        assert set(used) <= numbers
        assert set(used.values()) == {1}


def test_the_working_is_right_and_ends_at_the_target(train: Problems) -> None:
    for question, term in train.items():
        target, numbers = goal(question)
        available = list(numbers)
        for line in term.working:
            expression, written = line.split("=")
            result = calculate(expression)
            assert result is not None
            value, used = result
            assert value == int(written)
            for number in used.elements():
                available.remove(number)
            available.append(int(value))
        assert available[-1] == target


def test_solutions_have_no_parentheses_to_spare(train: Problems) -> None:
    """Python's own parser is the oracle: it writes an expression with the parentheses that precedence asks for."""
    for term in train.values():
        assert term.text.count("(") <= ast.unparse(ast.parse(term.text, mode="eval")).count("(")


def test_train_and_test_share_no_numbers_with_target(train: Problems, test: Problems) -> None:
    held_out = {goal(question) for question in test}
    assert len(held_out) == len(test) == 300
    assert len({goal(question) for question in train}) == len(train) == 2_000
    assert not held_out & {goal(question) for question in train}
    assert not held_out & {goal(question) for question, _ in islice(stream("train", seed=1), 5_000)}


def test_the_split_does_not_see_the_order_of_numbers() -> None:
    assert all(split_of((a, b, 3), 9) == split_of((3, b, a), 9) for a in range(1, 11) for b in range(1, 11))


def test_all_operators_and_sizes_come(train: Problems, test: Problems) -> None:
    for problems in (train, test):
        assert {len(goal(question)[1]) for question in problems} == {2, 3, 4}
        assert {term.parts[1] for term in problems.values() if term.parts} == set("+-*/")


def test_fewer_are_a_prefix(train: Problems) -> None:
    assert list(generate("train", 50).items()) == list(train.items())[:50]


def test_what_leaves_the_small_whole_numbers_is_not_combined() -> None:
    two, seven, ten = Term(2, "2"), Term(7, "7"), Term(10, "10")
    assert combine(two, "-", seven) is None
    assert combine(seven, "/", two) is None
    assert combine(ten, "*", ten) is None
    assert combine(two, "-", two) is None
    assert combine(two, "+", seven) == combine(seven, "+", two)
