"""The policy loss: objective, corrections, KL and entropy, averaged once and not yet divided."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._aggregate import Aggregation, token_weights
from ._errors import LossError, check_shape, check_unused
from ._importance import Correction, Level, importance_weight
from ._kl import KlKind, check_loss_kl, kl_estimate
from ._surrogates import Kind, resolve_clip, resolve_temperatures, surrogate
from ._terms import LossTerms


def policy_loss(
    logp_RT: Float[Array, "R T"],
    *,
    old_logp_RT: Float[Array, "R T"] | None,
    advantage_RT: Float[Array, "R #T"],
    mask_RT: Bool[Array, "R T"],
    segment_RT: Int[Array, "R T"] | None = None,
    kind: Kind = "ppo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    sapo_temperatures: tuple[float, float] | None = None,
    aggregation: Aggregation = "token-mean",
    horizon: int | None = None,
    weight_RT: Float[Array, "R T"] | None = None,
    reference_logp_RT: Float[Array, "R T"] | None = None,
    kl: KlKind = "k3",
    kl_coefficient: float = 0.0,
    kl_ratio: bool = False,
    entropy_RT: Float[Array, "R T"] | None = None,
    entropy_coefficient: float = 0.0,
    sampler_logp_RT: Float[Array, "R T"] | None = None,
    correction: Correction = "none",
    correction_level: Level | None = None,
    correction_low: float | None = None,
    correction_high: float | None = None,
) -> LossTerms:
    """A policy-gradient loss over padded or packed tokens, as sums that add up over parts of a batch.

    With r = exp(logp - old_logp) of a token, A its advantage and L, H the bounds 1 - clip_low, 1 + clip_high, a token's
    objective is
        "ppo":        min(r A, clip(r, L, H) A); with dual_clip c, at least c A where A < 0. [PPO, GRPO, DAPO, Dr.GRPO]
        "gspo":       the same with r = exp(mean of logp - old_logp over the sequence).
        "gspo-token": the same in value, each token's gradient through its own logp; equal to "gspo" where A is constant
                      within sequences and they are averaged by "sequence-mean-token-mean".
        "cispo":      stop_gradient(clip(r, L, H)) A logp.
        "sapo":       4/t sigmoid(t (r - 1)) A with t = sapo_temperatures[0] where A > 0, else sapo_temperatures[1].
        "reinforce":  A logp.
    A token's loss is -objective × weight × correction + kl_coefficient × KL - entropy_coefficient × entropy, and the
    three terms are averaged together by `aggregation` over the tokens of `mask_RT`. Outside the mask nothing is read.

    Args:
        logp_RT: log-probability of each token under the policy that is trained, nats. The only array, with
            `entropy_RT`, that gradients flow to.
        old_logp_RT: at the parameters that the rollout's updates started from. None says that `logp_RT` is that
            itself (the first update after a rollout), so every ratio is 1.
        advantage_RT: one for each token, or [R, 1] for padded rows.
        mask_RT: the tokens that count (completions).
        segment_RT: 0 at pads, 1.. for the sequences of a packed row; None where a row is one sequence. A sequence
            lies in one row.
        kind: the objective, see above.
        clip_low, clip_high: ratio bounds, both or neither; default 0.2, 0.2 (gspo: 3e-4, 4e-4; cispo: 1, 4, which is
            no lower bound and a cap of 5).
        dual_clip: for "ppo", cap on the ratio of tokens with a negative advantage; > 1.
        sapo_temperatures: for "sapo"; default (1.0, 1.05).
        aggregation, horizon: how tokens are averaged, see `aggregate`.
        weight_RT: a constant factor on the objective alone (such as `top_entropy_mask`); denominators, KL and entropy
            do not see it.
        reference_logp_RT: under the reference policy; enough for the metric, needed for the coefficient.
        kl, kl_coefficient: estimator (see `kl_estimate`) and its weight in the loss.
        kl_ratio: multiply the KL estimate by the token's r and differentiate through it, which makes the gradient of
            k3 that of KL(policy || reference) at each visited prefix, also off-policy.
        entropy_RT: entropy at each token, nats.
        entropy_coefficient: weight of the entropy bonus.
        sampler_logp_RT: as the sampling engine reported them; enough for the metrics, needed for `correction`.
        correction: bound on p_trainer / p_sampler, see `importance_weight`, which is given old_logp and sampler_logp.
        correction_level, correction_low, correction_high: its level, low and high; default "token", 0, 2.

    Returns:
        LossTerms. Metrics, means over tokens: policy_loss (averaged as the loss is), importance_ratio/mean; for clipped
        kinds clip_ratio/low, clip_ratio/high, clip_ratio/region; where their inputs are given kl, entropy,
        sampling_logp_difference/mean (|old - sampler|), sampling_weight/mean. Maxima: importance_ratio/max,
        sampling_logp_difference/max.

    Raises:
        LossError: an unknown name, differing shapes, or an argument that would silently do nothing.

    Source: PPO arXiv:1707.06347; dual clip arXiv:1912.09729; GRPO arXiv:2402.03300; DAPO arXiv:2503.14476;
        Dr.GRPO arXiv:2503.20783; GSPO arXiv:2507.18071; CISPO arXiv:2506.13585; SAPO arXiv:2511.20347;
        KL with ratio: DeepSeek-V3.2 arXiv:2512.02556.
    """
    clip = resolve_clip(kind, clip_low, clip_high, dual_clip)
    temperatures = resolve_temperatures(kind, sapo_temperatures)
    check_loss_kl(kl)
    _check_needs("kl_coefficient", kl_coefficient, "reference_logp_RT", reference_logp_RT)
    _check_needs("entropy_coefficient", entropy_coefficient, "entropy_RT", entropy_RT)
    _check_needs("correction", 0.0 if correction == "none" else correction, "sampler_logp_RT", sampler_logp_RT)
    if correction == "none":
        check_unused(
            "correction='none'",
            "the other corrections",
            correction_level=correction_level,
            correction_low=correction_low,
            correction_high=correction_high,
        )
    if kl_ratio and _is_zero(kl_coefficient):
        raise LossError("kl_ratio=True has no effect with kl_coefficient=0. Set the coefficient or leave kl_ratio out.")
    shape = logp_RT.shape
    for name, array in {
        "mask_RT": mask_RT,
        "segment_RT": segment_RT,
        "old_logp_RT": old_logp_RT,
        "weight_RT": weight_RT,
        "reference_logp_RT": reference_logp_RT,
        "entropy_RT": entropy_RT,
        "sampler_logp_RT": sampler_logp_RT,
    }.items():
        if array is not None:
            check_shape(name, array.shape, shape, "It is aligned with logp_RT.")
    if advantage_RT.shape != shape and not (segment_RT is None and advantage_RT.shape == (shape[0], 1)):
        raise LossError(
            f"advantage_RT must have shape {shape}, or {(shape[0], 1)} for padded rows: got {advantage_RT.shape}. "
            "For one value a sequence pass advantage_B[:, None], or gather it to the packed tokens."
        )

    dtype = jnp.promote_types(logp_RT.dtype, jnp.float32)
    constant = jax.lax.stop_gradient

    def kept(array_RT: Array) -> Array:
        # Whatever lies in the padding (garbage, inf, NaN) reaches neither a value nor a gradient.
        return jnp.where(mask_RT, array_RT.astype(dtype), 0)

    logp_RT = kept(logp_RT)
    start_logp_RT = constant(logp_RT if old_logp_RT is None else kept(old_logp_RT))
    log_ratio_RT = logp_RT - start_logp_RT
    advantage_RT = kept(constant(advantage_RT))
    token_weight_RT, denominator = token_weights(
        mask_RT, aggregation=aggregation, horizon=horizon, segment_RT=segment_RT, dtype=dtype
    )
    tokens = mask_RT.sum().astype(dtype)
    metrics: dict[str, tuple[Array, Array]] = {}
    maxima: dict[str, Array] = {}

    def report(name: str, value_RT: Array) -> None:
        metrics[name] = (kept(constant(value_RT)).sum(), tokens)

    parts = surrogate(
        logp_RT,
        log_ratio_RT,
        advantage_RT,
        mask_RT,
        segment_RT,
        kind=kind,
        clip=clip,
        dual_clip=dual_clip,
        sapo_temperatures=temperatures,
    )
    loss_RT = -parts.objective_RT
    report("importance_ratio/mean", parts.ratio_RT)
    maxima["importance_ratio/max"] = kept(parts.ratio_RT).max()
    if parts.clipped_low_RT is not None and parts.clipped_high_RT is not None:
        report("clip_ratio/low", parts.clipped_low_RT)
        report("clip_ratio/high", parts.clipped_high_RT)
        report("clip_ratio/region", parts.clipped_low_RT | parts.clipped_high_RT)
    if weight_RT is not None:
        loss_RT = loss_RT * kept(constant(weight_RT))
    if sampler_logp_RT is not None:
        gap_RT = jnp.abs(start_logp_RT - kept(constant(sampler_logp_RT)))
        report("sampling_logp_difference/mean", gap_RT)
        maxima["sampling_logp_difference/max"] = kept(gap_RT).max()
        if correction != "none":
            correction_RT = importance_weight(
                start_logp_RT,
                kept(sampler_logp_RT),
                mask_RT,
                correction=correction,
                level=correction_level or "token",
                low=0.0 if correction_low is None else correction_low,
                high=2.0 if correction_high is None else correction_high,
                segment_RT=segment_RT,
            )
            report("sampling_weight/mean", correction_RT)
            loss_RT = loss_RT * correction_RT
    metrics["policy_loss"] = (constant(jnp.sum(loss_RT * token_weight_RT)), denominator)
    if reference_logp_RT is not None:
        kl_RT = kl_estimate(logp_RT, kept(reference_logp_RT), kl=kl)
        report("kl", kl_RT)
        if not _is_zero(kl_coefficient):
            loss_RT = loss_RT + kl_coefficient * (kl_RT * jnp.exp(log_ratio_RT) if kl_ratio else kl_RT)
    if entropy_RT is not None:
        report("entropy", entropy_RT)
        if not _is_zero(entropy_coefficient):
            loss_RT = loss_RT - entropy_coefficient * kept(entropy_RT)
    return LossTerms(jnp.sum(loss_RT * token_weight_RT), denominator, metrics, maxima)


def _is_zero(coefficient: object) -> bool:
    # A traced coefficient (an adaptive one) is never taken for a literal zero.
    return isinstance(coefficient, int | float) and coefficient == 0


def _check_needs(name: str, value: object, needed: str, array: object) -> None:
    if not _is_zero(value) and array is None:
        raise LossError(f"{name}={value} needs {needed}: got None. Pass the array, or leave {name} out.")
    if isinstance(value, int | float) and value < 0:
        raise LossError(f"{name} must not be negative: got {value}.")
