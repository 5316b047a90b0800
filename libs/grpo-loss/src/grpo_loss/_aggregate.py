"""From token losses to (numerator, denominator): the four published ways to average over a batch."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._errors import LossError, check_choice, check_shape
from ._sequences import sequence_sum, spread

Aggregation = Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "fixed"]
AGGREGATIONS = ("token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "fixed")

_HINTS = {
    "dr-grpo": "Dr.GRPO is aggregation='fixed' with horizon= the longest completion in tokens.",
    "dapo": "DAPO averages over tokens: aggregation='token-mean'.",
    "grpo": "The GRPO paper is aggregation='sequence-mean-token-mean'.",
}


def aggregate(
    value_RT: Float[Array, "R T"],
    mask_RT: Bool[Array, "R T"],
    *,
    aggregation: Aggregation = "token-mean",
    horizon: int | None = None,
    segment_RT: Int[Array, "R T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Reduce token values to a numerator and a denominator that both add up over parts of a batch.

    Args:
        value_RT: one value a token; masked-out ones are not read.
        mask_RT: which tokens count.
        aggregation: "token-mean": every token of the batch weighs the same (denominator: tokens).
            "sequence-mean-token-mean": every sequence weighs the same, its tokens share that (denominator: sequences).
            "sequence-mean-token-sum": tokens are added within a sequence (denominator: sequences).
            "fixed": tokens are added; the denominator is sequences × `horizon` and so does not depend on lengths.
            Sequences without a masked-in token are no sequences here.
        horizon: tokens; for "fixed" only, where it is needed.
        segment_RT: 0 at pads, 1.. for the sequences of a row; None where a row is one sequence.

    Returns:
        numerator (differentiable in `value_RT`), denominator (a function of the mask alone).

    Raises:
        LossError: unknown aggregation, horizon missing or useless, or shapes that differ.

    Source: GRPO arXiv:2402.03300 eq. 3 (sequence-mean-token-mean); DAPO arXiv:2503.14476 eq. 8 (token-mean);
        Dr.GRPO arXiv:2503.20783 sec. 3.2 (fixed).
    """
    weight_RT, denominator = token_weights(
        mask_RT, aggregation=aggregation, horizon=horizon, segment_RT=segment_RT, dtype=value_RT.dtype
    )
    check_shape("mask_RT", mask_RT.shape, value_RT.shape)
    return jnp.sum(jnp.where(mask_RT, value_RT, 0) * weight_RT), denominator


def token_weights(
    mask_RT: Bool[Array, "R T"],
    *,
    aggregation: Aggregation,
    horizon: int | None,
    segment_RT: Int[Array, "R T"] | None,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "R T"], Float[Array, ""]]:
    """The weight of each token in the numerator, and the denominator. See `aggregate`."""
    check_choice("aggregation", aggregation, AGGREGATIONS, _HINTS)
    if (horizon is not None) != (aggregation == "fixed"):
        raise LossError(
            f"horizon (tokens) must be given with aggregation='fixed' and only there: got horizon={horizon!r}, "
            f"aggregation={aggregation!r}."
        )
    if horizon is not None and horizon <= 0:
        raise LossError(f"horizon must be a positive number of tokens: got {horizon!r}.")
    if segment_RT is not None:
        check_shape("segment_RT", segment_RT.shape, mask_RT.shape)
    weight_RT = mask_RT.astype(dtype)
    if aggregation == "token-mean":
        return weight_RT, weight_RT.sum()
    count_RS = sequence_sum(weight_RT, segment_RT)
    sequences = (count_RS > 0).sum().astype(dtype)
    if horizon is not None:
        return weight_RT, sequences * horizon
    if aggregation == "sequence-mean-token-mean":
        weight_RT = weight_RT / spread(jnp.maximum(count_RS, 1), segment_RT)
    return weight_RT, sequences
