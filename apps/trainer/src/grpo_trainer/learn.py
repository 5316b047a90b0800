"""One rollout's updates: advantages, minibatches, optimizer steps, and their metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grpo_contracts import Scored, TrainBatch
from grpo_loss import (
    PackedBatch,
    TrainState,
    group_advantage,
    iterate_minibatches,
    reinforce_plus_plus_advantage,
    reinforce_plus_plus_baseline_advantage,
    rloo_advantage,
)
from grpo_mesh import BATCH_AXES, to_global, to_host
from grpo_trainer.assemble import Run
from grpo_trainer.settings.schema import Settings

__all__ = ["advantages", "learn", "place", "updates"]


def advantages(scored: Scored, settings: Settings) -> np.ndarray:
    """The advantage of each sequence, or of each token for the REINFORCE++ estimators.

    Args:
        scored: rewards of whole groups; unscored rows take no part and get 0.
        settings: `loss.advantage` names the estimator.

    Returns:
        float32 [B] or [B, T].
    """
    reward_B, groups = scored.reward_B, {"scored_B": scored.scored_B, "group_B": scored.rollout.group_B}
    mask_BT = scored.rollout.completion_BT & scored.scored_B[:, None]
    match settings.loss.advantage:
        case "grpo":
            result = group_advantage(reward_B, **groups)
        case "dr-grpo":
            result = group_advantage(reward_B, **groups, scale="none")
        case "batch-std":
            result = group_advantage(reward_B, **groups, scale="batch")
        case "rloo":
            result = rloo_advantage(reward_B, **groups)
        case "reinforce++-baseline":
            result = reinforce_plus_plus_baseline_advantage(reward_B, mask_BT, **groups)
        case "reinforce++":
            # The outcome reward stands on each completion's last token.
            reward_BT = np.zeros(mask_BT.shape, np.float32)
            reward_BT[np.arange(len(reward_B)), scored.rollout.total_length_B - 1] = reward_B
            result = reinforce_plus_plus_advantage(reward_BT, mask_BT)
    return np.asarray(result, np.float32)


def learn(run: Run, state: TrainState, batch: TrainBatch, step: int) -> tuple[TrainState, dict[str, float]]:
    """Every update of one rollout.

    Args:
        run: the assembled run.
        state: before; it is donated.
        batch: the rollout with rewards and advantages.
        step: of the run, from 0; with the seed it decides how minibatches are drawn.

    Returns:
        The state after, and the metrics of the updates: means over them, maxima where the name ends in `/max`, and
        `skipped_in_a_row`, how many of the last ones were not finite.
    """
    results = []
    for packed in updates(run, state.params, batch, step):
        state, metrics = run.plan.update(state, place(run, packed))
        results.append((metrics, packed.fill))
    return state, _merge([{**jax.device_get(metrics), "packing/fill": fill} for metrics, fill in results])


def updates(run: Run, params: Any, batch: TrainBatch, step: int) -> Iterator[PackedBatch]:
    """What each update of one rollout consumes, on the host.

    Args:
        run: the assembled run.
        params: before the first update: what old log-probabilities are taken under.
        batch: the rollout with rewards and advantages.
        step: of the run, from 0.

    Yields:
        One packed batch an update.
    """

    def log_probabilities(params: Any, packed: PackedBatch) -> np.ndarray:
        return to_host(run.plan.score(params, place(run, packed))[0])

    loss, reference = run.settings.loss, run.reference
    return iterate_minibatches(
        batch,
        shape=run.plan.pack_shape,
        epochs=loss.epochs,
        minibatches=loss.minibatches,
        seed=run.settings.seed,
        step=step,
        old=lambda packed: log_probabilities(params, packed),
        reference=None if reference is None else lambda packed: log_probabilities(reference, packed),
    )


def place(run: Run, packed: PackedBatch) -> PackedBatch:
    """Rows and prompts of every micro-batch over the mesh's data axes. Every process packed the same batch."""
    return to_global(packed, NamedSharding(run.plan.mesh, PartitionSpec(None, BATCH_AXES)))


def _merge(results: list[Mapping[str, Any]]) -> dict[str, float]:
    return {
        name: float(max(values) if name.endswith("/max") else np.mean(values))
        for name in results[0]
        for values in [[result[name] for result in results]]
    } | {"skipped_in_a_row": _last_in_a_row([not result["finite"] for result in results])}


def _last_in_a_row(flags: list[bool]) -> float:
    """How many flags are set at the end of the list."""
    return float(next((n for n, flag in enumerate(reversed(flags)) if not flag), len(flags)))
