"""Replacing groups that teach nothing by further ones: DAPO's dynamic sampling, up to a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from grpo_contracts import Scored
from grpo_loss import groups_with_signal
from grpo_trainer.rewards.scoring import Transcript

__all__ = ["choose_groups", "count_with_signal"]


def count_with_signal(scored: Scored) -> int:
    """Groups whose rewards are not all equal."""
    return int(_with_signal(scored).sum())


def choose_groups(draws: Sequence[tuple[Scored, Transcript]], count: int) -> tuple[Scored, Transcript]:
    """Make one batch out of several: groups with signal first, in the order they were drawn.

    Args:
        draws: batches of whole groups, all of one policy.
        count: groups to keep; those without signal fill up what is missing.

    Returns:
        A batch of `count` groups, and its transcript.

    Source: DAPO arXiv:2503.14476 sec. 3.2.
    """
    signal_P = np.concatenate([_with_signal(scored) for scored, _ in draws])
    chosen_P = np.sort(np.argsort(~signal_P, kind="stable")[:count])
    size = draws[0][0].rollout.group_size
    rows_B = (chosen_P[:, None] * size + np.arange(size)).reshape(-1)
    scored = _take([scored for scored, _ in draws], rows_B)
    rollout = _take([scored.rollout for scored, _ in draws], rows_B)
    group_B = np.repeat(np.arange(count, dtype=np.int32), size)
    transcripts = [transcript for _, transcript in draws]

    def texts(name: str) -> tuple[Any, ...]:
        every = [value for transcript in transcripts for value in getattr(transcript, name)]
        return tuple(every[row] for row in rows_B)

    per_row = {item.name: texts(item.name) for item in fields(Transcript) if item.name != "step"}
    return (
        replace(scored, rollout=replace(rollout, group_B=group_B)),
        replace(transcripts[0], **per_row),
    )


def _with_signal(scored: Scored) -> np.ndarray:
    """By group, in order: groups are adjacent."""
    rollout = scored.rollout
    signal_B = groups_with_signal(scored.reward_B, scored_B=scored.scored_B, group_B=rollout.group_B)
    return np.any(np.asarray(signal_B).reshape(-1, rollout.group_size), axis=1)


def _take(stages: Sequence[Any], rows_B: np.ndarray) -> Any:
    """Rows of several batches laid end to end; what is not by row is that of the first."""
    taken = {}
    for item in fields(stages[0]):
        first = getattr(stages[0], item.name)
        if isinstance(first, np.ndarray) and item.name.rpartition("_")[2].startswith("B"):
            taken[item.name] = np.concatenate([getattr(stage, item.name) for stage in stages])[rows_B]
    return replace(stages[0], **taken)
