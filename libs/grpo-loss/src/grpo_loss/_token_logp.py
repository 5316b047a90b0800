"""Log-probability and entropy of tokens from hidden states, without a logits tensor for all of them.

Tokens go through the unembedding a chunk at a time. Forward keeps two numbers a token (the log of the normaliser and
the entropy); backward computes a chunk's logits once more and turns them into the chunk's part of both gradients.
Tokens that do not count are moved behind those that do, and chunks without a live token are never computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from grpo_loss._errors import LossError, check_shape

# Logits held at once, in elements; three buffers of this size are alive in the backward pass.
_CHUNK_ELEMENTS = 2**27


class _Tokens(NamedTuple):
    """Tokens of every shard, live ones first: [S, N] and, for the inputs, [S, N, D]."""

    target_SN: Array
    order_SN: Array | None  # where each came from; None if nothing was moved
    chunks: Array  # chunks with a live token: a traced scalar if tokens were moved
    temperature: Array


def token_logp(
    hidden_RTD: Float[Array, "R T D"],
    unembed_VD: Float[Array, "V D"],
    target_RT: Int[Array, "R T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    mask_RT: Bool[Array, "R T"] | None = None,
    chunk: int | None = None,
    shards: int = 1,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-probability of each target and entropy of its distribution, ``softmax(hidden · unembedᵀ / temperature)``.

    Products accumulate in float32 (float64 for float64 inputs) whatever the inputs' type. Differentiable, in reverse
    mode, in the hidden states and the unembedding, which may be the tied input embedding and may be sharded along the
    vocabulary; both outputs have gradients. The temperature is a constant to differentiation.

    Args:
        hidden_RTD: Hidden states after the final norm.
        unembed_VD: One row a token of the vocabulary.
        target_RT: Token whose log-probability is wanted at each position.
        temperature: Divides the logits before the softmax; positive. May be traced.
        mask_RT: Positions to compute; the others give 0, take no time and get no gradient. All if None.
        chunk: Tokens whose logits exist at once, on each shard; chosen to hold some 512 MiB at most if None.
        shards: Equal blocks of rows that lie on different devices: the product of the mesh's data axes. Each is
            chunked by itself, so that nothing moves between devices inside the loop.

    Returns:
        Log-probability and entropy in nats.

    Raises:
        LossError: Shapes that do not match, or rows that do not divide by the shards.

    Source: the chunked linear cross-entropy of Liger Kernel (arXiv:2410.10989), with the entropy's derivative
        ``-p (log p + H)``.
    """
    rows, length, width = hidden_RTD.shape
    check_shape("target_RT", target_RT.shape, (rows, length))
    check_shape("unembed_VD", unembed_VD.shape, (unembed_VD.shape[0], width))
    if mask_RT is not None:
        check_shape("mask_RT", mask_RT.shape, (rows, length))
    if shards < 1 or rows % shards:
        raise LossError(f"shards must divide the {rows} rows: got {shards}. Pad the rows of a micro-batch.")
    if chunk is not None and chunk < 1:
        raise LossError(f"chunk must be at least 1 token: got {chunk}.")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise LossError(f"temperature must be positive: got {temperature}. Score greedy rollouts at 1.0.")
    tokens = rows // shards * length
    chunk = min(tokens, chunk or _default_chunk(unembed_VD.shape[0]))
    padded = -(-tokens // chunk) * chunk

    def blocks(array: Array) -> Array:
        array = array.reshape(shards, tokens, *array.shape[2:])
        return jnp.pad(array, [(0, 0), (0, padded - tokens)] + [(0, 0)] * (array.ndim - 2))

    order_SN, chunks = None, padded // chunk
    target_SN = blocks(target_RT)
    if mask_RT is not None:
        # Padding may hold anything, and 0 times a NaN in a half-dead chunk would reach the unembedding's gradient.
        hidden_RTD = jnp.where(mask_RT[..., None], hidden_RTD, 0)
        live_SN = blocks(mask_RT)
        order_SN = jnp.argsort(~live_SN, axis=1, stable=True)
        chunks = -(-live_SN.sum(axis=1).max() // chunk)
        target_SN = jnp.take_along_axis(target_SN, order_SN, axis=1)
    acc_dtype = jnp.promote_types(jnp.promote_types(hidden_RTD.dtype, unembed_VD.dtype), jnp.float32)
    static = _Tokens(target_SN, order_SN, jnp.asarray(chunks, jnp.int32), jnp.asarray(temperature, acc_dtype))
    logp_SN, entropy_SN = _chunked(chunk, blocks(hidden_RTD), unembed_VD, static)
    logp_RT, entropy_RT = (x[:, :tokens].reshape(rows, length) for x in (logp_SN, entropy_SN))
    if mask_RT is None:
        return logp_RT, entropy_RT
    return jnp.where(mask_RT, logp_RT, 0), jnp.where(mask_RT, entropy_RT, 0)


def _default_chunk(vocabulary: int) -> int:
    """A power of two between 128 and 512 whose logits stay near the budget: a longer last chunk is more waste."""
    return min(512, max(128, 1 << (max(1, _CHUNK_ELEMENTS // vocabulary).bit_length() - 1)))


def _outputs(chunk: int, hidden_SND: Array, unembed_VD: Array, tokens: _Tokens) -> tuple[Array, Array]:
    return _forward(chunk, hidden_SND, unembed_VD, tokens)[0]


def _forward(chunk: int, hidden_SND: Array, unembed_VD: Array, tokens: _Tokens) -> tuple[tuple[Array, Array], tuple]:
    moved_SND = _move(hidden_SND, tokens.order_SN)

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        target_SC = _slice(tokens.target_SN, i, chunk)
        logits_SCV = _logits(_slice(moved_SND, i, chunk), unembed_VD, tokens.temperature)
        peak_SC = logits_SCV.max(axis=-1)
        shifted_SCV = logits_SCV - peak_SC[..., None]
        exp_SCV = jnp.exp(shifted_SCV)
        total_SC = exp_SCV.sum(axis=-1)
        normaliser_SC = peak_SC + jnp.log(total_SC)
        # The condition changes no value: it keeps XLA on CPUs from a fused reduction that takes twenty times as long.
        mean_SC = jnp.where(exp_SCV > 0, exp_SCV * shifted_SCV, 0).sum(axis=-1) / total_SC
        chosen_SC = jnp.take_along_axis(logits_SCV, target_SC[..., None], axis=-1)[..., 0]
        new = (chosen_SC - normaliser_SC, jnp.log(total_SC) - mean_SC, normaliser_SC)
        return tuple(_put(whole, part, i, chunk) for whole, part in zip(carry, new, strict=True))  # type: ignore[return-value]

    zeros_SN = jnp.zeros(tokens.target_SN.shape, tokens.temperature.dtype)
    logp_SN, entropy_SN, normaliser_SN = lax.fori_loop(0, tokens.chunks, body, (zeros_SN, zeros_SN, zeros_SN))
    back = None if tokens.order_SN is None else jnp.argsort(tokens.order_SN, axis=1)
    outputs = _move(logp_SN, back), _move(entropy_SN, back)
    return outputs, (hidden_SND, unembed_VD, tokens, normaliser_SN, entropy_SN)


def _backward(chunk: int, saved: tuple, cotangents: tuple[Array, Array]) -> tuple[Array, Array, None]:
    hidden_SND, unembed_VD, tokens, normaliser_SN, entropy_SN = saved
    d_logp_SN, d_entropy_SN = (_move(x_SN, tokens.order_SN) for x_SN in cotangents)
    moved_SND = _move(hidden_SND, tokens.order_SN)
    acc_dtype = tokens.temperature.dtype

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden_SND, d_unembed_SVD = carry
        hidden_SCD = _slice(moved_SND, i, chunk)
        target_SC, normaliser_SC, entropy_SC, d_logp_SC, d_entropy_SC = (
            _slice(x, i, chunk)[..., None]
            for x in (tokens.target_SN, normaliser_SN, entropy_SN, d_logp_SN, d_entropy_SN)
        )
        logits_SCV = _logits(hidden_SCD, unembed_VD, tokens.temperature)
        logp_SCV = logits_SCV - normaliser_SC
        d_all_SCV = -jnp.exp(logp_SCV) * (d_logp_SC + d_entropy_SC * (logp_SCV + entropy_SC))
        d_target_SC = d_logp_SC / tokens.temperature
        d_logits_SCV = d_all_SCV / tokens.temperature + jnp.where(
            _is_target(logits_SCV, target_SC[..., 0]), d_target_SC, 0
        )
        # Low-precision inputs are multiplied in their own type, as the matrix units want it, and summed in float32.
        d_logits_SCV = d_logits_SCV.astype(jnp.promote_types(hidden_SND.dtype, unembed_VD.dtype))
        d_hidden_SCD = jnp.einsum("scv,vd->scd", d_logits_SCV, unembed_VD, preferred_element_type=acc_dtype)
        d_unembed = jnp.einsum("scv,scd->svd", d_logits_SCV, hidden_SCD, preferred_element_type=acc_dtype)
        return _put(d_hidden_SND, d_hidden_SCD.astype(d_hidden_SND.dtype), i, chunk), d_unembed_SVD + d_unembed

    shards = hidden_SND.shape[0]
    # One accumulator a shard: they are added once, after the loop, and not in every turn of it.
    zeros = jnp.zeros_like(hidden_SND), jnp.zeros((shards, *unembed_VD.shape), acc_dtype)
    d_hidden_SND, d_unembed_SVD = lax.fori_loop(0, tokens.chunks, body, zeros)
    back = None if tokens.order_SN is None else jnp.argsort(tokens.order_SN, axis=1)
    return _move(d_hidden_SND, back), d_unembed_SVD.sum(axis=0).astype(unembed_VD.dtype), None


_chunked = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_chunked.defvjp(_forward, _backward)


def _logits(hidden_SCD: Array, unembed_VD: Array, temperature: Array) -> Array:
    logits = jnp.einsum("scd,vd->scv", hidden_SCD, unembed_VD, preferred_element_type=temperature.dtype)
    return logits / temperature


def _is_target(logits_SCV: Array, target_SC: Array) -> Array:
    return lax.broadcasted_iota(target_SC.dtype, logits_SCV.shape, 2) == target_SC[..., None]


def _move(array: Array, order_SN: Array | None) -> Array:
    if order_SN is None:
        return array
    return jnp.take_along_axis(array, order_SN.reshape(*order_SN.shape, *[1] * (array.ndim - 2)), axis=1)


def _slice(array: Array, i: Array, chunk: int) -> Array:
    return lax.dynamic_slice_in_dim(array, i * chunk, chunk, axis=1)


def _put(whole: Array, part: Array, i: Array, chunk: int) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part, i * chunk, axis=1)
