"""Examples to learn from, and how they fill the rows of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from grpo_trainer.data.prompts import PromptStyle, encode_prompts
from grpo_trainer.task import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "SupervisedBatch", "chat_examples", "fill_batches", "text_examples"]

_OPEN_ROWS = 16  # rows that a sequence may still go into


class Example(NamedTuple):
    """A prompt with the completion to learn.

    Args:
        tokens: ids of both.
        prompt_length: how many of them are the prompt, which is not learned.
    """

    tokens: list[int]
    prompt_length: int


@dataclass(frozen=True)
class SupervisedBatch:
    """Examples packed into rows.

    Args:
        tokens_RT: inputs.
        target_RT: the token after each input.
        positions_RT: position within its example.
        segment_RT: number of its example within the row, from 1; 0 is padding.
        mask_RT: whether the target is learned: it belongs to a completion.
    """

    tokens_RT: np.ndarray
    target_RT: np.ndarray
    positions_RT: np.ndarray
    segment_RT: np.ndarray
    mask_RT: np.ndarray


def chat_examples(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], completions: Sequence[str]
) -> list[Example]:
    """Make examples of questions put bare, in the chat template, as policies that ship with a task are asked.

    Args:
        tokenizer: the policy's.
        questions: the user's turns.
        completions: what the policy should write for each, before its end token.

    Returns:
        One example a question.
    """
    problems = [Problem(question, "", "an example") for question in questions]
    prompts = encode_prompts(problems, tokenizer, PromptStyle())
    return _join(prompts, _ids(tokenizer, [f"{completion}{tokenizer.eos_token}" for completion in completions]))


def text_examples(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> list[Example]:
    """Make examples of plain texts and how they go on, without chat template and end token."""
    return _join(_ids(tokenizer, prompts), _ids(tokenizer, completions))


def fill_batches(
    blocks: Iterable[Sequence[Sequence[Example]]], *, rows: Sequence[int], length: int
) -> Iterator[SupervisedBatch]:
    """Pack examples into batches; no example is cut.

    Args:
        blocks: what is packed together. Each block holds a list of examples for each of one or more kinds.
        rows: rows of a batch for each kind.
        length: tokens of a row.

    Returns:
        Batches of ``sum(rows)`` rows, those of the first kind first. Examples left over at the end are dropped.

    Raises:
        ValueError: an example is longer than a row.
    """
    waiting: list[list[list[Example]]] = [[] for _ in rows]
    for block in blocks:
        for kind, examples in enumerate(block):
            waiting[kind] += _fill_rows(examples, length)
        while all(len(full) >= count for full, count in zip(waiting, rows)):
            yield _lay_out([row for full, count in zip(waiting, rows) for row in full[:count]], length)
            for full, count in zip(waiting, rows):
                del full[:count]


def _join(prompts: list[list[int]], completions: list[list[int]]) -> list[Example]:
    return [Example(prompt + completion, len(prompt)) for prompt, completion in zip(prompts, completions)]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Any) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _fill_rows(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Put each example into the first of the last few rows that has room."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        inputs = len(example.tokens) - 1
        if inputs > length:
            raise ValueError(f"an example must fit in a row of {length} tokens: got one of {inputs}")
        for row in range(max(0, len(rows) - _OPEN_ROWS), len(rows)):
            if room[row] >= inputs:
                break
        else:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(example)
        room[row] -= inputs
    return rows


def _lay_out(rows: list[list[Example]], length: int) -> SupervisedBatch:
    shape = len(rows), length
    tokens_RT, target_RT, positions_RT, segment_RT = (np.zeros(shape, np.int32) for _ in range(4))
    mask_RT = np.zeros(shape, bool)
    for r, row in enumerate(rows):
        start = 0
        for segment, (tokens, prompt_length) in enumerate(row, 1):
            place = slice(start, start + len(tokens) - 1)
            tokens_RT[r, place], target_RT[r, place] = tokens[:-1], tokens[1:]
            positions_RT[r, place] = np.arange(len(tokens) - 1)
            segment_RT[r, place] = segment
            mask_RT[r, start + prompt_length - 1 : place.stop] = True
            start = place.stop
    return SupervisedBatch(tokens_RT, target_RT, positions_RT, segment_RT, mask_RT)
