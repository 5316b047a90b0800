"""Attention under any mask, in plain XLA, with its own derivative."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row that sees nothing gets a uniform softmax instead of NaN.
_MASKED = -1e30


def attend(
    q_BTHE: Float[Array, "B T H E"],
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T H E"]:
    """Softmax attention in which every query sees at least one key.

    Query heads are grouped by the key/value head that they share, so keys and values are read once and never repeated.

    Args:
        q_BTHE: queries, unscaled.
        k_BSKE: keys.
        v_BSKE: values.
        mask_BTS: True lets a query see a key.

    Returns:
        Mixed values, in q's type; logits, softmax and sums are float32.

    Source: arXiv:2305.13245 (grouped queries).
    """
    B, T, H, E = q_BTHE.shape
    K = k_BSKE.shape[2]
    # Only the small arrays are transposed; the [T, S] ones go from one matrix product to the next.
    q_BKGTE = q_BTHE.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
    out = _attend(q_BKGTE, k_BSKE.swapaxes(1, 2), v_BSKE.swapaxes(1, 2), mask_BTS[:, None, None])
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def causal_mask(segment_BT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which tokens each token sees: the earlier ones of its own segment, and itself.

    Padding counts as a segment of its own: no token sees it, and its rows still have a softmax.

    Args:
        segment_BT: segment of each token within its row; 0 is padding.

    Returns:
        mask[b, t, s]: token t may see token s.
    """
    T = segment_BT.shape[1]
    return (segment_BT[:, :, None] == segment_BT[:, None, :]) & jnp.tri(T, dtype=bool)


@jax.custom_vjp
def _attend(q_BKGTE: Array, k_BKSE: Array, v_BKSE: Array, mask: Array) -> Array:
    return _forward(q_BKGTE, k_BKSE, v_BKSE, mask)[0]


def _forward(q_BKGTE: Array, k_BKSE: Array, v_BKSE: Array, mask: Array) -> tuple[Array, tuple]:
    q_BKME = _flat(q_BKGTE)
    # Scale the float32 logits: a scale rounded to bfloat16 would shift all of them.
    logits = (_product(q_BKME, k_BKSE, 1, 1) * _scale(q_BKME)).reshape(*q_BKGTE.shape[:-1], -1)
    logits = jnp.where(mask, logits, _MASKED)
    weight = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = _flat(weight.sum(-1, keepdims=True))
    weight = _flat(weight)
    out = (_product(weight.astype(v_BKSE.dtype), v_BKSE, 1, 0) / total).astype(q_BKGTE.dtype)
    return out.reshape(q_BKGTE.shape), (q_BKME, k_BKSE, v_BKSE, weight, total, out)


def _backward(saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q_BKME, k_BKSE, v_BKSE, weight, total, out = saved
    # Divide by the softmax's total here, where the arrays are small, instead of dividing the weights.
    d_out_BKME = _flat(d_out) / total
    row_sum = (d_out_BKME * out).sum(-1, keepdims=True)
    d_out_BKME = d_out_BKME.astype(v_BKSE.dtype)
    # A key that a query may not see has weight 0, so its logit gets no gradient.
    d_logits = (weight * (_product(d_out_BKME, v_BKSE, 1, 1) - row_sum)).astype(q_BKME.dtype)
    d_q = _product(d_logits, k_BKSE, 1, 0) * _scale(q_BKME)
    d_k = (_product(q_BKME.swapaxes(2, 3), d_logits, 1, 0) * _scale(q_BKME)).swapaxes(2, 3)
    d_v = _product(d_out_BKME.swapaxes(2, 3), weight.astype(v_BKSE.dtype), 1, 0).swapaxes(2, 3)
    return d_q.astype(q_BKME.dtype).reshape(d_out.shape), d_k.astype(k_BKSE.dtype), d_v.astype(v_BKSE.dtype), None


_attend.defvjp(_forward, _backward)


def _flat(x_BKGTN: Array) -> Array:
    """The queries of all heads of a group as rows of one matrix."""
    B, K, G, T, N = x_BKGTN.shape
    return x_BKGTN.reshape(B, K, G * T, N)


def _scale(q: Array) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """A batch of matrix products over the two leading axes, summed over axis 0 or 1 of each matrix in float32."""
    dimensions = (((2 + a_axis,), (2 + b_axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
