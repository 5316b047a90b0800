"""One rollout's updates: advantages, minibatches, optimizer steps, and their metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_contracts import FinishReason, Scored, TrainBatch
from grpo_loss import (
    PackedBatch,
    TrainState,
    computed_positions,
    drop_truncated,
    gdpo_advantage,
    group_advantage,
    iterate_minibatches,
    kl_estimate,
    reinforce_plus_plus_advantage,
    reinforce_plus_plus_baseline_advantage,
    rloo_advantage,
    top_entropy_mask,
    unpack_tokens,
)
from grpo_mesh import to_global, to_host
from grpo_trainer.assemble import Run
from grpo_trainer.assemble.objective import idle_aggregation
from grpo_trainer.settings.schema import Settings

__all__ = ["advantages", "learn", "make_batch", "place", "updates"]

_WITHOUT_TOKENS = ("loss", "policy_loss", "denominator", "grad_norm", "update_norm", "finite")


def advantages(scored: Scored, settings: Settings) -> np.ndarray:
    """The advantage of each sequence, or of each token for the REINFORCE++ estimators.

    Args:
        scored: rewards of whole groups; unscored rows take no part and get 0.
        settings: `loss.advantage` names the estimator.

    Returns:
        float32 [B] or [B, T].
    """
    loss, reward_B = settings.loss, scored.reward_B
    groups = {"scored_B": scored.scored_B, "group_B": scored.rollout.group_B}
    mask_BT = scored.rollout.completion_BT & scored.scored_B[:, None]
    match loss.advantage:
        case "grpo":
            result = group_advantage(reward_B, **groups)
        case "dr-grpo":
            result = group_advantage(reward_B, **groups, scale="none")
        case "batch-std":
            result = group_advantage(reward_B, **groups, scale="batch")
        case "rloo":
            result = rloo_advantage(reward_B, **groups)
        case "gdpo":
            # As in the sum: a row counts only where every function of non-zero weight could score it.
            scored_BN = scored.scored_BN & scored.scored_B[:, None]
            group_B = scored.rollout.group_B
            result = gdpo_advantage(scored.reward_BN, scored.weight_N, scored_BN=scored_BN, group_B=group_B)
        case "reinforce++-baseline":
            result = reinforce_plus_plus_baseline_advantage(reward_B, mask_BT, **groups)
        case "reinforce++":
            # The outcome reward stands on each completion's last token.
            reward_BT = np.zeros(mask_BT.shape, np.float32)
            reward_BT[np.arange(len(reward_B)), scored.rollout.total_length_B - 1] = reward_B
            result = reinforce_plus_plus_advantage(reward_BT, mask_BT)
    if loss.clip_advantage is not None:
        result = np.clip(result, -loss.clip_advantage, loss.clip_advantage)
    return np.asarray(result, np.float32)


def make_batch(run: Run, params: Any, scored: Scored) -> TrainBatch:
    """What a rollout's updates learn from.

    Args:
        run: the assembled run.
        params: that drew the rollout.
        scored: the rollout with its rewards.

    Returns:
        The rollout with rewards, masks, advantages, and the log-probabilities that were needed on the way.
    """
    settings, loss = run.settings, run.settings.loss
    if loss.drop_truncated:
        scored = _without_truncated(scored)
    in_reward = loss.kl_in == "reward" and run.reference is not None
    if not in_reward and loss.top_entropy is None:
        return TrainBatch(scored, advantages(scored, settings))
    # Both change the advantages by log-probabilities, so these are computed before any update is packed for good.
    blank = TrainBatch(scored, np.zeros(len(scored.reward_B), np.float32))
    packed = next(iterate_minibatches(blank, shape=run.plan.pack_shapes, seed=settings.seed, step=0))
    old_logp_BT, entropy_BT = _score(run, params, packed, scored)
    mask_BT = scored.rollout.loss_mask_BT & scored.scored_B[:, None]
    reference_logp_BT = None
    if in_reward:
        reference_logp_BT, _ = _score(run, run.reference, packed, scored)
        kl_BT = np.where(
            mask_BT, np.asarray(kl_estimate(jnp.asarray(old_logp_BT), jnp.asarray(reference_logp_BT), loss.kl)), 0
        )
        reward_B = (scored.reward_B - loss.kl_coefficient * kl_BT.sum(1)).astype(np.float32)
        advantage = advantages(replace(scored, reward_B=np.where(scored.scored_B, reward_B, 0)), settings)
    else:
        advantage = advantages(scored, settings)
    if loss.top_entropy is not None:
        kept_BT = np.asarray(top_entropy_mask(entropy_BT, mask_BT, fraction=loss.top_entropy))
        advantage = (advantage[:, None] if advantage.ndim == 1 else advantage) * kept_BT.astype(np.float32)
    return TrainBatch(scored, advantage, old_logp_BT, reference_logp_BT)


def _without_truncated(scored: Scored) -> Scored:
    rollout = scored.rollout
    mask_BT = drop_truncated(rollout.loss_mask_BT, rollout.finish_B == FinishReason.LENGTH)
    return replace(scored, rollout=replace(rollout, loss_mask_BT=np.asarray(mask_BT)))


def _score(run: Run, params: Any, packed: PackedBatch, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and entropies [B, T] of the rollout's tokens under `params`."""
    shape = scored.rollout.tokens_BT.shape
    logp_BT, entropy_BT = (
        unpack_tokens(to_host(part_MRT), packed.micro.source_RT, shape)
        for part_MRT in run.plan.score(params, place(run, packed), *run.frozen)
    )
    return logp_BT, entropy_BT


