"""One rollout's updates: advantages, packing, old and reference log-probabilities, optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grpo_contracts import Scored, TrainBatch
from grpo_trainer.settings.schema import Config
from grpo_loss import (
    PackedBatch,
    TrainState,
    group_advantage,
    pack,
    reinforce_plus_plus_advantage,
    reinforce_plus_plus_baseline_advantage,
    rloo_advantage,
    split_minibatches,
    unpack_tokens,
)
from grpo_mesh import BATCH_AXES, replicated, to_host

if TYPE_CHECKING:
    from grpo_trainer.assemble.run import Assembly


def advantages(scored: Scored, config: Config) -> np.ndarray:
    """The advantage of each sequence, or of each token for the REINFORCE++ estimators.

    Args:
        scored: rewards of whole groups; unscored rows take no part and get 0.
        config: `loss.advantage` names the estimator.

    Returns:
        float32 [B] or [B, T].
    """
    reward_B, groups = scored.reward_B, {"scored_B": scored.scored_B, "group_B": scored.rollout.group_B}
    mask_BT = scored.rollout.completion_BT & scored.scored_B[:, None]
    match config.loss.advantage:
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
            rows = np.arange(len(reward_B))
            reward_BT[rows, scored.rollout.total_length_B - 1] = reward_B
            result = reinforce_plus_plus_advantage(reward_BT, mask_BT)
    return np.asarray(result, np.float32)


def learn(run: Assembly, state: TrainState, batch: TrainBatch, step: int) -> tuple[TrainState, dict[str, float]]:
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
        state, metrics = run.update(state, place(run, packed))
        results.append((metrics, packed.fill))
    return state, _merge([{**jax.device_get(metrics), "packing/fill": fill} for metrics, fill in results])


def updates(run: Assembly, params: Any, batch: TrainBatch, step: int) -> Iterator[PackedBatch]:
    """What each update of one rollout consumes, on the host.

    Args:
        run: the assembled run.
        params: before the first update: what old log-probabilities are taken under.
        batch: the rollout with rewards and advantages.
        step: of the run, from 0.

    Yields:
        One packed batch an update.
    """
    config, rollout = run.config, batch.scored.rollout
    several = config.loss.epochs * config.loss.minibatches > 1
    token_data: dict[str, np.ndarray] = {"sampler_logp": rollout.logp_BT}
    sequence_data: dict[str, np.ndarray] = {}
    (sequence_data if batch.advantage.ndim == 1 else token_data)["advantage"] = batch.advantage

    if several or run.reference is not None:
        everything = _packed(run, batch, keep_B=None)
        placed = place(run, everything)
        if several:
            token_data["old_logp"] = _scored(run, params, everything, placed, rollout.tokens_BT.shape)
        if run.reference is not None:
            token_data["reference_logp"] = _scored(run, run.reference, everything, placed, rollout.tokens_BT.shape)

    for epoch in range(config.loss.epochs):
        for keep_B in split_minibatches(
            rollout.group_B, config.loss.minibatches, seed=config.seed, step=step, epoch=epoch
        ):
            yield _packed(run, batch, keep_B).with_tokens(**token_data).with_sequences(**sequence_data)


def _packed(run: Assembly, batch: TrainBatch, keep_B: np.ndarray | None) -> PackedBatch:
    rollout, scored_B = batch.scored.rollout, batch.scored.scored_B
    return pack(
        rollout.tokens_BT,
        rollout.prompt_length_B,
        rollout.total_length_B,
        rollout.group_B,
        rollout.loss_mask_BT,
        shape=run.pack_shape,
        keep_B=scored_B if keep_B is None else scored_B & keep_B,
        pad_id=rollout.pad_id,
    )


def _scored(run: Assembly, params: Any, packed: PackedBatch, placed: PackedBatch, shape: tuple[int, int]) -> np.ndarray:
    """Log-probabilities [B, T] of the rollout's tokens under `params`."""
    logp_MRT, _ = run.score(params, placed)
    return unpack_tokens(to_host(logp_MRT), packed.micro.source_RT, shape)


def place(run: Assembly, packed: PackedBatch) -> PackedBatch:
    """Rows and prompts of every micro-batch over the mesh's data axes. Every process packed the same batch."""
    rows = NamedSharding(run.mesh, PartitionSpec(None, BATCH_AXES))

    def place(leaf: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, rows, lambda index: leaf[index])

    count = jax.make_array_from_callback((), replicated(run.mesh), lambda _: np.asarray(packed.count))
    return replace(packed, micro=jax.tree.map(place, packed.micro), count=count)


def _merge(results: list[Mapping[str, Any]]) -> dict[str, float]:
    return {
        name: float(max(values) if name.endswith("/max") else np.mean(values))
        for name in results[0]
        for values in [[result[name] for result in results]]
    } | {"skipped_in_a_row": _last_in_a_row([not result["finite"] for result in results])}


def _last_in_a_row(flags: list[bool]) -> float:
    """How many flags are set at the end of the list."""
    return float(next((n for n, flag in enumerate(reversed(flags)) if not flag), len(flags)))
