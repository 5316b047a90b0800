"""The policy loss: objective, correction, KL and entropy, averaged once and not yet divided."""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from grpo_loss._aggregate import Aggregation, token_mean, token_weights
from grpo_loss._errors import LossError, as_array, check_boolean, check_called, check_number, check_shape
from grpo_loss._importance import Correction, importance_weight
from grpo_loss._kl import KL, kl_estimate
from grpo_loss._layout import MicroBatch
from grpo_loss._objectives import (
    Objective,
    Surrogate,
    TokenTerms,
    bounded_exp,
    cispo,
    gspo,
    gspo_token,
    ppo,
    reinforce,
    sapo,
)
from grpo_loss._terms import Loss, LossTerms

_PPO = ppo()


def policy_loss(
    logp_RT: Float[Array, "R T"],
    *,
    advantage_RT: Float[Array, "R #T"],
    mask_RT: Bool[Array, "R T"],
    old_logp_RT: Float[Array, "R T"] | None = None,
    segment_RT: Int[Array, "R T"] | None = None,
    reference_logp_RT: Float[Array, "R T"] | None = None,
    entropy_RT: Float[Array, "R T"] | None = None,
    sampler_logp_RT: Float[Array, "R T"] | None = None,
    objective: Objective = _PPO,
    aggregation: Aggregation = token_mean,
    kl: KL | None = None,
    entropy_coefficient: float | Float[Array, ""] = 0.0,
    correction: Correction | None = None,
) -> LossTerms:
    """A policy-gradient loss over padded or packed tokens, as sums that add up over parts of a batch.

    A token's loss is -objective × correction + coefficient × KL - entropy_coefficient × entropy. The three terms are
    averaged together by `aggregation` over the tokens of `mask_RT`; outside the mask nothing is read.

    Every objective of this library is proportional to the size of the advantage, so a weight for each token is a factor
    on `advantage_RT` (as with `top_entropy_mask`); denominators, KL and entropy do not see it.

    Args:
        logp_RT: log-probability of each token under the trained policy, nats. Gradients flow to it and to
            `entropy_RT` alone.
        advantage_RT: one per token, or [R, 1] for padded rows.
        mask_RT: the tokens that count (completions).
        old_logp_RT: log-probabilities at the parameters the rollout's updates started from, nats. None: `logp_RT`
            itself (the first update after a rollout), so every ratio is 1.
        segment_RT: 0 at pads, 1.. for the sequences of a packed row, each within one row; None where a row is one
            sequence.
        reference_logp_RT: under the reference policy, nats; enough for the metric, needed by `kl`.
        entropy_RT: entropy at each token, nats; enough for the metric, needed by `entropy_coefficient`.
        sampler_logp_RT: as the sampling engine reported them, nats; enough for the metrics, needed by `correction`.
        objective: `ppo()`, `gspo()`, `gspo_token()`, `cispo()`, `sapo()`, `reinforce()`, or your own function.
        aggregation: how tokens are averaged: `token_mean`, `sequence_mean_token_mean`, `sequence_mean_token_sum`,
            `fixed(horizon)`, or your own.
        kl: KL term, such as `KL("k3", 0.001)`.
        entropy_coefficient: weight of the entropy bonus.
        correction: bound on p_trainer / p_sampler, `truncate()` or `drop_outside()`: a factor on the objective,
            computed from the old and the sampler's log-probabilities by `importance_weight`.

    Returns:
        LossTerms. Metrics, means over tokens: policy_loss (averaged as the loss is), importance_ratio/mean; for
        objectives with bounds clip_ratio/low, clip_ratio/high, clip_ratio/region; where their inputs are given kl,
        entropy, sampling_logp_difference/mean (|old - sampler|), sampling_weight/mean. Maxima: importance_ratio/max,
        sampling_logp_difference/max.

    Raises:
        LossError: shapes that differ, a mask that is not boolean, or a term whose input is missing.

    Source: see each objective, aggregation, `KL` and correction.
    """
    check_called(
        "objective", objective, [ppo, gspo, gspo_token, cispo, sapo, reinforce], "ppo(), gspo(), cispo() or sapo()"
    )
    logp_RT, advantage_RT, mask_RT = (
        jnp.asarray(as_array(name, array))
        for name, array in (("logp_RT", logp_RT), ("advantage_RT", advantage_RT), ("mask_RT", mask_RT))
    )
    segment_RT, old_logp_RT, reference_logp_RT, entropy_RT, sampler_logp_RT = (
        None if array is None else jnp.asarray(as_array(name, array))
        for name, array in (
            ("segment_RT", segment_RT),
            ("old_logp_RT", old_logp_RT),
            ("reference_logp_RT", reference_logp_RT),
            ("entropy_RT", entropy_RT),
            ("sampler_logp_RT", sampler_logp_RT),
        )
    )
    has_entropy_term = not _is_zero(entropy_coefficient)
    check_number("entropy_coefficient", entropy_coefficient, 0.0)
    _check_given("kl", None if kl is None or _is_zero(kl.coefficient) else kl, "reference_logp_RT", reference_logp_RT)
    _check_given("entropy_coefficient", entropy_coefficient if has_entropy_term else None, "entropy_RT", entropy_RT)
    _check_given("correction", correction, "sampler_logp_RT", sampler_logp_RT)
    _check_arrays(
        logp_RT,
        advantage_RT,
        mask_RT,
        segment_RT=segment_RT,
        old_logp_RT=old_logp_RT,
        reference_logp_RT=reference_logp_RT,
        entropy_RT=entropy_RT,
        sampler_logp_RT=sampler_logp_RT,
    )
    dtype = jnp.promote_types(logp_RT.dtype, jnp.float32)

    def masked(array_RT: Array) -> Array:
        # Whatever lies in the padding (garbage, inf, NaN) reaches neither a value nor a gradient.
        return jnp.where(mask_RT, array_RT.astype(dtype), 0)

    logp_RT = masked(logp_RT)
    start_logp_RT = stop_gradient(logp_RT if old_logp_RT is None else masked(old_logp_RT))
    log_ratio_RT = logp_RT - start_logp_RT
    advantage_RT = masked(stop_gradient(advantage_RT))
    token_weight_RT, denominator = token_weights(mask_RT, aggregation, segment_RT, dtype)
    tokens = mask_RT.sum().astype(dtype)
    metrics: dict[str, tuple[Array, Array]] = {}
    maxima: dict[str, Array] = {}

    def report(name: str, value_RT: Array) -> None:
        metrics[name] = (masked(stop_gradient(value_RT)).sum(), tokens)

    surrogate = objective(TokenTerms(logp_RT, log_ratio_RT, advantage_RT, mask_RT, segment_RT))
    if not isinstance(surrogate, Surrogate):
        raise LossError(f"objective must return a Surrogate: got a {type(surrogate).__name__}.")
    loss_RT = -surrogate.objective_RT
    report("importance_ratio/mean", surrogate.ratio_RT)
    maxima["importance_ratio/max"] = masked(surrogate.ratio_RT).max()
    if surrogate.clipped_low_RT is not None and surrogate.clipped_high_RT is not None:
        report("clip_ratio/low", surrogate.clipped_low_RT)
        report("clip_ratio/high", surrogate.clipped_high_RT)
        report("clip_ratio/region", surrogate.clipped_low_RT | surrogate.clipped_high_RT)
    if sampler_logp_RT is not None:
        gap_RT = jnp.abs(start_logp_RT - masked(stop_gradient(sampler_logp_RT)))
        report("sampling_logp_difference/mean", gap_RT)
        maxima["sampling_logp_difference/max"] = masked(gap_RT).max()
        if correction is not None:
            weight_RT = importance_weight(
                start_logp_RT, masked(sampler_logp_RT), mask_RT, correction, segment_RT=segment_RT
            )
            report("sampling_weight/mean", weight_RT)
            loss_RT = loss_RT * weight_RT
    parts = {"policy_loss": stop_gradient(jnp.sum(loss_RT * token_weight_RT))}
    if reference_logp_RT is not None:
        kl_RT = kl_estimate(logp_RT, masked(reference_logp_RT), "k3" if kl is None else kl.estimator)
        report("kl", kl_RT)
        if kl is not None and not _is_zero(kl.coefficient):
            loss_RT = loss_RT + kl.coefficient * (kl_RT * bounded_exp(log_ratio_RT) if kl.ratio else kl_RT)
    if entropy_RT is not None:
        report("entropy", entropy_RT)
        if has_entropy_term:
            loss_RT = loss_RT - entropy_coefficient * masked(entropy_RT)
    return LossTerms(jnp.sum(loss_RT * token_weight_RT), denominator, metrics, maxima, parts)


