"""The embedded policy, made from scratch out of what an impatient teacher writes.

Reinforcement learning sharpens what a policy can do now and then. So this teacher tries one calculation after another
and says of each whether it reaches the target, but more often than not gives up after the first that does not, and
answers with it all the same. A policy trained on that gives up when decoded greedily, and goes on trying in some of its
samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_countdown.problems import Countdown, calculations, generate, stream
from grpo_trainer.assemble.teach import Example, Recipe, SupervisedBatch, chat_examples, fill_batches, warmstart
from grpo_trainer.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Teacher", "lessons", "main", "teach"]

_SEED = 1  # another order than that of the problems that reinforcement learning sees
_TRIES = 6  # that fit in the completions of presets/laptop.yaml


@dataclass(frozen=True)
class Teacher:
    """How patient the teacher is, and how its lessons are packed.

    Args:
        seed: of the problems and of what the teacher tries.
        impatience: share of problems where it answers with its first try, right or wrong.
        rows: rows of one batch.
        row_length: tokens of a row.
    """

    seed: int = 0
    impatience: float = 0.6
    rows: int = 6
    row_length: int = 160


def teach(problem: Countdown, teacher: Teacher, rng: random.Random) -> str:
    """Write a solution as the impatient teacher does.

    Args:
        problem: what to solve.
        teacher: how patient it is.
        rng: decides what it tries, and whether it gives up.

    Returns:
        The text to learn.
    """
    results = calculations(problem.numbers)
    hit, *_ = (text for text, value in results.items() if value == problem.target)
    misses = [text for text, value in results.items() if value != problem.target]
    before = rng.sample(misses, rng.randrange(min(len(misses) + 1, _TRIES)))
    tries = [*before, hit]
    if rng.random() < teacher.impatience:
        tries = tries[:1]
    target = problem.target
    lines = [f"{text}={results[text]} {target}? {'yes' if results[text] == target else 'no'}" for text in tries]
    return "\n".join([*lines, f"answer: {tries[-1]}"])


def lessons(tokenizer: PreTrainedTokenizerBase, teacher: Teacher) -> Iterator[SupervisedBatch]:
    """Make batches without end."""
    return fill_batches(_blocks(tokenizer, teacher), rows=[teacher.rows], length=teacher.row_length)


def texts() -> list[str]:
    """What the tokenizer is trained on."""
    rng = random.Random(0)
    return [text for each in generate("train", 2_000) for text in (each.question, teach(each, Teacher(), rng))]


def main(task: Task, arguments: Sequence[str]) -> int:
    """``warmstart``: make the tokenizer and the policy and write them in Hugging Face layout."""
    folder = Path(__file__).parent / "policy"
    recipe = Recipe(steps=1_000)
    return warmstart(task, arguments, folder=folder, texts=texts, teacher=Teacher, lessons=lessons, recipe=recipe)


def _blocks(tokenizer: PreTrainedTokenizerBase, teacher: Teacher) -> Iterator[list[list[Example]]]:
    rng = random.Random(teacher.seed)
    problems = stream("train", seed=_SEED + teacher.seed)
    while True:
        chosen = list(islice(problems, 512))
        solutions = [teach(problem, teacher, rng) for problem in chosen]
        yield [chat_examples(tokenizer, [problem.question for problem in chosen], solutions)]
