"""Zero mean and unit variance over every token or sequence of all processes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Sums that describe a set of numbers; the sums of two sets, added, describe both together.

    Attributes:
        count: how many.
        total: their sum.
        square: the sum of their squares.
    """

    count: Float[Array, ""]
    total: Float[Array, ""]
    square: Float[Array, ""]

    def __add__(self, other: "Moments") -> "Moments":
        """The sums of both sets."""
        return Moments(self.count + other.count, self.total + other.total, self.square + other.square)

    def mean(self) -> Float[Array, ""]:
        """Their mean (0 of none)."""
        return self.total / jnp.maximum(self.count, 1)

    def variance(self) -> Float[Array, ""]:
        """Their population variance (0 of none)."""
        return jnp.maximum(self.square / jnp.maximum(self.count, 1) - jnp.square(self.mean()), 0)


def moments(
    value: Float[ArrayLike, "*N"], mask: Bool[ArrayLike, "*N"], *, axis_name: str | tuple[str, ...] | None = None
) -> Moments:
    """The sums from which mean and variance follow, here or over all processes.

    Args:
        value: of any shape.
        mask: which of them count.
        axis_name: a mapped axis (`shard_map`) to add over.

    Returns:
        Moments. To whiten over processes without a mapped axis, add theirs up with `+`.
    """
    array = jnp.asarray(value)
    kept = jnp.where(mask, array.astype(jnp.promote_types(array.dtype, jnp.float32)), 0)
    sums = Moments(jnp.asarray(mask).sum().astype(kept.dtype), kept.sum(), jnp.square(kept).sum())
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def whiten(
    value: Float[ArrayLike, "*N"],
    mask: Bool[ArrayLike, "*N"],
    *,
    batch_moments: Moments | None = None,
    centre: bool = True,
    epsilon: float = 1e-6,
) -> Float[Array, "*N"]:
    """Subtract the mean and divide by the standard deviation, over what the mask keeps.

    Args:
        value: of any shape.
        mask: which of them count; the others become 0.
        batch_moments: `moments` of the whole batch where `value` is a part of it; None: of `value` itself.
        centre: whether to subtract the mean.
        epsilon: added to the (population) standard deviation.

    Returns:
        The same shape.
    """
    sums = moments(value, mask) if batch_moments is None else batch_moments
    mean = sums.mean() if centre else 0.0
    return jnp.where(mask, divide_by_deviation(jnp.asarray(value) - mean, sums.variance(), epsilon), 0)


def divide_by_deviation(value: Array, variance: Array, epsilon: ArrayLike) -> Array:
    """value / (sqrt(variance) + epsilon), and 0 rather than NaN for 0 / 0."""
    divisor = jnp.sqrt(variance) + epsilon
    return value / jnp.where(divisor == 0, 1, divisor)
