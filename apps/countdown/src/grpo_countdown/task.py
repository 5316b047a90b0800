"""Countdown as a task: problems, rewards, and when an expression is right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_countdown.expression import calculate
from grpo_trainer.task import Judgement, Problem, Split

__all__ = ["TASK"]

_MARK = "answer:"
_ARITHMETIC = re.compile(r"[0-9 ()+*/×÷−-]+")
_GOAL = re.compile(r"Reach ([0-9]{1,6}) from ([0-9]{1,6}(?:, [0-9]{1,6})*)")


def correct(*, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the last line holds an expression that reaches the target, each number at most once; else 0."""
    return [float(_reaches(_answer(text), question)) for text, question in zip(completions, prompts)]


def format(*, completions: Sequence[str], finished: Sequence[bool], **_: Any) -> list[float | None]:  # noqa: A001
    """1 where one ``answer:`` stands, with an expression, on the last line, and the completion ended by itself."""
    return [float(_is_formed(text, finished=done)) for text, done in zip(completions, finished)]


class CountdownTask:
    """Reach a target from given numbers with + - * /, each number at most once."""

    name = "countdown"
    title = "GRPO on the numbers game Countdown."
    instruction = "Use + - * / and parentheses. End with a line of its own: answer: and then the expression alone."
    folder = Path(__file__).parent
    policies: Mapping[str, Path] = {"embedded": folder / "policy"}
    rewards: Mapping[str, Any] = {"correct": correct, "format": format}
    weights: Mapping[str, float] = {"correct": 1.0, "format": 0.1}

    def problems(self, source: str, split: Split, limit: int) -> Sequence[Problem]:
        """Generate problems (``embedded``), or read a data set whose questions hold ``Reach 8 from 9, 7, 6``."""
        if source != "embedded":
            from grpo_trainer.data.sources import DataError, read_problems

            problems = read_problems(source, split, limit=limit)
            for problem in problems:
                if _GOAL.search(problem.question) is None:
                    raise DataError(
                        f"{problem.place}: question must be like 'Reach 8 from 9, 7, 6': got {problem.question!r}"
                    )
            return problems
        from grpo_countdown.problems import MOST, generate
        from grpo_trainer.data.sources import check_limit

        check_limit(source, split, limit, MOST[split])
        problems = generate(split, limit or (2_048 if split == "train" else 512))
        return [Problem(each.question, each.solution, f"embedded {split}:{n}") for n, each in enumerate(problems, 1)]

    def judge(self, completion: str, problem: Problem, *, finished: bool) -> Judgement:
        """Strict: the expression of the last line reaches the target. Lenient: any expression in it does."""
        answer, line = _answer(completion), completion.rstrip().rpartition("\n")[2]
        right = _reaches(answer, problem.question)
        return Judgement(
            strict=right,
            lenient=right or any(_reaches(text.strip("* "), problem.question) for text in _ARITHMETIC.findall(line)),
            formed=_is_formed(completion, finished=finished),
            read=line,
        )


def _answer(completion: str) -> str:
    """What stands after the mark on the last line; nothing, which is no expression, where there is no mark."""
    before, _, after = completion.rstrip().rpartition("\n")[2].partition(_MARK)
    return "" if before else after


def _reaches(expression: str, question: str) -> bool:
    result, goal = calculate(expression), _GOAL.search(question)
    if result is None or goal is None:
        return False
    value, used = result
    return value == int(goal[1]) and used <= Counter(map(int, goal[2].split(", ")))


def _is_formed(completion: str, *, finished: bool) -> bool:
    return finished and completion.count(_MARK) == 1 and calculate(_answer(completion)) is not None


TASK = CountdownTask()
