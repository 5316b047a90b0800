"""Advantages of each token from rewards of each token: returns, GAE and REINFORCE++."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from grpo_loss._advantages import group_advantage
from grpo_loss._errors import LossError, as_array, check_boolean, check_number, check_shape
from grpo_loss._kl import KlEstimator, kl_estimate
from grpo_loss._whiten import Moments, whiten


def token_reward(
    reward_B: Float[ArrayLike, "B"],
    mask_BT: Bool[ArrayLike, "B T"],
    *,
    logp_BT: Float[ArrayLike, "B T"] | None = None,
    reference_logp_BT: Float[ArrayLike, "B T"] | None = None,
    estimator: KlEstimator = "k1",
    kl_coefficient: float = 0.0,
) -> Float[Array, "B T"]:
    """A sequence's reward on its last token, minus a KL penalty on every token.

    Args:
        reward_B: one reward per sequence.
        mask_BT: completion tokens.
        logp_BT: log-probabilities of the tokens under the policy that sampled them, nats.
        reference_logp_BT: under the reference, nats.
        estimator: of the KL divergence, see `kl_estimate`; k1 is unbiased here.
        kl_coefficient: weight of the penalty. Zero without the two arrays, positive with them.

    Returns:
        Rewards of the tokens, without gradient. Summed over a row: the penalised reward, for group advantages.

    Raises:
        LossError: shapes that differ, or a coefficient without log-probabilities, or the reverse.

    Source: InstructGPT arXiv:2203.02155 eq. 2.
    """
    check_boolean("mask_BT", mask_BT)
    mask_BT, reward_B = jnp.asarray(mask_BT), as_array("reward_B", reward_B)
    check_shape("reward_B", jnp.shape(reward_B), mask_BT.shape[:1])
    given = logp_BT is not None and reference_logp_BT is not None
    if (logp_BT is None) != (reference_logp_BT is None) or given != (kl_coefficient != 0):
        raise LossError(
            "logp_BT, reference_logp_BT and a kl_coefficient other than 0 go together: got "
            f"logp_BT {'given' if logp_BT is not None else 'None'}, reference_logp_BT "
            f"{'given' if reference_logp_BT is not None else 'None'}, kl_coefficient={kl_coefficient}."
        )
    check_number("kl_coefficient", kl_coefficient, 0.0)
    reward_BT = jnp.where(_last(mask_BT), jnp.asarray(reward_B, jnp.result_type(reward_B, jnp.float32))[:, None], 0)
    if logp_BT is None or reference_logp_BT is None:
        return reward_BT
    logp_BT, reference_logp_BT = as_array("logp_BT", logp_BT), as_array("reference_logp_BT", reference_logp_BT)
    check_shape("logp_BT", jnp.shape(logp_BT), mask_BT.shape)
    check_shape("reference_logp_BT", jnp.shape(reference_logp_BT), mask_BT.shape)
    logp_BT, reference_logp_BT = (jnp.where(mask_BT, x, 0) for x in (logp_BT, reference_logp_BT))
    return jax.lax.stop_gradient(reward_BT - kl_coefficient * kl_estimate(logp_BT, reference_logp_BT, estimator))


def gae(
    reward_BT: Float[ArrayLike, "B T"],
    value_BT: Float[ArrayLike, "B T"],
    mask_BT: Bool[ArrayLike, "B T"],
    *,
    discount: float = 1.0,
    trace: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation; tokens outside the mask are stepped over, also between counted ones.

    Args:
        reward_BT: reward of each token (see `token_reward`).
        value_BT: value predicted before each token.
        mask_BT: completion tokens. After the last one the value is 0.
        discount: gamma, from token to token.
        trace: lambda; 1 is return minus value, 0 the one-step error.

    Returns:
        advantage_BT and return_BT (advantage + value, what a value head is fitted to), 0 outside the mask.

    Raises:
        LossError: shapes that differ, or a factor outside [0, 1].

    Source: arXiv:1506.02438 eq. 16.
    """
    check_boolean("mask_BT", mask_BT)
    mask_BT, reward_BT, value_BT = (
        jnp.asarray(mask_BT),
        as_array("reward_BT", reward_BT),
        as_array("value_BT", value_BT),
    )
    check_shape("reward_BT", jnp.shape(reward_BT), mask_BT.shape)
    check_shape("value_BT", jnp.shape(value_BT), mask_BT.shape)
    _check_factor("discount", discount)
    _check_factor("trace", trace)
    dtype = jnp.result_type(reward_BT, value_BT, jnp.float32)
    return _gae(jnp.asarray(reward_BT, dtype), jnp.asarray(value_BT, dtype), mask_BT, discount, trace)


