"""The per-token objectives of the published policy losses: what is maximised, before any averaging."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._errors import LossError, check_choice, check_unused
from ._sequences import sequence_mean

Kind = Literal["ppo", "gspo", "gspo-token", "cispo", "sapo", "reinforce"]
KINDS = ("ppo", "gspo", "gspo-token", "cispo", "sapo", "reinforce")

# The papers' ranges: PPO; GSPO sec. 5.1; CISPO without a lower bound, capped at 5 as in ScaleRL (arXiv:2510.13786).
DEFAULT_CLIP = {"ppo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "gspo-token": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
DEFAULT_SAPO_TEMPERATURES = (1.0, 1.05)

_HINTS = {
    "grpo": "GRPO is kind='ppo' with group_advantage(...) and aggregation='sequence-mean-token-mean'.",
    "dapo": "DAPO is kind='ppo' with clip_low=0.2, clip_high=0.28 and aggregation='token-mean'.",
    "dr-grpo": "Dr.GRPO is kind='ppo' with group_advantage(scale='none') and aggregation='fixed'.",
    "rloo": "RLOO is kind='reinforce' (or 'ppo') with rloo_advantage(...).",
    "reinforce++": "REINFORCE++ is kind='ppo' with reinforce_plus_plus_advantage(...).",
}


class Surrogate(NamedTuple):
    """A token objective and what to report about it.

    Attributes:
        objective_RT: to be maximised.
        ratio_RT: the importance ratio that the kind uses (the token's, or its sequence's), without gradient.
        clipped_low_RT, clipped_high_RT: where a bound took the gradient away (CISPO: where a bound binds);
            None for kinds without bounds.
    """

    objective_RT: Float[Array, "R T"]
    ratio_RT: Float[Array, "R T"]
    clipped_low_RT: Bool[Array, "R T"] | None
    clipped_high_RT: Bool[Array, "R T"] | None


def surrogate(
    logp_RT: Float[Array, "R T"],
    log_ratio_RT: Float[Array, "R T"],
    advantage_RT: Float[Array, "R T"],
    mask_RT: Bool[Array, "R T"],
    segment_RT: Int[Array, "R T"] | None,
    *,
    kind: Kind,
    clip: tuple[float, float] | None,
    dual_clip: float | None,
    sapo_temperatures: tuple[float, float],
) -> Surrogate:
    """The token objective of a kind; arguments are already checked and 0 outside the mask. See `policy_loss`."""
    constant = jax.lax.stop_gradient
    if kind in ("gspo", "gspo-token"):
        log_ratio_RT = jnp.broadcast_to(
            sequence_mean(log_ratio_RT, mask_RT.astype(log_ratio_RT.dtype), segment_RT), mask_RT.shape
        )
    if kind == "gspo-token":
        # The sequence's ratio in value, the token's own log-probability in gradient.
        log_ratio_RT = constant(log_ratio_RT) + (logp_RT - constant(logp_RT))
    ratio_RT = jnp.exp(log_ratio_RT)

    if clip is None:
        if kind == "sapo":
            positive, negative = sapo_temperatures
            temperature_RT = jnp.where(advantage_RT > 0, positive, negative)
            gate_RT = jax.nn.sigmoid(temperature_RT * (ratio_RT - 1)) * 4 / temperature_RT
            return Surrogate(gate_RT * advantage_RT, constant(ratio_RT), None, None)
        return Surrogate(logp_RT * advantage_RT, constant(ratio_RT), None, None)

    low, high = 1 - clip[0], 1 + clip[1]
    bounded_RT = jnp.clip(ratio_RT, low, high)
    if kind == "cispo":
        objective_RT = constant(bounded_RT) * advantage_RT * logp_RT
        return Surrogate(objective_RT, constant(ratio_RT), ratio_RT < low, ratio_RT > high)
    clipped_low_RT = (ratio_RT < low) & (advantage_RT < 0)
    clipped_high_RT = (ratio_RT > high) & (advantage_RT > 0)
    # `where` in place of `minimum`: at a tie `minimum` would halve the gradient between the branches.
    objective_RT = jnp.where(clipped_low_RT | clipped_high_RT, constant(bounded_RT), ratio_RT) * advantage_RT
    if dual_clip is not None:
        capped_RT = (ratio_RT > dual_clip) & (advantage_RT < 0)
        objective_RT = jnp.where(capped_RT, dual_clip * advantage_RT, objective_RT)
        clipped_high_RT = clipped_high_RT | capped_RT
    return Surrogate(objective_RT, constant(ratio_RT), clipped_low_RT, clipped_high_RT)


def resolve_clip(
    kind: str, clip_low: float | None, clip_high: float | None, dual_clip: float | None
) -> tuple[float, float] | None:
    """The clip range of a kind, or None if it has none.

    Raises:
        LossError: unknown kind, half a range, a range out of bounds, or a range for a kind that has none.
    """
    check_choice("kind", kind, KINDS, _HINTS)
    if kind != "ppo":
        check_unused(f"kind={kind!r}", "kind='ppo'", dual_clip=dual_clip)
    if kind not in DEFAULT_CLIP:
        check_unused(f"kind={kind!r}", "the clipped kinds", clip_low=clip_low, clip_high=clip_high)
        return None
    if (clip_low is None) != (clip_high is None):
        raise LossError(f"Give both clip_low and clip_high or neither: got clip_low={clip_low}, clip_high={clip_high}.")
    low, high = DEFAULT_CLIP[kind] if clip_low is None or clip_high is None else (clip_low, clip_high)
    if not 0 <= low <= 1 or high < 0:
        raise LossError(
            "The ratio is clipped to [1 - clip_low, 1 + clip_high]: this needs 0 <= clip_low <= 1 and clip_high >= 0, "
            f"got clip_low={low}, clip_high={high}."
        )
    if dual_clip is not None and dual_clip <= 1:
        raise LossError(
            f"dual_clip must be greater than 1 (it caps the ratio where the advantage is negative): got {dual_clip}."
        )
    return low, high


def resolve_temperatures(kind: str, temperatures: tuple[float, float] | None) -> tuple[float, float]:
    """SAPO's temperatures for positive and for negative advantages.

    Raises:
        LossError: given for another kind, or not positive.
    """
    if kind != "sapo":
        check_unused(f"kind={kind!r}", "kind='sapo'", sapo_temperatures=temperatures)
    positive, negative = temperatures or DEFAULT_SAPO_TEMPERATURES
    if positive <= 0 or negative <= 0:
        raise LossError(f"sapo_temperatures must be positive: got {temperatures}.")
    return positive, negative
