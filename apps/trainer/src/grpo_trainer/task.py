"""What an app implements to have its task trained: problems, rewards, and when a completion is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from grpo_contracts import RewardFunction

__all__ = ["Judgement", "Problem", "Split", "Task"]

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Problem:
    """A problem as the data set gives it.

    Args:
        question: the text put to the policy.
        answer: what the task's rewards compare with.
        place: where it was read, such as ``train.jsonl:17``; errors name it.
        columns: every further column of the data set, by name.
    """

    question: str
    answer: str
    place: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What a task says of one completion.

    Args:
        strict: right, by the rule that results are published by.
        lenient: right, however the answer is put.
        formed: in the form that was asked for.
        read: the answer that was read, and how, such as ``#### 18``; empty where none was found.
        answer: the answer alone, written alike for equal answers, so that majorities can be counted; empty: as `read`.
    """

    strict: bool
    lenient: bool
    formed: bool
    read: str = ""
    answer: str = ""


class Task(Protocol):
    """One task. Everything else (sampling, learning, evaluation, checkpoints) is the trainer's.

    `python -m APP --print-config` must answer at once: import nothing heavy at the top of the module that defines
    a task. The trainer reads ``FOLDER/presets/*.yaml`` as presets, and ``laptop.yaml`` there as the task's defaults.
    """

    @property
    def name(self) -> str:
        """Such as ``sums``: the program is ``grpo-sums``, and so is the distribution whose version a run records."""
        ...

    @property
    def title(self) -> str:
        """One line of help, such as ``GRPO on grade-school mathematics.``"""
        ...

    @property
    def folder(self) -> Path:
        """Where the app's package lies: it holds ``presets/``."""
        ...

    @property
    def policies(self) -> Mapping[str, Path]:
        """Policies that ship with the app: name (for ``model.path``) to folder in Hugging Face layout."""
        ...

    @property
    def instruction(self) -> str:
        """What to ask a policy for besides the question, so that `rewards` can read its answer; empty for nothing."""
        ...

    @property
    def rewards(self) -> Mapping[str, RewardFunction]:
        """Built-in reward functions by name (for ``reward.functions``); they run in the trainer's own process."""
        ...

    @property
    def weights(self) -> Mapping[str, float]:
        """The reward functions of a run by default, with their weights.

        One that is left out is off until `reward.functions` names it; its weight is then 1 unless `reward.weights` says
        otherwise.
        """
        ...

    def problems(self, source: str, split: Split, limit: int) -> Sequence[Problem]:
        """Read a split of a data set.

        Args:
            source: as in ``data.source``: ``embedded``, or whatever else the task reads.
            split: which one.
            limit: at most so many, from the beginning; 0 is all.

        Returns:
            The problems in the order of the data set, at least one, no question twice.

        Raises:
            DataError: there is no such source, or a problem cannot be read; names the place.
        """
        ...

    def judge(self, completion: str, problem: Problem, *, finished: bool) -> Judgement:
        """Say whether a completion is right.

        Args:
            completion: its text, without the stop token.
            problem: what it answers.
            finished: whether it ended by itself, rather than at the limit.

        Returns:
            The judgement.
        """
        ...
