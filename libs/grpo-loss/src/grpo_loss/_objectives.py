"""The per-token objectives of the published policy losses: what is maximised, before any averaging.

An objective is a function from `TokenTerms` to a `Surrogate`. Each public function below makes one from its paper's
parameters; `policy_loss` accepts any other function of that kind as well.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from grpo_loss._errors import LossError, check_number
from grpo_loss._sequences import sequence_mean

_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class TokenTerms:
    """What an objective is computed from: the tokens of one micro-batch, everything 0 outside the mask.

    Args:
        logp_RT: log-probability under the trained policy, nats; gradients flow through it.
        log_ratio_RT: `logp_RT` minus the old log-probability; gradients flow through it too.
        advantage_RT: advantages, without gradient.
        mask_RT: the tokens that count.
        segment_RT: 0 at pads, 1.. for the sequences of a packed row; None where a row is one sequence.
    """

    logp_RT: Float[Array, "R T"]
    log_ratio_RT: Float[Array, "R T"]
    advantage_RT: Float[Array, "R T"]
    mask_RT: Bool[Array, "R T"]
    segment_RT: Int[Array, "R T"] | None = None

    @property
    def ratio_RT(self) -> Float[Array, "R T"]:
        """Importance ratio of each token, see `bounded_exp`."""
        return bounded_exp(self.log_ratio_RT)

    def sequence_mean(self, value_RT: Float[Array, "R T"]) -> Float[Array, "R T"]:
        """Mean over the counted tokens of each sequence, given to every token of the sequence.

        Args:
            value_RT: one value per token.

        Returns:
            The means, [R, T].
        """
        mean_RT = sequence_mean(value_RT, self.mask_RT.astype(value_RT.dtype), self.segment_RT)
        return jnp.broadcast_to(mean_RT, self.mask_RT.shape)


class Surrogate(NamedTuple):
    """A token objective and what to report about it.

    Args:
        objective_RT: to be maximised.
        ratio_RT: the importance ratio in use (the token's, or its sequence's), without gradient.
        clipped_low_RT, clipped_high_RT: where a bound took the gradient away (CISPO: where a bound binds); None for
            objectives without bounds.
    """

    objective_RT: Float[Array, "R T"]
    ratio_RT: Float[Array, "R T"]
    clipped_low_RT: Bool[Array, "R T"] | None = None
    clipped_high_RT: Bool[Array, "R T"] | None = None


@runtime_checkable
class Objective(Protocol):
    """A function from the tokens of a micro-batch to what is maximised: your own, or what `ppo()` and others return."""

    def __call__(self, tokens: TokenTerms, /) -> Surrogate:
        """The objective of each token."""
        ...


def bounded_exp(log_ratio_RT: Float[Array, "R T"]) -> Float[Array, "R T"]:
    """`exp`, with its argument bounded to ±20, where it is almost 0 or beyond every clip range.

    In float32 `exp(100)` is infinite, and the gradient of a token that the clip range excludes would be 0 × inf = NaN.
    """
    bound = log_ratio_RT.dtype.type(_LARGEST_LOG_RATIO)
    return jnp.exp(jax.lax.clamp(-bound, log_ratio_RT, bound))


def ppo(clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> Objective:
    """PPO's clipped objective, min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r the token's ratio, A its advantage.

    Args:
        clip_low, clip_high: how far the ratio may fall below and rise above 1 before the gradient vanishes.
        dual_clip: where A < 0 the objective is at least dual_clip × A; > 1. None: no such bound.

    Returns:
        The objective of PPO, GRPO, DAPO (clip_high=0.28) and Dr.GRPO.

    Raises:
        LossError: a range without 1, or a dual clip of at most 1.

    Source: PPO arXiv:1707.06347 eq. 7; dual clip arXiv:1912.09729; separate bounds DAPO arXiv:2503.14476 sec. 3.1.
    """
    low, high = _clip_range(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise LossError(
            f"dual_clip must be greater than 1 (it caps the ratio where the advantage is negative): got {dual_clip}."
        )

    def objective(tokens: TokenTerms) -> Surrogate:
        return _clipped(tokens.ratio_RT, tokens.advantage_RT, low, high, dual_clip)

    return objective


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GSPO: PPO's clipped objective with the ratio of the sequence, exp(mean of its tokens' log-ratios).

    Args:
        clip_low, clip_high: bounds of the sequence's ratio, as in `ppo`; it stays much closer to 1 than a token's.

    Returns:
        The objective. Average it with `sequence_mean_token_mean`, as the paper does.

    Raises:
        LossError: a range without 1.

    Source: GSPO arXiv:2507.18071 eq. 5 and sec. 5.1.
    """
    low, high = _clip_range(clip_low, clip_high)

    def objective(tokens: TokenTerms) -> Surrogate:
        ratio_RT = bounded_exp(tokens.sequence_mean(tokens.log_ratio_RT))
        return _clipped(ratio_RT, tokens.advantage_RT, low, high)

    return objective