@jax.jit
def _gae(
    reward_BT: Array, value_BT: Array, mask_BT: Array, discount: ArrayLike, trace: ArrayLike
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    def step(carry: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_value_B, next_advantage_B = carry
        reward_B, value_B, mask_B = token
        error_B = reward_B + discount * next_value_B - value_B
        advantage_B = error_B + discount * trace * next_advantage_B
        carry = (jnp.where(mask_B, value_B, next_value_B), jnp.where(mask_B, advantage_B, next_advantage_B))
        return carry, jnp.where(mask_B, advantage_B, 0)

    zero_B = jnp.zeros(mask_BT.shape[0], reward_BT.dtype)
    _, advantage_TB = jax.lax.scan(step, (zero_B, zero_B), (reward_BT.T, value_BT.T, mask_BT.T), reverse=True)
    advantage_BT = advantage_TB.T
    return advantage_BT, jnp.where(mask_BT, advantage_BT + value_BT, 0)


def reinforce_plus_plus_advantage(
    reward_BT: Float[ArrayLike, "B T"],
    mask_BT: Bool[ArrayLike, "B T"],
    *,
    discount: float = 1.0,
    epsilon: float = 1e-6,
    batch_moments: Moments | None = None,
    whitened: bool = True,
) -> Float[Array, "B T"]:
    """REINFORCE++: the discounted return from each token on, whitened over all tokens of the batch.

    Args:
        reward_BT: reward of each token (see `token_reward`, with the k1 penalty).
        mask_BT: completion tokens, without those of unscored sequences.
        discount: gamma, from token to token.
        epsilon: added to the standard deviation.
        batch_moments: for several processes: `moments` of this function's result with whitened=False, added over them.
        whitened: False returns the returns themselves.

    Returns:
        Advantages of the tokens, 0 outside the mask.

    Raises:
        LossError: shapes that differ, a factor outside [0, 1], or moments that would not be used.

    Source: arXiv:2501.03262.
    """
    reward_BT = jnp.asarray(as_array("reward_BT", reward_BT))
    return_BT, _ = gae(reward_BT, jnp.zeros_like(reward_BT), mask_BT, discount=discount, trace=1.0)
    return _finish(return_BT, mask_BT, whitened, epsilon, batch_moments)


def reinforce_plus_plus_baseline_advantage(
    reward_B: Float[ArrayLike, "B"],
    mask_BT: Bool[ArrayLike, "B T"],
    *,
    scored_B: Bool[ArrayLike, "B"] | None = None,
    group_B: Int[ArrayLike, "B"] | None = None,
    group_size: int | None = None,
    epsilon: float = 1e-6,
    batch_moments: Moments | None = None,
    whitened: bool = True,
) -> Float[Array, "B T"]:
    """REINFORCE++-baseline: reward minus group mean on every token, whitened over all tokens of the batch.

    Args:
        reward_B, scored_B, group_B, group_size: as for `group_advantage`; tokens of unscored sequences are left out.
        mask_BT: completion tokens.
        epsilon, batch_moments, whitened: as for `reinforce_plus_plus_advantage`.

    Returns:
        Advantages of the tokens, 0 outside the mask.

    Raises:
        LossError: as `group_advantage`, or moments that would not be used.

    Source: arXiv:2501.03262 sec. 3.2.
    """
    check_boolean("mask_BT", mask_BT)
    mask_BT, reward_B = jnp.asarray(mask_BT), as_array("reward_B", reward_B)
    check_shape("reward_B", jnp.shape(reward_B), mask_BT.shape[:1])
    advantage_B = group_advantage(reward_B, scored_B=scored_B, group_B=group_B, group_size=group_size, scale="none")
    if scored_B is not None:
        mask_BT = mask_BT & jnp.asarray(scored_B)[:, None]
    return _finish(jnp.where(mask_BT, advantage_B[:, None], 0), mask_BT, whitened, epsilon, batch_moments)


def _finish(
    value_BT: Array, mask_BT: ArrayLike, whitened: bool, epsilon: float, batch_moments: Moments | None
) -> Array:
    if whitened:
        return whiten(value_BT, mask_BT, batch_moments=batch_moments, epsilon=epsilon)
    if batch_moments is not None:
        raise LossError("batch_moments has no effect with whitened=False. Leave it out.")
    return value_BT


def _last(mask_BT: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last counted token of each row."""
    remaining_BT = jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1]
    return mask_BT & (remaining_BT == 1)


def _check_factor(name: Literal["discount", "trace"], value: float) -> None:
    check_number(name, value, 0.0, 1.0)
