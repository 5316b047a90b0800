"""Importance weights for the gap between the engine that sampled and the network that is trained."""

from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_loss._errors import LossError, as_array, check_boolean, check_called, check_choice, check_number, check_shape
from grpo_loss._sequences import sequence_sum, spread

Level = Literal["token", "sequence"]
LEVELS = ("token", "sequence")


@runtime_checkable
class Correction(Protocol):
    """A bound on importance weights: a function from log-ratios (0 outside the mask) and segments to weights."""

    def __call__(
        self, log_ratio_RT: Float[Array, "R T"], segment_RT: Int[Array, "R T"] | None, /
    ) -> Float[Array, "R T"]:
        """The weight of each token."""
        ...


def truncate(high: float = 2.0, low: float = 0.0, level: Level = "token") -> Correction:
    """Clip importance weights to [low, high].

    Args:
        high: largest weight, at least 1.
        low: smallest weight, at most 1.
        level: "token": each token's own ratio (biased, because it ignores the other tokens, but of bounded variance);
            "sequence": the product over the sequence, given to each of its tokens (unbiased but for the bound).

    Returns:
        The correction: a function from log-ratios and segments to weights.

    Raises:
        LossError: an unknown level, or a range without 1.

    Source: Espeholt et al. arXiv:1802.01561; Yao et al., "Your efficient RL framework secretly brings you off-policy RL
        training" (2025).
    """
    _check_range(low, high, level)

    def correction(log_ratio_RT: Array, segment_RT: Array | None) -> Array:
        return jnp.clip(_ratio(log_ratio_RT, segment_RT, level), low, high)

    return correction


def drop_outside(high: float = 2.0, low: float = 0.0, level: Level = "token") -> Correction:
    """Set importance weights outside [low, high] to 0.

    The token, or sequence, then teaches nothing, but stays in the denominator.

    Args:
        high, low, level: as for `truncate`.

    Returns:
        The correction: a function from log-ratios and segments to weights.

    Raises:
        LossError: an unknown level, or a range without 1.

    Source: IcePop (Ring-1T, arXiv:2510.18855), with low=0.5, high=5.
    """
    _check_range(low, high, level)

    def correction(log_ratio_RT: Array, segment_RT: Array | None) -> Array:
        ratio_RT = _ratio(log_ratio_RT, segment_RT, level)
        return jnp.where((ratio_RT >= low) & (ratio_RT <= high), ratio_RT, 0)

    return correction


def importance_weight(
    logp_RT: Float[Array, "R T"],
    sampler_logp_RT: Float[Array, "R T"],
    mask_RT: Bool[Array, "R T"],
    correction: Correction,
    *,
    segment_RT: Int[Array, "R T"] | None = None,
) -> Float[Array, "R T"]:
    """The weight p_trainer / p_sampler of each token, bounded; a constant for differentiation.

    Args:
        logp_RT: log-probability under the trained network, at the parameters that sampled, nats.
        sampler_logp_RT: as the sampler reported it, nats.
        mask_RT: which tokens count; others get weight 0.
        correction: `truncate(...)`, `drop_outside(...)`, or your own.
        segment_RT: 0 at pads, 1.. for the sequences of a row; None where a row is one sequence.

    Returns:
        Weights, without gradient.

    Raises:
        LossError: shapes that differ, a mask that is not boolean, or a correction that is not a function.

    Source: see each correction.
    """
    check_called("correction", correction, [truncate, drop_outside], "truncate(high=2.0) or drop_outside(high=2.0)")
    check_boolean("mask_RT", mask_RT)
    logp_RT = jnp.asarray(as_array("logp_RT", logp_RT))
    sampler_logp_RT = jnp.asarray(as_array("sampler_logp_RT", sampler_logp_RT))
    mask_RT = jnp.asarray(mask_RT)
    segment_RT = None if segment_RT is None else jnp.asarray(as_array("segment_RT", segment_RT))
    for name, array in {"sampler_logp_RT": sampler_logp_RT, "mask_RT": mask_RT, "segment_RT": segment_RT}.items():
        if array is not None:
            check_shape(name, array.shape, logp_RT.shape, "It is aligned with logp_RT.")
    log_ratio_RT = jnp.where(mask_RT, jax.lax.stop_gradient(logp_RT - sampler_logp_RT), 0)
    return jnp.where(mask_RT, correction(log_ratio_RT, segment_RT), 0)


def _ratio(log_ratio_RT: Array, segment_RT: Array | None, level: Level) -> Array:
    if level == "sequence":
        total_RT = spread(sequence_sum(log_ratio_RT, segment_RT), segment_RT)
        log_ratio_RT = jnp.broadcast_to(total_RT, log_ratio_RT.shape)
    return jnp.exp(log_ratio_RT)


def _check_range(low: float, high: float, level: str) -> None:
    check_choice("level", level, LEVELS)
    check_number("low", low, 0.0)
    check_number("high", high, 0.0)
    if not (0 <= low <= 1 <= high and low < high):
        raise LossError(f"importance weights need 0 <= low <= 1 <= high and low < high: got low={low}, high={high}.")
