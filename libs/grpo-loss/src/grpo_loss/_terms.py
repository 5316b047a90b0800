"""What a loss returns: sums that add up over micro-batches and devices, and are divided once."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_loss._layout import MicroBatch

Scalar = Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossTerms:
    """A loss before its division.

    The loss of a batch is `numerator / denominator` after both have been added over all its micro-batches
    and devices. Denominators are counted from masks and never depend on parameters, so the gradient of the
    batch is the sum of the numerators' gradients over the sum of the denominators, however it was split.

    Args:
        numerator: weighted sum of token losses, differentiable in the log-probabilities.
        denominator: what to divide by (tokens, sequences, or sequences × horizon).
        metrics: name -> (sum, weight); the metric is sum / weight after both have been added.
        maxima: name -> largest value; combined by maximum. 0 where there is no token.
        parts: name -> a part of the numerator, reported over the loss's own denominator.
    """

    numerator: Scalar
    denominator: Scalar
    metrics: dict[str, tuple[Scalar, Scalar]]
    maxima: dict[str, Scalar] = field(default_factory=dict)
    parts: dict[str, Scalar] = field(default_factory=dict)

    def __add__(self, other: "LossTerms") -> "LossTerms":
        """The terms of two parts of a batch taken together."""
        return LossTerms(
            self.numerator + other.numerator,
            self.denominator + other.denominator,
            jax.tree.map(jnp.add, self.metrics, other.metrics),
            jax.tree.map(jnp.maximum, self.maxima, other.maxima),
            jax.tree.map(jnp.add, self.parts, other.parts),
        )

    def over(self, axis_name: str | tuple[str, ...]) -> "LossTerms":
        """The terms of all members of a mapped axis (`shard_map`, `pmap`) taken together.

        Differentiate the local numerator first: the gradient of a batch is the `psum` of the gradients.
        """
        added = self.numerator, self.denominator, self.metrics, self.parts
        numerator, denominator, metrics, parts = jax.lax.psum(added, axis_name)
        return LossTerms(numerator, denominator, metrics, jax.lax.pmax(self.maxima, axis_name), parts)

    def loss(self) -> Scalar:
        """`numerator / denominator`; 0 for a batch without a token that counts, whose numerator is 0."""
        return _divide(self.numerator, self.denominator)

    def means(self) -> dict[str, Scalar]:
        """Every metric and part divided by its weight (0 where that is 0), and every maximum, under one name each."""
        parts = {name: _divide(part, self.denominator) for name, part in self.parts.items()}
        return {name: _divide(*pair) for name, pair in self.metrics.items()} | parts | self.maxima


@runtime_checkable
class Loss(Protocol):
    """The loss of one micro-batch; `make_loss` makes one, or write your own."""

    def __call__(self, logp_RT: Array, entropy_RT: Array, micro: MicroBatch, /) -> LossTerms:
        """The loss before its division."""
        ...


def _divide(numerator: Scalar, denominator: Scalar) -> Scalar:
    return numerator / jnp.where(denominator == 0, 1, denominator)
