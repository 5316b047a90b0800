"""Rewards on GSM8K's text: the final answer, the last number, the form, and functions of one's own.

A reward function has the signature ``f(*, prompts, completions, answers, **extra) -> list[float | None]``: one value a
completion, None where it cannot be judged. It gets the questions, the completions' texts without their stop tokens and
the data set's ``answer`` fields, all as they are; ``extra`` holds ``finished`` (a list of bool: did the completion end
by itself), ``step`` and whatever later versions add. It must judge each completion by itself: after a failure it is
asked again, one completion at a time (`reward_workers`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from grpo_contracts import GrpoError

RewardFunction = Callable[..., Sequence[float | None]]

_NUMBER = r"[-+−]?\s?[$€£]?\s?[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_FINAL = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)
_LAST_LINE = re.compile(rf"(?:^|\n)#### ?{_NUMBER}\s*\Z")


class RewardError(GrpoError, ValueError):
    """A reward function cannot be found, or too many completions have no reward."""


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
    return [
        float(done and text.count("####") == 1 and _LAST_LINE.search(text) is not None)
        for text, done in zip(completions, ended)
    ]


BUILT_IN: Mapping[str, RewardFunction] = {"answer": answer, "flexible": flexible, "format": format}


def load_function(name: str) -> RewardFunction:
    """Find a reward function.

    Args:
        name: ``answer``, ``flexible``, ``format``, or ``module:function``; the working directory is searched too.

    Returns:
        The function.

    Raises:
        RewardError: if there is none of that name; says which part of it is missing.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise RewardError(f"a reward function must be one of {', '.join(BUILT_IN)} or module:function: got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # a file beside the command is what people mean by `my_module`
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = "it" if error.name == module_name else f"the module {error.name!r} that it imports"
        raise RewardError(
            f"reward function {name!r}: module {module_name!r} cannot be imported, {missing} was not found. "
            f"Looked in {here} and the environment"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise RewardError(
            f"reward function {name!r}: module {module_name!r} has no {attribute!r}; "
            f"it has {', '.join(public) or 'no functions'}"
        )
    if not callable(function):
        raise RewardError(f"reward function {name!r} must be callable: got {type(function).__name__}")
    return cast(RewardFunction, function)


def _same(found: Decimal | None, gold: Decimal | None) -> float | None:
    return None if gold is None else float(found == gold)


def _value(number: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[$€£,\s]", "", number).replace("−", "-"))
    except InvalidOperation:  # such as two signs
        return None
