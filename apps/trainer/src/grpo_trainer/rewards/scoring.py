"""From a rollout to a scored batch: completions become text, reward functions judge it, and some may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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

_GIB = 1 << 30
_LONGEST_SHOWN = 200  # characters of a completion or an answer in a message


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
        skip_none: None from a function means that it does not apply, and the others alone make the reward.
    """

    functions: Mapping[str, RewardFunction | RewardWorker]
    weights: Mapping[str, float]
    max_unscored: float
    skip_none: bool = False

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
        memory = int(settings.memory * _GIB) or None
        functions = {
            name: task.rewards.get(name) or RewardWorker(name, timeout=settings.timeout, memory=memory)
            for name in settings.functions
        }
        weights = dict(zip(settings.functions, settings.weights))
        if settings.overlong_buffer:
            functions["overlong"] = _overlong(max_new_tokens, settings.overlong_buffer)
            weights["overlong"] = settings.overlong_penalty
        return cls(functions, weights, settings.max_unscored, settings.skip_none)

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
        failed: dict[str, set[int]] = {}
        records: list[dict[str, Any]] = []
        for name, function in self.functions.items():
            columns[name], failed[name], failures = _score_by(function, given)
            records += [_record(name, failure, given) for failure in failures]
        scored = Scored.from_rewards(rollout, columns, self.weights)
        if self.skip_none:
            scored = _without_inapplicable(scored, failed)
        else:
            records += [_record(name, failure, given) for name, failure in _nones(scored, failed)]
        if records and report is not None:
            report(records)
        unscored = rows - int(scored.scored_B.sum())
        if unscored > self.max_unscored * rows:
            first = int((~scored.scored_B).argmax())
            raise RewardError(
                f"at most {self.max_unscored:.0%} of a step's completions may stay without a reward "
                f"(reward.max_unscored): {unscored} of {rows} did. The first is {_quoted(given['completions'][first])}"
                f", answer {_quoted(given['answers'][first])}"
                + "".join(f". reward function {record['function']!r} {record['message']}" for record in records[:1])
            )
        return scored


def _quoted(text: str) -> str:
    return repr(text[:_LONGEST_SHOWN]) + ("..." if len(text) > _LONGEST_SHOWN else "")


def _without_inapplicable(scored: Scored, failed: Mapping[str, set[int]]) -> Scored:
    """The same scores, where a row needs a reward of one function, and a failure of none, of those that count."""
    failed_BN = np.zeros(scored.scored_BN.shape, bool)
    for n, name in enumerate(scored.names):
        failed_BN[list(failed[name]), n] = True
    counts_N = scored.weight_N != 0
    scored_B = (scored.scored_BN & counts_N).any(1) & ~(failed_BN & counts_N).any(1)
    reward_B = np.where(scored_B, scored.reward_BN @ scored.weight_N, 0).astype(np.float32)
    return replace(scored, reward_B=reward_B, scored_B=scored_B)


def _nones(scored: Scored, failed: Mapping[str, set[int]]) -> Iterator[tuple[str, Failure]]:
    """Rows that one function left without a reward by returning None, though another one scored them."""
    for n, name in enumerate(scored.names):
        others_B = np.delete(scored.scored_BN & (scored.weight_N != 0), n, axis=1).any(1)
        rows = [int(row) for row in np.flatnonzero(~scored.scored_BN[:, n] & others_B) if row not in failed[name]]
        if rows and scored.weight_N[n] != 0:
            yield (
                name,
                Failure(
                    "none",
                    tuple(rows),
                    f"returned None for {len(rows)} of {len(others_B)} completions that another function scored, so "
                    "they have no reward; if None means that the function does not apply, set reward.skip_none=true",
                ),
            )


def _overlong(max_tokens: int, buffer_tokens: int) -> RewardFunction:
    def overlong(*, lengths: list[int], **_: Any) -> list[float | None]:
        penalty_B = overlong_penalty(np.asarray(lengths), max_tokens=max_tokens, buffer_tokens=buffer_tokens)
        return np.asarray(penalty_B).tolist()

    return overlong


def _score_by(
    function: RewardFunction | RewardWorker, given: dict[str, Any]
) -> tuple[list[float | None], set[int], list[Failure]]:
    """The rewards of each row, the rows that the function failed at, and what happened."""
    rows = len(given["completions"])
    if isinstance(function, RewardWorker):
        return _agree(function, given)
    reply = call_function(function, given)
    if "kind" in reply:
        everything = range(rows)
        return [None] * rows, set(everything), [Failure(reply["kind"], tuple(everything), reply["message"])]
    failures = [
        Failure("shape", (row,), f"must return finite numbers or None: got {shown}")
        for row, shown in reply["wrong"].items()
    ]
    return reply["values"], set(reply["wrong"]), failures


def _agree(worker: RewardWorker, given: dict[str, Any]) -> tuple[list[float | None], set[int], list[Failure]]:
    """The rewards of the first process's worker, in all processes: whether a time limit is hit differs between them."""
    import jax  # a reward process imports what stands above, and needs none of it

    first = jax.process_index() == 0
    nothing: list[float | None] = [None] * len(given["completions"])
    values, failures = worker.judge(given) if first else (nothing, [])
    failed = {row for failure in failures for row in failure.rows}
    if jax.process_count() == 1:
        return values, failed, failures
    from jax.experimental import multihost_utils

    numbers = [np.nan if value is None else value for value in values]
    value_B = np.array([np.inf if row in failed else number for row, number in enumerate(numbers)], np.float32)
    shared_B = np.asarray(multihost_utils.broadcast_one_to_all(value_B))
    shared = [float(value) if np.isfinite(value) else None for value in shared_B]
    return shared, set(np.flatnonzero(np.isinf(shared_B)).tolist()), failures


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