def make_loss(
    *,
    objective: Objective = _PPO,
    aggregation: Aggregation = token_mean,
    kl: KL | None = None,
    entropy_coefficient: float | Float[Array, ""] = 0.0,
    correction: Correction | None = None,
) -> Loss:
    """`policy_loss` as a function of a packed micro-batch, for `make_update`.

    Args:
        objective, aggregation, kl, entropy_coefficient, correction: as for `policy_loss`.

    Returns:
        `(logp_RT, entropy_RT, micro) -> LossTerms`.

    Raises:
        LossError: raised by the returned function where the micro-batch lacks a field that a term needs.

    Source: as for `policy_loss`.
    """

    def loss(logp_RT: Float[Array, "R T"], entropy_RT: Float[Array, "R T"], micro: MicroBatch) -> LossTerms:
        return policy_loss(
            logp_RT,
            advantage_RT=micro.advantage_RT,
            mask_RT=micro.mask_RT,
            old_logp_RT=micro.old_logp_RT,
            segment_RT=micro.segment_RT,
            reference_logp_RT=micro.reference_logp_RT,
            entropy_RT=entropy_RT,
            sampler_logp_RT=micro.sampler_logp_RT,
            objective=objective,
            aggregation=aggregation,
            kl=kl,
            entropy_coefficient=entropy_coefficient,
            correction=correction,
        )

    return loss


def _is_zero(coefficient: object) -> bool:
    # A traced coefficient (an adaptive one) is never taken for a literal zero.
    return isinstance(coefficient, int | float) and coefficient == 0


def _check_given(name: str, value: object, needed: str, array: object) -> None:
    if value is not None and array is None:
        raise LossError(f"{name} needs {needed}: got None. Pass the array, or leave {name} out.")


def _check_arrays(logp_RT: Array, advantage_RT: Array, mask_RT: Array, **arrays: Array | None) -> None:
    shape = logp_RT.shape
    if len(shape) != 2:
        raise LossError(f"logp_RT must have two axes, rows and positions: got shape {shape}.")
    for name, array in {"mask_RT": mask_RT, **arrays}.items():
        if array is not None:
            check_shape(name, array.shape, shape, "It is aligned with logp_RT.")
    check_boolean("mask_RT", mask_RT)
    if advantage_RT.shape != shape and not (arrays["segment_RT"] is None and advantage_RT.shape == (shape[0], 1)):
        raise LossError(
            f"advantage_RT must have shape {shape}, or {(shape[0], 1)} for padded rows: got {advantage_RT.shape}. "
            "For one value per sequence pass advantage_B[:, None], or gather it to the packed tokens."
        )
