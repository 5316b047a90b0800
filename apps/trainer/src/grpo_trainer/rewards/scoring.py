"""From a rollout to a scored batch: completions become text, reward functions judge it, and some may fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_contracts import FinishReason, RewardFunction, Rollout, Scored
from grpo_loss import overlong_penalty
from grpo_trainer.data.stop_strings import cut_at_stop
from grpo_trainer.rewards.functions import RewardError
from grpo_trainer.rewards.worker import call_function
from grpo_trainer.rewards.workers import Failure, RewardWorker
from grpo_trainer.task import Judgement, Problem, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_trainer.settings.schema import RewardSettings

__all__ = ["Rewards", "Transcript", "transcribe"]


@dataclass(frozen=True)
class Transcript:
    """A rollout as text: what reward functions and the task's judge read.

    Args:
        problems: of each row.
        completions: the text of each row, without its stop token or stop string.
        finished: whether each row ended by itself, rather than at the limit.
        lengths: of each row, in tokens.
        step: of the policy that wrote them.
    """

    problems: tuple[Problem, ...]
    completions: tuple[str, ...]
    finished: tuple[bool, ...]
    lengths: tuple[int, ...]
    step: int

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a reward function, every further column of the data set by its name among them."""
        names = sorted({name for problem in self.problems for name in problem.columns})
        columns = {name: [problem.columns.get(name) for problem in self.problems] for name in names}
        return columns | {
            "prompts": [problem.question for problem in self.problems],
            "completions": list(self.completions),
            "answers": [problem.answer for problem in self.problems],
            "finished": list(self.finished),
            "lengths": list(self.lengths),
            "step": self.step,
        }

    def judgements(self, task: Task) -> list[Judgement]:
        """What the task says of each row."""
        rows = zip(self.completions, self.problems, self.finished)
        return [task.judge(completion, problem, finished=finished) for completion, problem, finished in rows]


def transcribe(
    rollout: Rollout, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
) -> Transcript:
    """Turn a rollout into text.

    Args:
        rollout: what was sampled.
        problems: one a group.
        tokenizer: the policy's.
        stop: stop strings, before which the text of a row that one ended is cut.

    Returns:
        The transcript.
    """
    ends = rollout.total_length_B - (rollout.finish_B == FinishReason.STOP)
    spans = zip(rollout.tokens_BT, rollout.prompt_length_B, ends)
    texts = tokenizer.batch_decode(
        [row[start:end].tolist() for row, start, end in spans],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return Transcript(
        problems=tuple(problems[group] for group in rollout.group_B),
        completions=tuple(
            cut_at_stop(text, stop) if reason == FinishReason.STOP_STRING else text
            for text, reason in zip(texts, rollout.finish_B)
        ),
        finished=tuple(map(bool, rollout.finish_B != FinishReason.LENGTH)),
        lengths=tuple(map(int, rollout.completion_length_B)),
        step=rollout.policy.step,
    )


@dataclass(frozen=True)
class Rewards:
    """The reward functions of a run.

    Args:
        functions: by name, in the order of the config; those of users run in processes of their own.
        weights: by name.
        max_unscored: largest share of rows without a reward that a step may have.
    """

    functions: Mapping[str, RewardFunction | RewardWorker]
    weights: Mapping[str, float]
    max_unscored: float

    @classmethod
    def start(cls, settings: RewardSettings, task: Task, *, max_new_tokens: int) -> Rewards:
        """Find the functions that the settings name, and start the processes of a user's own ones.

        Args:
            settings: the section ``reward``.
            task: its built-in functions go by their names.
            max_new_tokens: limit of a completion, for the penalty on long ones.

        Returns:
            The rewards.

        Raises:
            RewardError: a function cannot be found or imported; says why.
        """
        functions = {
            name: task.rewards.get(name) or RewardWorker(name, timeout=settings.timeout) for name in settings.functions
        }
        weights = dict(zip(settings.functions, settings.weights))
        if settings.overlong_buffer:
            functions["overlong"] = _overlong(max_new_tokens, settings.overlong_buffer)
            weights["overlong"] = settings.overlong_penalty
        return cls(functions, weights, settings.max_unscored)

    def score(
        self,
        rollout: Rollout,
        transcript: Transcript,
        report: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> Scored:
        """Score every completion by every function; what a function fails at stays unscored.

        Args:
            rollout: what was sampled.
            transcript: the same as text.
            report: gets every failure, with the text that caused it: `function`, `kind`, `rows`, `message`,
                `output`, and the first row's `prompt`, `completion` and `answer`.

        Returns:
            Raw rewards of each function and their weighted sum.

        Raises:
            RewardError: more rows than ``reward.max_unscored`` have no reward.
        """
        rows, given = len(transcript.completions), transcript.arguments()
        columns: dict[str, list[float | None]] = {}
        records: list[dict[str, Any]] = []
        for name, function in self.functions.items():
            columns[name], failures = _score_by(function, given)
            records += [_record(name, failure, given) for failure in failures]
        if records and report is not None:
            report(records)
        scored = Scored.from_rewards(rollout, columns, self.weights)
        unscored = rows - int(scored.scored_B.sum())
        if unscored > self.max_unscored * rows:
            first = int((~scored.scored_B).argmax())
            raise RewardError(
                f"at most {self.max_unscored:.0%} of a step's completions may stay without a reward "
                f"(reward.max_unscored): {unscored} of {rows} did. The first is {given['completions'][first]!r}, "
                f"answer {given['answers'][first]!r}"
                + "".join(f". reward function {record['function']!r} {record['message']}" for record in records[:1])
            )
        return scored


def _overlong(max_tokens: int, buffer_tokens: int) -> RewardFunction:
    def overlong(*, lengths: list[int], **_: Any) -> list[float | None]:
        penalty_B = overlong_penalty(np.asarray(lengths), max_tokens=max_tokens, buffer_tokens=buffer_tokens)
        return np.asarray(penalty_B).tolist()

    return overlong


def _score_by(
    function: RewardFunction | RewardWorker, given: dict[str, Any]
) -> tuple[list[float | None], list[Failure]]:
    rows = len(given["completions"])
    if isinstance(function, RewardWorker):
        return _agree(function, given)
    reply = call_function(function, given)
    if "kind" in reply:
        return [None] * rows, [Failure(reply["kind"], tuple(range(rows)), reply["message"])]
    return reply["values"], [
        Failure("shape", (row,), f"must return finite numbers or None: got {shown}")
        for row, shown in reply["wrong"].items()
    ]


def _agree(worker: RewardWorker, given: dict[str, Any]) -> tuple[list[float | None], list[Failure]]:
    """The rewards of the first process's worker, in all processes: whether a time limit is hit differs between them."""
    import jax  # a reward process imports what stands above, and needs none of it

    if jax.process_count() == 1:
        return worker.judge(given)
    from jax.experimental import multihost_utils

    first = jax.process_index() == 0
    values, failures = worker.judge(given) if first else ([None] * len(given["completions"]), [])
    value_B = np.array([np.nan if value is None else value for value in values], np.float32)
    shared_B = np.asarray(multihost_utils.broadcast_one_to_all(value_B))
    return [None if np.isnan(value) else float(value) for value in shared_B], failures


def _record(name: str, failure: Failure, given: Mapping[str, Any]) -> dict[str, Any]:
    text = {}
    if failure.rows:
        row = failure.rows[0]
        text = {key: given[f"{key}s"][row] for key in ("prompt", "completion", "answer")}
    return {
        "function": name,
        "kind": failure.kind,
        "rows": list(failure.rows),
        "message": failure.message,
        "output": failure.output,
        **text,
    }
