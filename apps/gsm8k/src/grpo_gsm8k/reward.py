"""Rewards on GSM8K's text: the final answer, the last number, the form, and functions of one's own.

A reward function has the signature ``f(*, prompts, completions, answers, **extra) -> list[float | None]``: one value a
completion, None where it cannot be judged. It gets the questions, the completions' texts without their stop tokens and
the data set's ``answer`` fields, all as they are; ``extra`` holds ``finished`` (a list of bool: did the completion end
by itself), ``step`` and whatever later versions add.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_contracts import FinishReason, GrpoError, Rollout, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_gsm8k.config import Reward
    from grpo_gsm8k.data import Asked

RewardFunction = Callable[..., Sequence[float | None]]

_NUMBER = r"[-+−]?\s?[$€£]?\s?[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_FINAL = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)
_LAST_LINE = re.compile(rf"(?:^|\n)#### ?{_NUMBER}\s*\Z")


class RewardError(GrpoError, ValueError):
    """A reward function cannot be found, or returned what is no list of rewards."""


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
    return function


@dataclass(frozen=True)
class Rewards:
    """The reward functions of a run.

    Args:
        functions: by name, in the order of the config.
        weights: by name.
        max_unscored: largest share of rows without a reward that a step may have.
        tokenizer: turns completions into text, once, for the functions alone.
    """

    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float]
    max_unscored: float
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_config(cls, config: Reward, tokenizer: PreTrainedTokenizerBase) -> Rewards:
        """Find the functions that the config names.

        Args:
            config: the section ``reward``.
            tokenizer: the policy's.

        Returns:
            The rewards.

        Raises:
            RewardError: see :func:`load_function`.
        """
        functions = {name: load_function(name) for name in config.functions}
        return cls(functions, dict(zip(config.functions, config.weights)), config.max_unscored, tokenizer)

    def texts(self, rollout: Rollout, rows: Iterable[int]) -> list[str]:
        """Completions as text, without their stop tokens.

        Args:
            rollout: what was sampled.
            rows: which rows.

        Returns:
            One text a row.
        """
        ids = []
        for row in rows:
            end = int(rollout.total_length_B[row]) - int(rollout.finish_B[row] == FinishReason.STOP)
            ids.append([int(token) for token in rollout.tokens_BT[row, int(rollout.prompt_length_B[row]) : end]])
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def score(self, rollout: Rollout, asked: Asked) -> Scored:
        """Judge every completion by every function.

        Args:
            rollout: what was sampled.
            asked: the problems it answers, one a group.

        Returns:
            Raw rewards of each function and their weighted sum.

        Raises:
            RewardError: a function returns another number of values than rows, or too many rows have no reward.
        """
        rows = len(rollout.tokens_BT)
        problems = [asked.problems[group] for group in rollout.group_B]
        given = {
            "prompts": [problem.question for problem in problems],
            "completions": self.texts(rollout, range(rows)),
            "answers": [problem.answer for problem in problems],
            "finished": [bool(reason == FinishReason.STOP) for reason in rollout.finish_B],
            "step": rollout.policy.step,
        }
        columns = {name: _checked(name, function(**given), rows) for name, function in self.functions.items()}
        scored = Scored.from_rewards(rollout, columns, self.weights)
        unscored = rows - int(scored.scored_B.sum())
        if unscored > self.max_unscored * rows:
            first = int((~scored.scored_B).argmax())
            raise RewardError(
                f"at most {self.max_unscored:.0%} of a step's completions may stay without a reward "
                f"(reward.max_unscored): {unscored} of {rows} did. The first is {given['completions'][first]!r}, "
                f"answer {given['answers'][first]!r}"
            )
        return scored


def _checked(name: str, values: Sequence[float | None], rows: int) -> list[float | None]:
    if not isinstance(values, Sequence | Iterable) or isinstance(values, str) or len(listed := list(values)) != rows:
        raise RewardError(
            f"reward function {name!r} must return a list of {rows} rewards, one a completion: got {values!r}"
        )
    return listed


def _same(found: Decimal | None, gold: Decimal | None) -> float | None:
    return None if gold is None else float(found == gold)


def _value(number: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[$€£,\s]", "", number).replace("−", "-"))
    except InvalidOperation:  # such as two signs
        return None
