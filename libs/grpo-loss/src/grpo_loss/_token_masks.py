"""Which tokens take part in the policy objective."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from grpo_loss._errors import LossError, as_array, check_boolean, check_number, check_shape


def top_entropy_mask(
    entropy_BT: Float[ArrayLike, "B T"], mask_BT: Bool[ArrayLike, "B T"], *, fraction: float
) -> Bool[Array, "B T"]:
    """The tokens whose entropy is among the highest `fraction` of the whole batch, ties included.

    Multiply the advantage by it (`advantage_B[:, None] * mask_BT`), so that the other tokens get no policy gradient
    while denominators still count them. Compute it on the whole batch before it is split: the threshold is a quantile
    of all its tokens.

    Args:
        entropy_BT: entropy at each token, nats.
        mask_BT: completion tokens.
        fraction: share of tokens to keep, in (0, 1].

    Returns:
        At least ceil(fraction × tokens) tokens of the mask.

    Raises:
        LossError: a fraction outside (0, 1], shapes that differ, or a mask that is not boolean.

    Source: "Beyond the 80/20 rule", arXiv:2506.01939.
    """
    check_number("fraction", fraction, 0.0, 1.0)
    if fraction == 0:
        raise LossError(f"fraction must lie in (0, 1]: got {fraction}.")
    check_boolean("mask_BT", mask_BT)
    mask_BT = jnp.asarray(mask_BT)
    entropy_BT = jnp.asarray(as_array("entropy_BT", entropy_BT))
    check_shape("entropy_BT", entropy_BT.shape, mask_BT.shape)
    descending = -jnp.sort(-jnp.where(mask_BT, entropy_BT, -jnp.inf).reshape(-1))
    keep = jnp.ceil(fraction * mask_BT.sum()).astype(jnp.int32)
    threshold = descending[jnp.maximum(keep - 1, 0)]
    return mask_BT & (entropy_BT >= threshold)


def drop_truncated(mask_BT: Bool[ArrayLike, "B T"], truncated_B: Bool[ArrayLike, "B"]) -> Bool[Array, "B T"]:
    """The loss mask without the completions that hit the length limit, whose reward says little about them.

    Args:
        mask_BT: completion tokens.
        truncated_B: True where the limit was reached (`finish_B == FinishReason.LENGTH`).

    Returns:
        A mask; dropped sequences count in no denominator.

    Raises:
        LossError: shapes that differ, or masks that are not boolean.

    Source: DAPO arXiv:2503.14476 sec. 3.4 (overlong filtering).
    """
    check_boolean("mask_BT", mask_BT)
    check_boolean("truncated_B", truncated_B)
    mask_BT, truncated_B = jnp.asarray(mask_BT), jnp.asarray(truncated_B)
    check_shape("truncated_B", truncated_B.shape, mask_BT.shape[:1])
    return mask_BT & ~truncated_B[:, None]
