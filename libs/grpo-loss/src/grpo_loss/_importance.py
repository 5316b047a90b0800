"""Importance weights for the gap between the engine that sampled and the network that is trained."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._errors import LossError, check_choice
from ._sequences import sequence_sum, spread

Correction = Literal["none", "truncate", "mask"]
CORRECTIONS = ("none", "truncate", "mask")
Level = Literal["token", "sequence"]
LEVELS = ("token", "sequence")


def importance_weight(
    logp_RT: Float[Array, "R T"],
    sampler_logp_RT: Float[Array, "R T"],
    mask_RT: Bool[Array, "R T"],
    *,
    correction: Correction = "truncate",
    level: Level = "token",
    low: float = 0.0,
    high: float = 2.0,
    segment_RT: Int[Array, "R T"] | None = None,
) -> Float[Array, "R T"]:
    """The weight p_trainer / p_sampler of each token, bounded; a constant for differentiation.

    Args:
        logp_RT: log-probability under the network that is trained, at the parameters that sampled.
        sampler_logp_RT: as the sampler reported it.
        mask_RT: which tokens count; others get weight 0.
        correction: "truncate": weights are clipped to [low, high]. "mask": weights outside [low, high] become 0
            (the token, or sequence, teaches nothing, but stays in the denominator).
            "none": 1 everywhere.
        level: "token": each token's own ratio (biased by ignoring the others, bounded variance);
            "sequence": the product over the sequence, given to each of its tokens (unbiased but for the bound).
        low: smallest weight.
        high: largest weight.
        segment_RT: 0 at pads, 1.. for the sequences of a row; None where a row is one sequence.

    Returns:
        Weights, without gradient.

    Raises:
        LossError: unknown correction or level, or an empty range.

    Source: truncated: Espeholt et al. arXiv:1802.01561, Yao et al. "Your efficient RL framework secretly brings you
        off-policy RL training" (2025); masked: IcePop (Ring-1T, arXiv:2510.18855).
    """
    check_choice("correction", correction, CORRECTIONS)
    check_choice("level", level, LEVELS)
    if not 0 <= low < high or (low > 1 or high < 1):
        raise LossError(f"importance weights need 0 <= low <= 1 <= high and low < high: got low={low}, high={high}.")
    log_ratio_RT = jnp.where(mask_RT, jax.lax.stop_gradient(logp_RT - sampler_logp_RT), 0)
    if correction == "none":
        return mask_RT.astype(log_ratio_RT.dtype)
    if level == "sequence":
        log_ratio_RT = jnp.broadcast_to(spread(sequence_sum(log_ratio_RT, segment_RT), segment_RT), mask_RT.shape)
    ratio_RT = jnp.exp(log_ratio_RT)
    if correction == "truncate":
        weight_RT = jnp.clip(ratio_RT, low, high)
    else:
        weight_RT = jnp.where((ratio_RT >= low) & (ratio_RT <= high), ratio_RT, 0)
    return jnp.where(mask_RT, weight_RT, 0)
