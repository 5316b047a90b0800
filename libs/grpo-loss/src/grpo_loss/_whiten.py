"""Zero mean and unit variance over every token or sequence of all processes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from grpo_loss._errors import LossError, as_array, check_boolean, check_number, check_shape, known


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """What must be known of a set of numbers to whiten it; `a + b` describes both sets together.

    Deviations are kept about the set's own mean: sums of plain squares would lose, in float32, a spread that is small
    beside the mean.

    Args:
        count: how many.
        mean: their mean (0 of none).
        deviation: the sum of their squared distances from the mean.
        lowest, highest: the smallest and the largest (+inf, -inf of none). Equal numbers differ from their rounded mean
            by rounding, which a small deviation would blow up; these two say that there is nothing to whiten.
    """

    count: Float[Array, ""]
    mean: Float[Array, ""]
    deviation: Float[Array, ""]
    lowest: Float[Array, ""]
    highest: Float[Array, ""]

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets taken together. Source: Chan, Golub, LeVeque (1979), eq. 2.1."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)
        gap = other.mean - self.mean
        deviation = self.deviation + other.deviation + jnp.square(gap) * self.count * share
        lowest, highest = jnp.minimum(self.lowest, other.lowest), jnp.maximum(self.highest, other.highest)
        return Moments(count, self.mean + gap * share, deviation, lowest, highest)

    def variance(self) -> Float[Array, ""]:
        """Their population variance (exactly 0 of none and of equal numbers)."""
        return jnp.where(self.highest > self.lowest, self.deviation / jnp.maximum(self.count, 1), 0)


def moments(
    value: Float[ArrayLike, "*N"], mask: Bool[ArrayLike, "*N"], *, axis_name: str | tuple[str, ...] | None = None
) -> Moments:
    """Count, mean and squared deviations, here or over all processes.

    Args:
        value: of any shape.
        mask: which of them count.
        axis_name: a mapped axis (`shard_map`) whose members are taken together.

    Returns:
        The moments. To whiten over processes without a mapped axis, add theirs with `+`.

    Raises:
        LossError: shapes that differ, a mask that is not boolean, or (outside `jit`) a kept number that is not finite.
    """
    _check(value, mask)

    def over_all(part: Array) -> Array:
        return part if axis_name is None else jax.lax.psum(part, axis_name)

    array = jnp.asarray(value)
    kept = jnp.where(mask, array.astype(jnp.promote_types(array.dtype, jnp.float32)), 0)
    count = over_all(jnp.asarray(mask).sum().astype(kept.dtype))
    mean = over_all(kept.sum()) / jnp.maximum(count, 1)
    deviation = over_all(jnp.where(mask, jnp.square(kept - mean), 0).sum())
    lowest, highest = jnp.where(mask, kept, jnp.inf).min(), jnp.where(mask, kept, -jnp.inf).max()
    if axis_name is not None:
        lowest, highest = jax.lax.pmin(lowest, axis_name), jax.lax.pmax(highest, axis_name)
    return Moments(count, mean, deviation, lowest, highest)


def whiten(
    value: Float[ArrayLike, "*N"],
    mask: Bool[ArrayLike, "*N"],
    *,
    batch_moments: Moments | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, "*N"]:
    """Subtract the mean and divide by the standard deviation, over what the mask keeps.

    Args:
        value: of any shape.
        mask: which of them count; the others become 0.
        batch_moments: `moments` of the whole batch where `value` is a part of it; None: of `value` itself.
        epsilon: added to the (population) standard deviation.

    Returns:
        The same shape; exactly 0 where all that the mask keeps are equal.

    Raises:
        LossError: as `moments`, or `batch_moments` that are none.
    """
    _check(value, mask)
    check_number("epsilon", epsilon, 0.0)
    check_moments(batch_moments)
    mask = jnp.asarray(mask)
    sums = moments(value, mask) if batch_moments is None else batch_moments
    differ = sums.highest > sums.lowest
    return jnp.where(mask & differ, divide_by_deviation(jnp.asarray(value) - sums.mean, sums.variance(), epsilon), 0)


def check_moments(value: object) -> None:
    """Raise a LossError unless the argument is `Moments` or None."""
    if not isinstance(value, Moments | None):
        raise LossError(f"batch_moments must be what `moments` returns: got a {type(value).__name__}.")


def _check(value: ArrayLike, mask: ArrayLike) -> None:
    array, kept = as_array("value", value), as_array("mask", mask)
    check_boolean("mask", kept)
    check_shape("mask", kept.shape, array.shape)
    values, keeps = known(array), known(kept)
    if values is None or keeps is None:
        return
    # Comparisons with NaN are false: the whole set would pass for numbers that are all equal, and become 0.
    if (bad := keeps & ~np.isfinite(values.astype(np.float64))).any():
        at = tuple(np.argwhere(bad)[0].tolist())
        raise LossError(f"value must be finite where the mask keeps it: got {values[at]} at {list(at)}.")


def divide_by_deviation(value: Array, variance: Array, epsilon: ArrayLike) -> Array:
    """value / (sqrt(variance) + epsilon), and 0 rather than NaN for 0 / 0."""
    divisor = jnp.sqrt(variance) + epsilon
    return value / jnp.where(divisor == 0, 1, divisor)
