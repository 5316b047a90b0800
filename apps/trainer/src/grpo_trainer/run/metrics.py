"""The metrics of a step, under the names people know from other GRPO trainers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from grpo_contracts import FinishReason, Scored, TrainBatch
from grpo_trainer.rewards.scoring import Transcript
from grpo_trainer.task import Judgement

__all__ = ["completion_records", "step_metrics"]

_events: Counter[str] = Counter()


def _count_event(event: str, duration_secs: float, **_: Any) -> None:
    _events[event] += 1


jax.monitoring.register_event_duration_secs_listener(_count_event)


def step_metrics(
    batch: TrainBatch,
    judgements: Sequence[Judgement],
    learned: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """One step's line of metrics.jsonl.

    Args:
        batch: what was learned from. Rewards are shown raw, function by function, and weighted together as `reward`.
        judgements: what the task says of each completion.
        learned: the updates' metrics.
        seconds: of the phases `rollout`, `reward`, `advantage` and `update`.

    Returns:
        name -> number; lengths in tokens, times in seconds, log-probabilities in nats.
    """
    scored, rollout = batch.scored, batch.scored.rollout
    length_B = rollout.completion_length_B
    group_std_P = [
        scored.reward_B[mine].std() if mine.any() else 0.0
        for group in np.unique(rollout.group_B)
        for mine in [(rollout.group_B == group) & scored.scored_B]
    ]
    means = {
        name: _mean(scored.reward_BN[:, column], scored.scored_BN[:, column])
        for column, name in enumerate(scored.names)
    }
    total = sum(seconds.values())
    return {
        "reward": _mean(scored.reward_B, scored.scored_B),
        "reward_std": float(np.mean(group_std_P)),
        "frac_reward_zero_std": float(np.mean(np.asarray(group_std_P) == 0)),
        **{f"reward/{name}": value for name, value in means.items()},
        "accuracy": float(np.mean([judgement.strict for judgement in judgements])),
        "unscored": float(np.mean(~scored.scored_B)),
        "completions/mean_length": float(length_B.mean()),
        "completions/max_length": float(length_B.max()),
        "completions/clipped_ratio": float(np.mean(rollout.finish_B == FinishReason.LENGTH)),
        **learned,
        "tokens": float(length_B.sum()),
        "tokens_per_second": float(length_B.sum()) / total,
        "rollout/tokens_per_second": float(length_B.sum()) / seconds["rollout"],
        "update/tokens_per_second": float(length_B.sum()) / seconds["update"],
        # By this process, or found in the compilation cache: constant once every shape has come.
        "compiled_programs": float(_events["/jax/core/compile/backend_compile_duration"]),
        "seconds": total,
        **{f"seconds/{name}": value for name, value in seconds.items()},
    }


def completion_records(
    scored: Scored, transcript: Transcript, judgements: Sequence[Judgement], *, count: int
) -> list[dict[str, Any]]:
    """Some completions of a step with their rewards, for completions.jsonl and the report.

    Args:
        scored: of this step.
        transcript: of this step.
        judgements: of the task, one a completion.
        count: how many, spread over the groups.

    Returns:
        One record each.
    """
    rollout = scored.rollout
    rows = np.unique(np.linspace(0, len(rollout.tokens_BT) - 1, num=count, dtype=int)) if count else ()
    return [
        {
            "prompt": transcript.problems[row].question,
            "completion": transcript.completions[row],
            "answer": transcript.problems[row].answer,
            "read": judgements[row].read,
            "right": judgements[row].strict,
            "reward": float(scored.reward_B[row]) if scored.scored_B[row] else None,
            "rewards": {
                name: float(scored.reward_BN[row, n]) if scored.scored_BN[row, n] else None
                for n, name in enumerate(scored.names)
            },
            "finish": FinishReason(int(rollout.finish_B[row])).name.lower(),
            "tokens": int(rollout.completion_length_B[row]),
        }
        for row in rows
    ]


def _mean(value_B: np.ndarray, counted_B: np.ndarray) -> float:
    return float(value_B[counted_B].mean()) if counted_B.any() else 0.0