def gspo_token(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GSPO-token: the sequence's ratio in value, while each token's gradient flows through its own log-probability.

    Equal to `gspo` where advantages are constant within sequences and `sequence_mean_token_mean` averages them.

    Args:
        clip_low, clip_high: as for `gspo`.

    Returns:
        The objective.

    Raises:
        LossError: a range without 1.

    Source: GSPO arXiv:2507.18071 sec. 4.3.
    """
    low, high = _clip_range(clip_low, clip_high)

    def objective(tokens: TokenTerms) -> Surrogate:
        mean_RT, logp_RT = tokens.sequence_mean(tokens.log_ratio_RT), tokens.logp_RT
        log_ratio_RT = stop_gradient(mean_RT) + (logp_RT - stop_gradient(logp_RT))
        return _clipped(bounded_exp(log_ratio_RT), tokens.advantage_RT, low, high)

    return objective


def cispo(clip_low: float = 1.0, clip_high: float = 4.0) -> Objective:
    """CISPO: REINFORCE weighted by the clipped ratio, stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A logp.

    Args:
        clip_low, clip_high: bounds of the weight. The default has no lower bound and a cap of 5, as in ScaleRL.

    Returns:
        The objective; no token loses its gradient.

    Raises:
        LossError: a range without 1.

    Source: CISPO arXiv:2506.13585 eq. 4; ScaleRL arXiv:2510.13786.
    """
    low, high = _clip_range(clip_low, clip_high)

    def objective(tokens: TokenTerms) -> Surrogate:
        ratio_RT = tokens.ratio_RT
        bounded_RT = jnp.clip(ratio_RT, low, high)
        objective_RT = stop_gradient(bounded_RT) * tokens.advantage_RT * tokens.logp_RT
        return Surrogate(objective_RT, stop_gradient(ratio_RT), ratio_RT < low, ratio_RT > high)

    return objective


def sapo(positive: float = 1.0, negative: float = 1.05) -> Objective:
    """SAPO: a smooth gate in place of a clip range, 4/t sigmoid(t (r - 1)) A.

    Args:
        positive, negative: the temperature t where A > 0, and elsewhere; larger values close the gate sooner.

    Returns:
        The objective. Average it with `sequence_mean_token_mean`, as the paper does.

    Raises:
        LossError: a temperature is not positive.

    Source: SAPO arXiv:2511.20347.
    """
    if not (positive > 0 and negative > 0):
        raise LossError(f"SAPO's temperatures must be positive: got positive={positive}, negative={negative}.")

    def objective(tokens: TokenTerms) -> Surrogate:
        ratio_RT, advantage_RT = tokens.ratio_RT, tokens.advantage_RT
        temperature_RT = jnp.where(advantage_RT > 0, positive, negative)
        gate_RT = jax.nn.sigmoid(temperature_RT * (ratio_RT - 1)) * 4 / temperature_RT
        return Surrogate(gate_RT * advantage_RT, stop_gradient(ratio_RT))

    return objective


def reinforce() -> Objective:
    """REINFORCE: A logp, whatever the ratio.

    Returns:
        The objective, for RLOO and other estimators that update once per rollout.

    Source: Williams (1992); RLOO arXiv:2402.14740.
    """

    def objective(tokens: TokenTerms) -> Surrogate:
        return Surrogate(tokens.logp_RT * tokens.advantage_RT, stop_gradient(tokens.ratio_RT))

    return objective


def _clipped(
    ratio_RT: Array, advantage_RT: Array, low: float, high: float, dual_clip: float | None = None
) -> Surrogate:
    bounded_RT = jnp.clip(ratio_RT, low, high)
    clipped_low_RT = (ratio_RT < low) & (advantage_RT < 0)
    clipped_high_RT = (ratio_RT > high) & (advantage_RT > 0)
    # `where` in place of `minimum`: at a tie `minimum` would halve the gradient between the branches.
    objective_RT = jnp.where(clipped_low_RT | clipped_high_RT, stop_gradient(bounded_RT), ratio_RT) * advantage_RT
    if dual_clip is not None:
        capped_RT = (ratio_RT > dual_clip) & (advantage_RT < 0)
        objective_RT = jnp.where(capped_RT, dual_clip * advantage_RT, objective_RT)
        clipped_high_RT = clipped_high_RT | capped_RT
    return Surrogate(objective_RT, stop_gradient(ratio_RT), clipped_low_RT, clipped_high_RT)


def _clip_range(clip_low: float, clip_high: float) -> tuple[float, float]:
    """The bounds of the ratio."""
    check_number("clip_low", clip_low, -math.inf)
    check_number("clip_high", clip_high, -math.inf)
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise LossError(
            "The ratio is clipped to [1 - clip_low, 1 + clip_high]: this needs 0 <= clip_low <= 1 and clip_high >= 0, "
            f"got clip_low={clip_low}, clip_high={clip_high}."
        )
    return 1 - clip_low, 1 + clip_high
