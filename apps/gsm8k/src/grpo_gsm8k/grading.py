"""GSM8K's rewards: the final answer, the last number, the form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

_NUMBER = r"[-+−]?\s?[$€£]?\s?[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_FINAL = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)
_LAST_LINE = re.compile(rf"(?:^|\n)#### ?{_NUMBER}\s*\Z")


def final_answer(text: str) -> Decimal | None:
    """Read the number after ``####``: GSM8K's rule, the first such mark counts.

    Args:
        text: a completion, or the data set's ``answer`` field.

    Returns:
        Its value (``1,080``, ``-5``, ``$3.50`` and ``18.00`` are numbers), or None.

    Source: openai/grade-school-math, ``dataset.py``.
    """
    match = _FINAL.search(text)
    return _value(match.group(1)) if match else None


def last_number(text: str) -> Decimal | None:
    """Read the last number of a text, wherever it stands; None if there is none."""
    found = _ANY.findall(text)
    return _value(found[-1]) if found else None


def answer(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the number after ``####`` is the answer, else 0; unscored where the data set's own answer has none."""
    return [_same(final_answer(completion), final_answer(gold)) for completion, gold in zip(completions, answers)]


def flexible(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the last number is the answer: skill without the form, to be reported beside `answer`."""
    return [_same(last_number(completion), final_answer(gold)) for completion, gold in zip(completions, answers)]


def format(  # noqa: A001 - the name people type in `reward.functions`
    *, completions: Sequence[str], finished: Sequence[bool] | None = None, **_: Any
) -> list[float | None]:
    """1 where one ``####`` stands, with a number, alone on the last line, and the completion ended by itself."""
    ended = [True] * len(completions) if finished is None else finished
    return [float(is_formed(text, finished=done)) for text, done in zip(completions, ended)]


def is_formed(completion: str, *, finished: bool) -> bool:
    """Whether one ``####`` stands, with a number, alone on the last line, and the completion ended by itself."""
    return finished and completion.count("####") == 1 and _LAST_LINE.search(completion) is not None


def _same(found: Decimal | None, gold: Decimal | None) -> float | None:
    return None if gold is None else float(found == gold)


def _value(number: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[$€£,\s]", "", number).replace("−", "-"))
    except InvalidOperation:  # such as two signs
        return None
