"""Estimators of the KL divergence from the policy to a reference, from the sampled tokens alone."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._errors import LossError, check_choice

KlKind = Literal["k1", "k2", "k3", "k1-straight-through", "k3-straight-through"]
KL_KINDS = ("k1", "k2", "k3", "k1-straight-through", "k3-straight-through")


def kl_estimate(
    logp_RT: Float[Array, "R T"], reference_logp_RT: Float[Array, "R T"], *, kl: KlKind = "k3"
) -> Float[Array, "R T"]:
    """Per-token estimate of KL(policy || reference) for tokens drawn from the policy.

    With d = logp - reference_logp: k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d. In value k1 and k3 are unbiased and k3 is
    never negative. In gradient (of the estimate itself, tokens held fixed) k1 expects 0, k2 expects the gradient of
    KL(policy || reference), and k3 expects that of KL(reference || policy). "-straight-through" has the value of the
    one named and the gradient of k2.

    Args:
        logp_RT: log-probability of each token under the policy.
        reference_logp_RT: under the reference; no gradient flows to it.
        kl: which estimator.

    Returns:
        The estimate, in nats.

    Raises:
        LossError: unknown `kl`.

    Source: Schulman, "Approximating KL divergence" (2020); gradients: arXiv:2506.09477.
    """
    check_choice("kl", kl, KL_KINDS)
    difference_RT = logp_RT - jax.lax.stop_gradient(reference_logp_RT)
    half_square_RT = jnp.square(difference_RT) / 2
    if kl == "k2":
        return half_square_RT
    value_RT = difference_RT if kl.startswith("k1") else jnp.expm1(-difference_RT) + difference_RT
    if kl.endswith("-straight-through"):
        # x - stop_gradient(x) is exactly 0 forward, so the value stays bit for bit that of the named estimator.
        return jax.lax.stop_gradient(value_RT) + (half_square_RT - jax.lax.stop_gradient(half_square_RT))
    return value_RT


def check_loss_kl(kl: str) -> None:
    """Raise unless `kl` can be differentiated as a term of a loss.

    Raises:
        LossError: unknown, or plain k1.
    """
    check_choice("kl", kl, KL_KINDS)
    if kl == "k1":
        raise LossError(
            "kl='k1' cannot be a term of the loss: its gradient is that of logp, which does not see the reference and "
            "is 0 in expectation. Use kl='k1-straight-through' (value of k1, gradient of k2), 'k2' or 'k3', or put k1 "
            "into the reward with `token_reward`."
        )
