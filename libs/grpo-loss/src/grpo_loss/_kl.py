"""Estimators of the KL divergence from the policy to a reference, from the sampled tokens alone."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_loss._errors import LossError, as_array, check_choice, check_number, check_shape

KlEstimator = Literal["k1", "k2", "k3", "k1-straight-through", "k3-straight-through"]
KL_ESTIMATORS = ("k1", "k2", "k3", "k1-straight-through", "k3-straight-through")


@dataclass(frozen=True)
class KL:
    """The KL term of `policy_loss`: coefficient × estimate, averaged as the objective is.

    Args:
        estimator: see `kl_estimate`. Not "k1", whose gradient does not see the reference.
        coefficient: the term's weight; a number, or a scalar array for one that adapts. 0 leaves only the metric.
        ratio: multiply the estimate by the token's importance ratio and differentiate through it, which makes the
            gradient of k3 that of KL(policy || reference) at each visited prefix, also off-policy.

    Raises:
        LossError: an unknown estimator, or a negative coefficient.

    Source: GRPO arXiv:2402.03300 eq. 4; with the ratio: DeepSeek-V3.2 arXiv:2512.02556.
    """

    estimator: KlEstimator
    coefficient: float | Float[Array, ""]
    ratio: bool = False

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, KL_ESTIMATORS)
        if self.estimator == "k1":
            raise LossError(
                "k1 cannot be a term of the loss: its gradient is that of logp, which does not see the reference and "
                "is 0 in expectation. Use 'k1-straight-through' (value of k1, gradient of k2), 'k2' or 'k3', or put "
                "k1 into the reward with `token_reward`."
            )
        check_number("coefficient", self.coefficient, 0.0)


def kl_estimate(
    logp_RT: Float[Array, "R T"], reference_logp_RT: Float[Array, "R T"], estimator: KlEstimator = "k3"
) -> Float[Array, "R T"]:
    """Per-token estimate of KL(policy || reference) for tokens drawn from the policy.

    With d = logp - reference_logp: k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d. In value k1 and k3 are unbiased and k3 is
    never negative. In gradient (of the estimate itself, tokens held fixed) k1 expects 0, k2 expects the gradient of
    KL(policy || reference), and k3 expects that of KL(reference || policy). "-straight-through" has the value of the
    named estimator and the gradient of k2.

    Args:
        logp_RT: log-probability of each token under the policy, nats.
        reference_logp_RT: under the reference; no gradient flows to it.
        estimator: which estimator.

    Returns:
        The estimate, in nats.

    Raises:
        LossError: an unknown estimator, or shapes that differ.

    Source: Schulman, "Approximating KL divergence" (2020); gradients: arXiv:2506.09477.
    """
    check_choice("estimator", estimator, KL_ESTIMATORS)
    logp_RT, reference_logp_RT = (
        jnp.asarray(as_array(name, array))
        for name, array in (("logp_RT", logp_RT), ("reference_logp_RT", reference_logp_RT))
    )
    check_shape("reference_logp_RT", reference_logp_RT.shape, logp_RT.shape)
    difference_RT = logp_RT - jax.lax.stop_gradient(reference_logp_RT)
    half_square_RT = jnp.square(difference_RT) / 2
    if estimator == "k2":
        return half_square_RT
    value_RT = difference_RT if estimator.startswith("k1") else jnp.expm1(-difference_RT) + difference_RT
    if estimator.endswith("-straight-through"):
        # x - stop_gradient(x) is exactly 0 forward, so the value stays bit for bit that of the named estimator.
        return jax.lax.stop_gradient(value_RT) + (half_square_RT - jax.lax.stop_gradient(half_square_RT))
    return value_RT
