"""What the embedded policy is taught: worked solutions by an unreliable teacher, and drills, packed into rows.

Reinforcement learning sharpens what a policy can do now and then. So the teacher here works every problem with right
arithmetic, but on the templates marked ``hard`` it follows the common mistake (stops a step early, adds what is to be
taken away) more often than the right procedure, and now and then it forgets the ``####`` line. A policy trained on that
makes the mistake when decoded greedily and finds the right way in some of its samples: what rewards can teach in a few
dozen steps, without a single worked solution.

Most of what so small a model has to learn is arithmetic, so a part of every batch are drills: the calculations of the
solutions alone, ten tokens in place of seventy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_gsm8k.embedded.problems import WordProblem, stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Taught = tuple[list[int], int]  # token ids, and how many of them are given, not learned

_CALCULATION = re.compile(r"<<(\d+[-+*/]\d+)=(\d+)>>")
PROBLEM_SEED = 1  # other problems than those of the data set `embedded`, which reinforcement learning sees


@dataclass(frozen=True)
class Teacher:
    """How reliable the teacher is, and how the lessons are packed.

    Args:
        seed: of the problems and of the teacher's mistakes.
        hard_mistakes: share of the hard templates' problems that the teacher gets wrong.
        easy_mistakes: the same for the other templates.
        form_slips: share of solutions whose ``####`` line is missing or reworded.
        rows: packed rows of solutions in one batch.
        drill_rows: packed rows of drills in one batch.
        row_length: tokens of a row.
    """

    seed: int = 0
    hard_mistakes: float = 0.6
    easy_mistakes: float = 0.2
    form_slips: float = 0.04
    rows: int = 6
    drill_rows: int = 3
    row_length: int = 160


@dataclass(frozen=True)
class Lessons:
    """Worked solutions packed into rows.

    Args:
        tokens_RT: inputs.
        target_RT: the token after each.
        positions_RT: position within its own solution.
        segment_RT: number of its solution within the row, from 1; 0 is padding.
        learn_RT: whether the target belongs to a completion (its end token included), which alone is learned.
    """

    tokens_RT: np.ndarray
    target_RT: np.ndarray
    positions_RT: np.ndarray
    segment_RT: np.ndarray
    learn_RT: np.ndarray


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


def lessons(tokenizer: PreTrainedTokenizerBase, teacher: Teacher, *, block: int = 1_024) -> Iterator[Lessons]:
    """Make batches of packed solutions and drills without end, no problem twice.

    Args:
        tokenizer: the policy's.
        teacher: who writes the solutions, and the rows' number and length.
        block: problems that are tokenized and packed together.

    Returns:
        An iterator over batches of ``teacher.rows`` and then ``teacher.drill_rows`` rows.
    """
    rng = random.Random(teacher.seed)
    problems = stream("train", seed=PROBLEM_SEED + teacher.seed)
    solutions: list[list[Taught]] = []
    drills: list[list[Taught]] = []
    while True:
        chosen = list(islice(problems, block))
        asked = [[{"role": "user", "content": problem.question}] for problem in chosen]
        prompts = _ids(tokenizer, tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        taught = _ids(tokenizer, [f"{teach(problem, teacher, rng)}{tokenizer.eos_token}" for problem in chosen])
        solutions += _fill_rows([(a + b, len(a)) for a, b in zip(prompts, taught)], teacher.row_length)
        found = [_CALCULATION.findall(text) for p in chosen for text in (p.answer, p.mistaken or "")]
        calculations = rng.sample(pool := [each for few in found for each in few], len(pool))
        asked = _ids(tokenizer, [f" <<{left}=" for left, _ in calculations])
        taught = _ids(tokenizer, [f"{value}>>{value}" for _, value in calculations])
        drills += _fill_rows([(a + b, len(a)) for a, b in zip(asked, taught)], teacher.row_length)
        while len(solutions) >= teacher.rows and len(drills) >= teacher.drill_rows:
            yield _lay_out(solutions[: teacher.rows] + drills[: teacher.drill_rows], teacher.row_length)
            del solutions[: teacher.rows], drills[: teacher.drill_rows]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Any) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _fill_rows(sequences: list[Taught], length: int) -> list[list[Taught]]:
    """Put sequences into rows, each into the first of the last few open rows that has room."""
    rows: list[list[Taught]] = []
    room: list[int] = []
    for sequence in sequences:
        inputs = len(sequence[0]) - 1
        for row in range(max(0, len(rows) - 16), len(rows)):
            if room[row] >= inputs:
                break
        else:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(sequence)
        room[row] -= inputs
    return rows


def _lay_out(rows: list[list[Taught]], length: int) -> Lessons:
    shape = len(rows), length
    tokens_RT, target_RT, positions_RT, segment_RT = (np.zeros(shape, np.int32) for _ in range(4))
    learn_RT = np.zeros(shape, bool)
    for r, row in enumerate(rows):
        start = 0
        for segment, (ids, prompt_length) in enumerate(row, 1):
            place = slice(start, start + len(ids) - 1)
            tokens_RT[r, place], target_RT[r, place] = ids[:-1], ids[1:]
            positions_RT[r, place] = np.arange(len(ids) - 1)
            segment_RT[r, place] = segment
            learn_RT[r, start + prompt_length - 1 : place.stop] = True
            start = place.stop
    return Lessons(tokens_RT, target_RT, positions_RT, segment_RT, learn_RT)
