"""Countdown as a task: problems, rewards, and when an expression is right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_countdown.expression import ExpressionError, Result, calculate
from grpo_trainer.task import Judgement, Problem, Split

if TYPE_CHECKING:
    from grpo_contracts import RewardFunction

__all__ = ["TASK"]

_EMBEDDED_SIZE: Mapping[Split, int] = {"train": 2_048, "test": 512}
_MARK = "answer:"
_ARITHMETIC = re.compile(r"[0-9 ()+*/×÷−-]+")
_GOAL = re.compile(r"Reach ([0-9]{1,6}) from ([0-9]{1,6}(?:, [0-9]{1,6})*)")


def correct(*, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the last line holds an expression that reaches the target, each number at most once; else 0."""
    return [float(_reaches(_answer(text), question)) for text, question in zip(completions, prompts)]


def format(  # noqa: A001 - the name people type in `reward.functions`
    *, completions: Sequence[str], finished: Sequence[bool], **_: Any
) -> list[float | None]:
    """1 where one ``answer:`` stands, with an expression, on the last line, and the completion ended by itself."""
    return [float(_is_formed(text, finished=done)) for text, done in zip(completions, finished)]


class CountdownTask:
    """Reach a target from given numbers with + - * /, each number at most once."""

    name = "countdown"
    title = "GRPO on the numbers game Countdown."
    instruction = (
        "Use + - * / and parentheses. End with a line that holds answer: followed by the expression and nothing else."
    )
    folder = Path(__file__).parent
    policies: Mapping[str, Path] = {"embedded": folder / "policy"}
    rewards: Mapping[str, RewardFunction] = {"correct": correct, "format": format}
    weights: Mapping[str, float] = {"correct": 1.0, "format": 0.1}

    def problems(self, source: str, split: Split, limit: int) -> Sequence[Problem]:
        """Generate problems (``embedded``), or read a data set whose questions hold ``Reach 22 from 8, 6, 5``."""
        if source != "embedded":
            from grpo_trainer.data.sources import DataError, read_problems

            problems = read_problems(source, split, limit=limit)
            for problem in problems:
                if _GOAL.search(problem.question) is None:
                    raise DataError(
                        f"{problem.place}: question must hold a target and numbers, such as 'Reach 22 from 8, 6, 5': "
                        f"got {problem.question!r}"
                    )
            return problems
        from grpo_countdown.problems import generate

        return [
            Problem(problem.question, problem.answer, f"embedded {split}:{number}")
            for number, problem in enumerate(generate(split, limit or _EMBEDDED_SIZE[split]), 1)
        ]

    def judge(self, completion: str, problem: Problem, *, finished: bool) -> Judgement:
        """Strict: the expression of the last line reaches the target. Lenient: any expression in it does."""
        answer, line = _answer(completion), _last_line(completion)
        right = _reaches(answer, problem.question)
        return Judgement(
            strict=right,
            lenient=right or any(_reaches(text.strip("* "), problem.question) for text in _ARITHMETIC.findall(line)),
            formed=_is_formed(completion, finished=finished),
            read=line,
        )


def _last_line(completion: str) -> str:
    return completion.rstrip().rpartition("\n")[2]


def _answer(completion: str) -> str | None:
    line = _last_line(completion)
    return line.removeprefix(_MARK) if line.startswith(_MARK) else None


def _result(expression: str | None) -> Result | None:
    try:
        return None if expression is None else calculate(expression)
    except ExpressionError:
        return None


def _reaches(expression: str | None, question: str) -> bool:
    result = _result(expression)
    match = _GOAL.search(question)
    if result is None or match is None:
        return False
    return result.value == int(match[1]) and result.numbers <= Counter(map(int, match[2].split(", ")))


def _is_formed(completion: str, *, finished: bool) -> bool:
    return finished and completion.count(_MARK) == 1 and _result(_answer(completion)) is not None


TASK = CountdownTask()
