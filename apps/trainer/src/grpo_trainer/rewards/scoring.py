"""From a rollout to a scored batch: completions become text, reward functions judge it, and some may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_contracts import FinishReason, Rollout, Scored
from grpo_gsm8k.grading import BUILT_IN, RewardError, RewardFunction
from grpo_trainer.rewards.worker import judged
from grpo_trainer.rewards.workers import Failure, RewardWorker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_trainer.settings.schema import Reward
    from grpo_trainer.data.stream import Asked

__all__ = ["Rewards"]


@dataclass(frozen=True)
class Rewards:
    """The reward functions of a run.

    Args:
        functions: by name, in the order of the config; those of users run in processes of their own.
        weights: by name.
        max_unscored: largest share of rows without a reward that a step may have.
        tokenizer: turns completions into text, once, for the functions alone.
    """

    functions: Mapping[str, RewardFunction | RewardWorker]
    weights: Mapping[str, float]
    max_unscored: float
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_config(cls, config: Reward, tokenizer: PreTrainedTokenizerBase) -> Rewards:
        """Find the functions that the config names, and start the processes of a user's own ones.

        Args:
            config: the section ``reward``.
            tokenizer: the policy's.

        Returns:
            The rewards.

        Raises:
            RewardError: a function cannot be found or imported; says why.
        """
        functions = {
            name: BUILT_IN[name] if name in BUILT_IN else RewardWorker(name, timeout=config.timeout)
            for name in config.functions
        }
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

    def score(
        self, rollout: Rollout, asked: Asked, report: Callable[[list[dict[str, Any]]], None] | None = None
    ) -> Scored:
        """Judge every completion by every function; what a function fails at stays unscored.

        Args:
            rollout: what was sampled.
            asked: the problems it answers, one a group.
            report: told of every failure, with the text that caused it: `function`, `kind`, `rows`, `message`,
                `output`, and the first row's `prompt`, `completion` and `answer`.

        Returns:
            Raw rewards of each function and their weighted sum.

        Raises:
            RewardError: more rows than ``reward.max_unscored`` have no reward.
        """
        rows = len(rollout.tokens_BT)
        problems = [asked.problems[group] for group in rollout.group_B]
        given: dict[str, Any] = {
            "prompts": [problem.question for problem in problems],
            "completions": self.texts(rollout, range(rows)),
            "answers": [problem.answer for problem in problems],
            "finished": [bool(reason == FinishReason.STOP) for reason in rollout.finish_B],
            "step": rollout.policy.step,
        }
        columns: dict[str, list[float | None]] = {}
        records: list[dict[str, Any]] = []
        for name, function in self.functions.items():
            columns[name], failures = _judge(function, given)
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


def _judge(function: RewardFunction | RewardWorker, given: dict[str, Any]) -> tuple[list[float | None], list[Failure]]:
    rows = len(given["completions"])
    if isinstance(function, RewardWorker):
        return _agreed(function, given)
    reply = judged(function, given)
    if "kind" in reply:
        return [None] * rows, [Failure(reply["kind"], tuple(range(rows)), reply["message"])]
    return reply["values"], [
        Failure("shape", (row,), f"must return finite numbers or None: got {shown}")
        for row, shown in reply["wrong"].items()
    ]


def _agreed(worker: RewardWorker, given: dict[str, Any]) -> tuple[list[float | None], list[Failure]]:
    """What the first process's worker says, in all processes: whether a time limit is hit differs between them."""
    import jax  # a reward process imports what stands above, and needs none of it

    if jax.process_count() == 1:
        return worker.judge(given)
    from jax.experimental import multihost_utils

    first = jax.process_index() == 0
    values, failures = worker.judge(given) if first else ([None] * len(given["completions"]), [])
    value_B = np.array([np.nan if value is None else value for value in values], np.float32)
    told_B = np.asarray(multihost_utils.broadcast_one_to_all(value_B))
    return [None if np.isnan(value) else float(value) for value in told_B], failures


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