def learn(run: Run, state: TrainState, batch: TrainBatch, step: int) -> tuple[TrainState, dict[str, float]]:
    """Every update of one rollout.

    Args:
        run: the assembled run.
        state: before; it is donated.
        batch: the rollout with rewards and advantages.
        step: of the run, from 0; with the seed it decides how minibatches are drawn.

    Returns:
        The state after, and the metrics of the updates: means over them, maxima where the name ends in `/max`, and
        `skipped_in_a_row`, how many of the last ones were not finite. Means over tokens are over those that were
        computed, and absent where there were none.
    """
    results, computed = [], 0
    for packed in updates(run, state.params, batch, step):
        state, metrics = run.plan.update(state, place(run, packed), *run.frozen)
        results.append((metrics, packed))
        computed += int(packed.micro.mask_RT.sum())
    counted = int((batch.scored.rollout.loss_mask_BT & batch.scored.scored_B[:, None]).sum())
    idle = 1 - computed / max(1, counted * run.settings.loss.epochs)
    measured = [_measured(run, *result) for result in jax.device_get(results)]
    return state, _merge(measured) | {"packing/idle": idle}


def _measured(run: Run, metrics: Mapping[str, Any], packed: PackedBatch) -> dict[str, Any]:
    if not packed.count:
        return {name: metrics[name] for name in _WITHOUT_TOKENS}
    chunk = run.settings.loss.chunk or None
    parts = computed_positions(packed, vocabulary=run.plan.model.vocab_size, chunk=chunk)
    computed, live = (sum(parts[name][i] for name in ("rows", "prompts")) for i in (0, 1))
    return {
        **metrics,
        "packing/fill": packed.fill,
        "packing/positions_per_token": computed / live,
        **{f"packing/positions_per_token/{name}": part[0] / part[1] for name, part in parts.items() if part[1]},
    }


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
        return to_host(run.plan.score(params, place(run, packed), *run.frozen)[0])

    loss, reference = run.settings.loss, run.reference
    return iterate_minibatches(
        batch,
        shape=run.plan.pack_shapes,
        epochs=loss.epochs,
        minibatches=loss.minibatches,
        seed=run.settings.seed,
        step=step,
        old=lambda packed: log_probabilities(params, packed),
        reference=None if reference is None else lambda packed: log_probabilities(reference, packed),
        idle=idle_aggregation(run.settings),
    )


def place(run: Run, packed: PackedBatch) -> PackedBatch:
    """Rows and prompts of every micro-batch over the mesh's data axes. Every process packed the same batch."""
    return to_global(packed, run.plan.rows_sharding)


def _merge(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        name: float(max(values) if name.endswith("/max") else np.mean(values))
        for name in dict.fromkeys(name for result in results for name in result)
        for values in [[result[name] for result in results if name in result]]
    } | {"skipped_in_a_row": _last_in_a_row([not result["finite"] for result in results])}


def _last_in_a_row(flags: list[bool]) -> float:
    """How many flags are set at the end of the list."""
    return float(next((n for n, flag in enumerate(reversed(flags)) if not flag), len(flags)))
