"""The embedded policy, made from scratch out of what an unreliable teacher writes.

Reinforcement learning sharpens what a policy can do now and then. So this teacher always calculates correctly and keeps
to the form, but often takes the wrong operator in the last calculation and misses the target. A policy trained on that
misses when decoded greedily, and hits in some of its samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_countdown.problems import Term, combine, generate, stream
from grpo_trainer.assemble.teach import Example, Recipe, SupervisedBatch, chat_examples, fill_batches, warmstart
from grpo_trainer.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Teacher", "lessons", "main", "teach"]

_SEED = 1  # other solutions, in another order, than those of the problems that reinforcement learning sees
_MISTAKEN = {"+": "-", "-": "+", "*": "+", "/": "-"}


@dataclass(frozen=True)
class Teacher:
    """How reliable the teacher is, and how its lessons are packed.

    Args:
        seed: of the problems and of the mistakes.
        mistakes: share of solutions that end with the wrong operator, where the right one is -, * or /.
        sum_mistakes: the same where the right one is +.
        rows: rows of one batch.
        row_length: tokens of a row.
    """

    seed: int = 0
    mistakes: float = 0.6
    sum_mistakes: float = 0.2
    rows: int = 6
    row_length: int = 160


def teach(term: Term, teacher: Teacher, rng: random.Random) -> str:
    """Write a solution as the unreliable teacher does.

    Args:
        term: the right one.
        teacher: how reliable it is.
        rng: decides whether it errs here.

    Returns:
        The text to learn.
    """
    if term.parts is None:
        return term.solution
    left, operator, right = term.parts
    if rng.random() < (teacher.sum_mistakes if operator == "+" else teacher.mistakes):
        term = combine(left, _MISTAKEN[operator], right) or term
    return term.solution


def lessons(tokenizer: PreTrainedTokenizerBase, teacher: Teacher) -> Iterator[SupervisedBatch]:
    """Make batches without end."""
    return fill_batches(_blocks(tokenizer, teacher), rows=[teacher.rows], length=teacher.row_length)


def texts() -> list[str]:
    """What the tokenizer is trained on."""
    rng = random.Random(0)
    return [
        text for question, term in generate("train", 2_000).items() for text in (question, teach(term, Teacher(), rng))
    ]


def main(task: Task, arguments: Sequence[str]) -> int:
    """``warmstart``: make the tokenizer and the policy and write them in Hugging Face layout."""
    folder = Path(__file__).parent / "policy"
    recipe = Recipe(steps=700)
    return warmstart(task, arguments, folder=folder, texts=texts, teacher=Teacher, lessons=lessons, recipe=recipe)


def _blocks(tokenizer: PreTrainedTokenizerBase, teacher: Teacher) -> Iterator[list[list[Example]]]:
    rng = random.Random(teacher.seed)
    problems = stream("train", seed=_SEED + teacher.seed)
    while True:
        questions, terms = zip(*islice(problems, 512))
        yield [chat_examples(tokenizer, questions, [teach(term, teacher, rng) for term in terms])]
