"""What the embedded policy is taught: worked solutions by an unreliable teacher, and drills.

Reinforcement learning sharpens what a policy can do now and then. So this teacher's arithmetic is always right, but on
the templates marked ``hard`` it follows the common mistake (stops a step early, adds what is to be taken away) more
often than the right procedure, and now and then it forgets the ``####`` line. A policy trained on that makes the
mistake when decoded greedily and finds the right way in some of its samples: what rewards can teach in a few dozen
steps, without a single worked solution.

Most of what so small a model has to learn is arithmetic, so part of every batch is drills: the calculations of the
solutions alone, ten tokens instead of seventy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from grpo_gsm8k.embedded.problems import WordProblem, stream
from grpo_trainer.assemble.teach import Example, SupervisedBatch, chat_examples, fill_batches, text_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Teacher", "lessons", "teach"]

_CALCULATION = re.compile(r"<<(\d+[-+*/]\d+)=(\d+)>>")
_PROBLEM_SEED = 1  # other problems than those of the data set `embedded`, which reinforcement learning sees


@dataclass(frozen=True)
class Teacher:
    """How reliable the teacher is, and how the lessons are packed.

    Args:
        seed: of the problems and of the teacher's mistakes.
        hard_mistakes: share of the hard templates' problems that the teacher gets wrong.
        easy_mistakes: the same for the other templates.
        form_slips: share of solutions whose ``####`` line is missing or reworded.
        rows: rows of solutions in one batch.
        drill_rows: rows of drills in one batch.
        row_length: tokens of a row.
    """

    seed: int = 0
    hard_mistakes: float = 0.6
    easy_mistakes: float = 0.2
    form_slips: float = 0.04
    rows: int = 6
    drill_rows: int = 3
    row_length: int = 160


def teach(problem: WordProblem, teacher: Teacher, rng: random.Random) -> str:
    """Write a solution as the unreliable teacher does.

    Args:
        problem: what to solve.
        teacher: how reliable it is.
        rng: decides whether it errs here.

    Returns:
        The text to learn.
    """
    errs = rng.random() < (teacher.hard_mistakes if problem.template.hard else teacher.easy_mistakes)
    text = problem.mistaken if errs and problem.mistaken is not None else problem.answer
    if rng.random() >= teacher.form_slips:
        return text
    steps, _, final = text.rpartition("\n#### ")
    return f"{steps}\nThere are {final} in all." if rng.random() < 0.5 else steps


def lessons(tokenizer: PreTrainedTokenizerBase, teacher: Teacher, *, block: int = 1_024) -> Iterator[SupervisedBatch]:
    """Make batches of packed solutions and drills without end, no problem twice.

    Args:
        tokenizer: the policy's.
        teacher: who writes the solutions, and the rows' number and length.
        block: problems that are tokenized and packed together.

    Returns:
        Batches of ``teacher.rows`` and then ``teacher.drill_rows`` rows.
    """
    rows = teacher.rows, teacher.drill_rows
    return fill_batches(_blocks(tokenizer, teacher, block), rows=rows, length=teacher.row_length)


def _blocks(
    tokenizer: PreTrainedTokenizerBase, teacher: Teacher, size: int
) -> Iterator[tuple[Sequence[Example], Sequence[Example]]]:
    """Solutions and drills of the next problems, without end."""
    rng = random.Random(teacher.seed)
    problems = stream("train", seed=_PROBLEM_SEED + teacher.seed)
    while True:
        chosen = list(islice(problems, size))
        solutions = [teach(problem, teacher, rng) for problem in chosen]
        texts = [text for problem in chosen for text in (problem.answer, problem.mistaken or "")]
        calculations = [each for text in texts for each in _CALCULATION.findall(text)]
        drills = rng.sample(calculations, len(calculations))
        prompts, completions = [f" <<{left}=" for left, _ in drills], [f"{value}>>{value}" for _, value in drills]
        yield (
            chat_examples(tokenizer, [problem.question for problem in chosen], solutions),
            text_examples(tokenizer, prompts, completions),
        )
