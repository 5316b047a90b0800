"""Attention over any number of key/value parts, in plain XLA; one softmax over all of them."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite: a row that may see nothing gets a uniform softmax instead of NaN.
_MASKED = -1e30

Part = tuple[Float[Array, "B S K E"], Float[Array, "B S K E"], Bool[Array, "#B T S"]]


def attend(q_BTHE: Float[Array, "B T H E"], parts: Sequence[Part]) -> Float[Array, "B T H E"]:
    """Softmax attention whose keys come in several parts, which are never concatenated.

    Query heads are grouped by the key/value head they share, so that keys and values are read once and never repeated.

    Args:
        q_BTHE: queries, unscaled.
        parts: (k_BSKE, v_BSKE, mask_BTS) of each part; S may differ, True lets a query see a key.

    Returns:
        Mixed values, in q's type; logits, softmax and sums are float32.

    Source: arXiv:2305.13245 (grouped queries).
    """
    B, T, H, E = q_BTHE.shape
    K = parts[0][0].shape[2]
    q = q_BTHE.reshape(B, T, K, H // K, E)
    scale = 1 / math.sqrt(E)  # on the float32 logits: rounded to bf16 it would shift them all
    logits = [
        jnp.where(
            mask[:, None, None],
            jnp.einsum("BTKGE,BSKE->BKGTS", q, k, preferred_element_type=jnp.float32) * scale,
            _MASKED,
        )
        for k, _, mask in parts
    ]
    # The maximum only steadies the exponentials; its gradient cancels.
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([part.max(-1) for part in logits]), axis=0))
    weights = [jnp.exp(part - top[..., None]) for part in logits]
    total = sum(part.sum(-1) for part in weights)
    mixed = sum(
        jnp.einsum("BKGTS,BSKE->BTKGE", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v, _) in zip(weights, parts)
    )
    out = mixed / jnp.moveaxis(jnp.asarray(total), -1, 1)[..., None]
    return out.reshape(B, T, H, E).astype(q_BTHE.dtype)


def causal_mask(segment_BT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which earlier tokens of its own segment a token sees, itself included.

    Padding counts as a segment of its own: nothing sees it, and its rows still have a softmax.

    Args:
        segment_BT: segment of each token within its row; 0 is padding.

    Returns:
        mask[b, t, s]: token t may see token s.
    """
    T = segment_BT.shape[1]
    return (segment_BT[:, :, None] == segment_BT[:, None, :]) & jnp.tri(T, dtype=bool)
