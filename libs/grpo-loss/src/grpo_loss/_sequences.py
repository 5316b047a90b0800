"""Sums over the sequences of a token array, padded (a row is a sequence) or packed (segments in a row)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num


def sequence_sum(value_RT: Num[Array, "R T"], segment_RT: Int[Array, "R T"] | None) -> Num[Array, "R S"]:
    """Sum token values over each sequence.

    Rows are reduced one by one, so rows on different devices stay there.

    Args:
        value_RT: one value per token, already 0 where it must not count.
        segment_RT: 0 at pads, 1..T for the sequences of a row; None where a row is one sequence.

    Returns:
        [R, 1] for rows that are sequences, else [R, T + 1] by segment id (a row of T tokens has at most T
        sequences, which is the static bound); ids that do not occur hold 0.
    """
    if segment_RT is None:
        return value_RT.sum(axis=1, keepdims=True)
    slots = value_RT.shape[1] + 1
    return jax.vmap(lambda value_T, segment_T: jax.ops.segment_sum(value_T, segment_T, slots))(value_RT, segment_RT)


def spread(value_RS: Num[Array, "R S"], segment_RT: Int[Array, "R T"] | None) -> Num[Array, "R #T"]:
    """Give every token its sequence's value: the inverse direction of `sequence_sum`.

    Args:
        value_RS: what `sequence_sum` returned, or a function of it.
        segment_RT: as given to `sequence_sum`.

    Returns:
        [R, T], or [R, 1] (to broadcast) for rows that are sequences.
    """
    return value_RS if segment_RT is None else jnp.take_along_axis(value_RS, segment_RT, axis=1)


def sequence_mean(
    value_RT: Float[Array, "R T"], mask_RT: Float[Array, "R T"], segment_RT: Int[Array, "R T"] | None
) -> Float[Array, "R #T"]:
    """Mean over the masked tokens of each sequence, given back to its tokens (0 where there are none)."""
    count_RS = sequence_sum(mask_RT, segment_RT)
    total_RS = sequence_sum(value_RT * mask_RT, segment_RT)
    return spread(total_RS / jnp.maximum(count_RS, 1), segment_RT)
