"""From token losses to (numerator, denominator): the four published ways to average over a batch.

An aggregation is a function from a mask (1.0 where a token counts) and segments to the weight of each token in the
numerator, and the denominator. Three are functions here; `fixed` makes the fourth; any other function will do.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_loss._errors import LossError, as_array, check_boolean, check_called, check_shape
from grpo_loss._sequences import sequence_sum, spread


@runtime_checkable
class Aggregation(Protocol):
    """How token losses are averaged: a function from a mask and segments to weights and a denominator."""

    def __call__(
        self, mask_RT: Float[Array, "R T"], segment_RT: Int[Array, "R T"] | None, /
    ) -> tuple[Float[Array, "R T"], Float[Array, ""]]:
        """The weight of each token in the numerator, and the denominator."""
        ...


def token_mean(
    mask_RT: Float[Array, "R T"], segment_RT: Int[Array, "R T"] | None = None
) -> tuple[Float[Array, "R T"], Float[Array, ""]]:
    """Every token of the batch weighs the same; the denominator counts tokens.

    Args:
        mask_RT: 1.0 where a token counts, else 0.0.
        segment_RT: not needed.

    Returns:
        The weight of each token, and the denominator.

    Source: DAPO arXiv:2503.14476 eq. 8.
    """
    return mask_RT, mask_RT.sum()


def sequence_mean_token_mean(
    mask_RT: Float[Array, "R T"], segment_RT: Int[Array, "R T"] | None = None
) -> tuple[Float[Array, "R T"], Float[Array, ""]]:
    """Every sequence weighs the same and its tokens share that weight; the denominator counts sequences.

    Args:
        mask_RT: 1.0 where a token counts, else 0.0. A sequence without such a token is not counted.
        segment_RT: 0 at pads, 1.. for the sequences of a row; None where a row is one sequence.

    Returns:
        The weight of each token, and the denominator.

    Source: GRPO arXiv:2402.03300 eq. 3.
    """
    count_RS = sequence_sum(mask_RT, segment_RT)
    sequences = _sequences(count_RS, mask_RT)
    return mask_RT / spread(jnp.maximum(count_RS, 1), segment_RT), sequences


def sequence_mean_token_sum(
    mask_RT: Float[Array, "R T"], segment_RT: Int[Array, "R T"] | None = None
) -> tuple[Float[Array, "R T"], Float[Array, ""]]:
    """Tokens are added within a sequence; the denominator counts sequences.

    Args:
        mask_RT, segment_RT: as for `sequence_mean_token_mean`.

    Returns:
        The weight of each token, and the denominator.

    Source: RLOO arXiv:2402.14740, whose action is the whole sequence.
    """
    return mask_RT, _sequences(sequence_sum(mask_RT, segment_RT), mask_RT)


def fixed(horizon: int) -> Aggregation:
    """Tokens are added; the denominator is sequences × `horizon`, so a token's weight does not depend on lengths.

    Args:
        horizon: tokens, usually the longest completion allowed.

    Returns:
        The aggregation of Dr.GRPO.

    Raises:
        LossError: the horizon is not a positive number.

    Source: Dr.GRPO arXiv:2503.20783 sec. 3.2.
    """
    if not (isinstance(horizon, int | float) and horizon > 0):
        raise LossError(f"horizon must be a positive number of tokens: got {horizon!r}.")

    def aggregation(mask_RT: Array, segment_RT: Array | None = None) -> tuple[Array, Array]:
        return mask_RT, _sequences(sequence_sum(mask_RT, segment_RT), mask_RT) * horizon

    return aggregation


def aggregate(
    value_RT: Float[Array, "R T"],
    mask_RT: Bool[Array, "R T"],
    aggregation: Aggregation = token_mean,
    *,
    segment_RT: Int[Array, "R T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Reduce token values to a numerator and a denominator that both add up over parts of a batch.

    Args:
        value_RT: one value per token; those outside the mask are not read.
        mask_RT: which tokens count.
        aggregation: `token_mean`, `sequence_mean_token_mean`, `sequence_mean_token_sum`, `fixed(horizon)`, or your own.
        segment_RT: 0 at pads, 1.. for the sequences of a row; None where a row is one sequence.

    Returns:
        The numerator (differentiable in `value_RT`) and the denominator (a function of the mask alone).

    Raises:
        LossError: shapes that differ, a mask that is not boolean, or an aggregation that is not a function.

    Source: see each aggregation.
    """
    mask_RT, value_RT = jnp.asarray(as_array("mask_RT", mask_RT)), jnp.asarray(as_array("value_RT", value_RT))
    segment_RT = None if segment_RT is None else jnp.asarray(as_array("segment_RT", segment_RT))
    check_shape("mask_RT", mask_RT.shape, value_RT.shape)
    weight_RT, denominator = token_weights(mask_RT, aggregation, segment_RT, value_RT.dtype)
    return jnp.sum(jnp.where(mask_RT, value_RT, 0) * weight_RT), denominator


def token_weights(
    mask_RT: Bool[Array, "R T"], aggregation: Aggregation, segment_RT: Int[Array, "R T"] | None, dtype: jnp.dtype
) -> tuple[Float[Array, "R T"], Float[Array, ""]]:
    """The weight of each token in the numerator, and the denominator. See `aggregate`."""
    check_called(
        "aggregation",
        aggregation,
        [fixed],
        "token_mean, sequence_mean_token_mean, sequence_mean_token_sum or fixed(horizon)",
    )
    check_boolean("mask_RT", mask_RT)
    if segment_RT is not None:
        check_shape("segment_RT", segment_RT.shape, mask_RT.shape)
    return aggregation(mask_RT.astype(dtype), segment_RT)


def _sequences(count_RS: Array, mask_RT: Array) -> Array:
    """How many sequences have a token that counts."""
    return (count_RS > 0).sum().astype(mask_RT.dtype)
