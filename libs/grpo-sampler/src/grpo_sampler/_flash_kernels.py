"""What the kernels of `_flash` do with one tile of keys.

Logits are stored with keys down and queries across, so that each query's sums are row vectors, which broadcast for
free.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

# A masked logit lies so far below the least maximum that its weight is 0 even for a query that sees nothing.
_MASKED, _LEAST = -1e30, -5e29
# Axes that a product of two matrices sums over.
ACROSS, ALONG, PLAIN = ((1,), (1,)), ((0,), (0,)), ((1,), (0,))


class Kernels(NamedTuple):
    """What the kernels are compiled for.

    Args:
        scale: factor of the products of queries and keys.
        queries: positions of a query tile.
        keys: positions of a row's key tile.
        prompt_keys: positions of a prompt's key tile.
        interpret: run without a TPU, for tests.
    """

    scale: float
    queries: int
    keys: int
    prompt_keys: int
    interpret: bool


Steps = tuple[Callable[[], None], Callable[[Array, Array, Array], None], Callable[[], None]]
"""Before the first tile of keys; with each, given keys, values and the mask; after the last one."""


def forward_kernel(scale: float, q: Any, o: Any, lse: Any, highest: Any, total: Any, mixed: Any) -> Steps:
    """Softmax with a running maximum: mixed values, and the log-sum-exp of each query."""

    def start() -> None:
        highest[...] = jnp.full_like(highest, _LEAST)
        total[...], mixed[...] = jnp.zeros_like(total), jnp.zeros_like(mixed)

    def add(k: Array, v: Array, mask: Array) -> None:
        logits = jnp.where(mask, dot(k, q[...], ACROSS) * scale, _MASKED)
        before = highest[...]
        highest[...] = jnp.maximum(before, logits.max(0, keepdims=True))
        weight = jnp.exp(logits - highest[...])
        shrink = jnp.exp(before - highest[...])
        total[...] = shrink * total[...] + weight.sum(0, keepdims=True)
        mixed[...] = shrink * mixed[...] + dot(v, weight.astype(v.dtype), ALONG)

    def end() -> None:
        some = jnp.where(total[...] > 0, total[...], 1.0)
        o[...] = (mixed[...] / some).T.astype(o.dtype)
        lse[...] = highest[...] + jnp.log(some)

    return start, add, end


def d_q_kernel(scale: float, q: Any, d_o: Any, lse: Any, row_sum: Any, d_q: Any, q_sum: Any) -> Steps:
    """Gradients of the queries."""

    def start() -> None:
        q_sum[...] = jnp.zeros_like(q_sum)

    def add(k: Array, v: Array, mask: Array) -> None:
        _, d_logits = weights(scale, k, v, q[...], d_o[...], lse[...], row_sum[...], mask)
        q_sum[...] += dot(k, d_logits.astype(k.dtype), ALONG)

    def end() -> None:
        d_q[...] = (q_sum[...] * scale).T.astype(d_q.dtype)

    return start, add, end


def weights(
    scale: float, k: Array, v: Array, q: Array, d_o: Array, lse: Array, row_sum: Array, mask: Array
) -> tuple[Array, Array]:
    """Softmax weights of a tile, keys down and queries across, and the gradient of its unscaled logits."""
    logits = jnp.where(mask, dot(k, q, ACROSS) * scale, _MASKED)
    weight = jnp.exp(logits - lse)
    return weight, weight * (dot(v, d_o, ACROSS) - row_sum)


def prompt_mask(tile: Any, length: Any, kernels: Kernels) -> Array:
    """Which keys of a prompt's tile lie inside the prompt, as a column."""
    size = kernels.prompt_keys
    return tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) < length


def row_mask(i: Any, j: Any, q_segment: Any, k_segment: Any, kernels: Kernels) -> Array:
    """Which pairs of a row's query tile i and key tile j are of one segment, the key not behind the query."""
    across = jax.lax.broadcasted_iota(jnp.int32, q_segment.shape, 1)
    query_at = i * kernels.queries + jax.lax.rem(across, kernels.queries)
    key_at = j * kernels.keys + jax.lax.broadcasted_iota(jnp.int32, k_segment.shape, 0)
    return (k_segment[...] == q_segment[...]) & (key_at <= query_at)


def dot(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)
