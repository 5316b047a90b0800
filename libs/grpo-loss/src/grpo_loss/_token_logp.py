"""Log-probability and entropy of tokens from hidden states, without a logits tensor for all of them.

Tokens go through the unembedding a chunk at a time. Forward keeps two numbers per token (the log of the normaliser and
the entropy); backward computes a chunk's logits once more and turns them into the chunk's part of both gradients.
Tokens that do not count are moved behind those that do, and chunks without a live token are never computed. Where all
tokens fit one chunk, backward reads the logits that forward left, and nothing is moved.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from grpo_loss._errors import LossError, as_array, check_boolean, check_integers, check_shape, known

# Most tokens of a chunk: this many, or as many as have 256 MiB of logits, if that is more. Three buffers of a chunk's
# logits are alive in the backward pass; each chunk reads and writes the whole gradient of the unembedding once.
_CHUNK_TOKENS, _CHUNK_LOGITS = 512, 2**26


class _Tokens(NamedTuple):
    """Tokens of every shard, live ones first, [S, N]."""

    target_SN: Array
    order_SN: Array | None  # where each came from; None if nothing was moved
    chunks: Array | None  # chunks with a live token: a traced scalar if tokens were moved; None if all fit one
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
        hidden_RTD: hidden states after the final norm.
        unembed_VD: one row per token of the vocabulary.
        target_RT: the token whose log-probability is wanted at each position. Inside `jit` only the device knows its
            values, and one outside the vocabulary gives NaN or another token's log-probability; under
            `jax.disable_jit()` it is an error there, too.
        temperature: divides the logits before the softmax; positive. May be traced.
        mask_RT: positions to compute; the others give 0 and get no gradient, and a chunk of them takes no time. None:
            all.
        chunk: tokens whose logits exist at once, on each shard. None: as `logit_chunks` divides them.
        shards: equal blocks of rows on different devices: the product of the mesh's data axes. Each is chunked by
            itself, so that nothing moves between devices inside the loop.

    Returns:
        Log-probability and entropy, in nats.

    Raises:
        LossError: shapes that do not match, rows that do not divide by the shards, or, outside `jit`, a target outside
            the vocabulary.

    Source: the chunked linear cross-entropy of Liger Kernel (arXiv:2410.10989), with the entropy's derivative
        ``-p (log p + H)``.
    """
    hidden_RTD, unembed_VD, target_RT = (
        jnp.asarray(as_array(name, array))
        for name, array in (("hidden_RTD", hidden_RTD), ("unembed_VD", unembed_VD), ("target_RT", target_RT))
    )
    mask_RT = None if mask_RT is None else jnp.asarray(as_array("mask_RT", mask_RT))
    _check_arrays(hidden_RTD, unembed_VD, target_RT, mask_RT)
    rows, length, _ = hidden_RTD.shape
    if shards < 1 or rows % shards:
        raise LossError(f"shards must divide the {rows} rows: got {shards}. Pad the rows of a micro-batch.")
    if chunk is not None and chunk < 1:
        raise LossError(f"chunk must be at least 1 token: got {chunk}.")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise LossError(f"temperature must be positive: got {temperature}. Score greedy rollouts at 1.0.")
    tokens = rows // shards * length
    chunk = min(tokens, chunk or default_chunk(tokens, unembed_VD.shape[0]))
    padded = -(-tokens // chunk) * chunk

    def blocks(array: Array) -> Array:
        array = array.reshape(shards, tokens, *array.shape[2:])
        return jnp.pad(array, [(0, 0), (0, padded - tokens)] + [(0, 0)] * (array.ndim - 2))

    order_SN, chunks = None, None if padded == chunk else jnp.asarray(padded // chunk, jnp.int32)
    target_SN = blocks(target_RT)
    if mask_RT is not None:
        # Padding may hold anything, and 0 times a NaN in a half-dead chunk would reach the unembedding's gradient.
        hidden_RTD = jnp.where(mask_RT[..., None], hidden_RTD, 0)
    if mask_RT is not None and chunks is not None:
        live_SN = blocks(mask_RT)
        order_SN = jnp.argsort(~live_SN, axis=1, stable=True)
        chunks = -(-live_SN.sum(axis=1, dtype=jnp.int32).max() // chunk)
        target_SN = jnp.take_along_axis(target_SN, order_SN, axis=1)
    acc_dtype = jnp.promote_types(jnp.promote_types(hidden_RTD.dtype, unembed_VD.dtype), jnp.float32)
    static = _Tokens(target_SN, order_SN, chunks, jnp.asarray(temperature, acc_dtype))
    logp_SN, entropy_SN = _chunked(chunk, blocks(hidden_RTD), unembed_VD, static)
    logp_RT, entropy_RT = (x[:, :tokens].reshape(rows, length) for x in (logp_SN, entropy_SN))
    if mask_RT is None:
        return logp_RT, entropy_RT
    return jnp.where(mask_RT, logp_RT, 0), jnp.where(mask_RT, entropy_RT, 0)


def logit_chunks(tokens: int, vocabulary: int, chunk: int | None = None) -> int:
    """In how many chunks `token_logp` computes logits.

    Args:
        tokens: positions of one shard.
        vocabulary: rows of the unembedding.
        chunk: tokens of a chunk, as given to `token_logp`.

    Returns:
        Chunks of so many tokens; of 512 at most, or of 256 MiB of float32 logits if those are more, if it is None.
    """
    return -(-tokens // (chunk or max(_CHUNK_TOKENS, _CHUNK_LOGITS // vocabulary // 128 * 128)))


def default_chunk(tokens: int, vocabulary: int) -> int:
    """Tokens of a chunk: all of them, or the fewest 128s that make no more chunks, so that the last one is full."""
    chunks = logit_chunks(tokens, vocabulary)
    return tokens if chunks == 1 else -(-tokens // (128 * chunks)) * 128


def _check_arrays(hidden_RTD: Array, unembed_VD: Array, target_RT: Array, mask_RT: Array | None) -> None:
    if hidden_RTD.ndim != 3:
        raise LossError(
            f"hidden_RTD must have three axes (rows, positions, width): got shape {hidden_RTD.shape}. "
            "Add an axis for a single row (`hidden_TD[None]`)."
        )
    *shape, width = hidden_RTD.shape
    if unembed_VD.ndim != 2 or unembed_VD.shape[1] != width:
        transposed = unembed_VD.ndim == 2 and unembed_VD.shape[0] == width
        raise LossError(
            f"unembed_VD must have shape (vocabulary, {width}), a row per token: got {unembed_VD.shape}."
            + (" Transpose it (`unembed.T`)." if transposed else "")
        )
    check_shape("target_RT", target_RT.shape, tuple(shape))
    check_integers("target_RT", target_RT)
    for name, array in (("hidden_RTD", hidden_RTD), ("unembed_VD", unembed_VD)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise LossError(f"{name} must be of a floating type: got {array.dtype}.")
    if mask_RT is not None:
        check_shape("mask_RT", mask_RT.shape, tuple(shape))
        check_boolean("mask_RT", mask_RT)
    targets, counted = known(target_RT), True if mask_RT is None else known(mask_RT)
    if targets is None or counted is None:
        return
    outside = ((targets < 0) | (targets >= unembed_VD.shape[0])) & counted
    if outside.any():
        where = tuple(int(axis[0]) for axis in outside.nonzero())
        raise LossError(
            f"target_RT must be in [0, {unembed_VD.shape[0]}), the vocabulary: got {int(targets[where])} at "
            f"{list(where)}. Mask such positions out."
        )


def _outputs(chunk: int, hidden_SND: Array, unembed_VD: Array, tokens: _Tokens) -> tuple[Array, Array]:
    return _forward(chunk, hidden_SND, unembed_VD, tokens)[0]


def _forward(chunk: int, hidden_SND: Array, unembed_VD: Array, tokens: _Tokens) -> tuple[tuple[Array, Array], tuple]:
    if tokens.chunks is None:
        logits_SNV = _logits(hidden_SND, unembed_VD, tokens.temperature)
        logp_SN, entropy_SN, normaliser_SN = _scores(logits_SNV, tokens.target_SN)
        return (logp_SN, entropy_SN), (hidden_SND, unembed_VD, tokens, normaliser_SN, entropy_SN, logits_SNV)
    moved_SND = _move(hidden_SND, tokens.order_SN)

    def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        logits_SCV = _logits(_slice(moved_SND, i, chunk), unembed_VD, tokens.temperature)
        new = _scores(logits_SCV, _slice(tokens.target_SN, i, chunk))
        return tuple(_put(whole, part, i, chunk) for whole, part in zip(carry, new, strict=True))

    zeros_SN = jnp.zeros(tokens.target_SN.shape, tokens.temperature.dtype)
    logp_SN, entropy_SN, normaliser_SN = lax.fori_loop(0, tokens.chunks, body, (zeros_SN, zeros_SN, zeros_SN))
    back = None if tokens.order_SN is None else jnp.argsort(tokens.order_SN, axis=1)
    outputs = _move(logp_SN, back), _move(entropy_SN, back)
    return outputs, (hidden_SND, unembed_VD, tokens, normaliser_SN, entropy_SN, None)


def _backward(chunk: int, saved: tuple, cotangents: tuple[Array, Array]) -> tuple[Array, Array, None]:
    hidden_SND, unembed_VD, tokens, normaliser_SN, entropy_SN, logits_SNV = saved
    d_logp_SN, d_entropy_SN = (_move(x_SN, tokens.order_SN) for x_SN in cotangents)
    by_token = tokens.target_SN, normaliser_SN, entropy_SN, d_logp_SN, d_entropy_SN
    if logits_SNV is not None:
        d_hidden_SND, d_unembed_SVD = _gradients(logits_SNV, hidden_SND, unembed_VD, tokens.temperature, *by_token)
        return d_hidden_SND.astype(hidden_SND.dtype), d_unembed_SVD.sum(axis=0).astype(unembed_VD.dtype), None
    moved_SND = _move(hidden_SND, tokens.order_SN)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden_SND, d_unembed_SVD = carry
        hidden_SCD = _slice(moved_SND, i, chunk)
        logits_SCV = _logits(hidden_SCD, unembed_VD, tokens.temperature)
        by_token_SC = (_slice(x_SN, i, chunk) for x_SN in by_token)
        d_hidden_SCD, d_unembed = _gradients(logits_SCV, hidden_SCD, unembed_VD, tokens.temperature, *by_token_SC)
        return _put(d_hidden_SND, d_hidden_SCD.astype(d_hidden_SND.dtype), i, chunk), d_unembed_SVD + d_unembed

    shards = hidden_SND.shape[0]
    # One accumulator per shard: they are added once, after the loop, and not in every turn of it.
    zeros = jnp.zeros_like(hidden_SND), jnp.zeros((shards, *unembed_VD.shape), tokens.temperature.dtype)
    d_hidden_SND, d_unembed_SVD = lax.fori_loop(0, tokens.chunks, body, zeros)
    back = None if tokens.order_SN is None else jnp.argsort(tokens.order_SN, axis=1)
    return _move(d_hidden_SND, back), d_unembed_SVD.sum(axis=0).astype(unembed_VD.dtype), None


_chunked = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_chunked.defvjp(_forward, _backward)


def _logits(hidden_SCD: Array, unembed_VD: Array, temperature: Array) -> Array:
    logits = jnp.einsum("scd,vd->scv", hidden_SCD, unembed_VD, preferred_element_type=temperature.dtype)
    return logits / temperature


def _scores(logits_SCV: Array, target_SC: Array) -> tuple[Array, Array, Array]:
    """Log-probability of the targets, entropy, and log of the normaliser."""
    peak_SC = logits_SCV.max(axis=-1)
    shifted_SCV = logits_SCV - peak_SC[..., None]
    exp_SCV = jnp.exp(shifted_SCV)
    total_SC = exp_SCV.sum(axis=-1)
    normaliser_SC = peak_SC + jnp.log(total_SC)
    # The condition changes no value: it keeps XLA on CPUs from a fused reduction that takes twenty times as long.
    mean_SC = jnp.where(exp_SCV > 0, exp_SCV * shifted_SCV, 0).sum(axis=-1) / total_SC
    chosen_SC = jnp.take_along_axis(logits_SCV, target_SC[..., None], axis=-1)[..., 0]
    return chosen_SC - normaliser_SC, jnp.log(total_SC) - mean_SC, normaliser_SC


def _gradients(
    logits_SCV: Array, hidden_SCD: Array, unembed_VD: Array, temperature: Array, *by_token_SC: Array
) -> tuple[Array, Array]:
    """A chunk's part of both gradients: of the hidden states and, for each shard, of the unembedding.

    Args:
        logits_SCV: from `_logits`.
        hidden_SCD: what they were computed from.
        unembed_VD: the same.
        temperature: the same.
        *by_token_SC: target, normaliser, entropy, and the gradients of log-probability and entropy.
    """
    target_SC, normaliser_SC, entropy_SC, d_logp_SC, d_entropy_SC = (x_SC[..., None] for x_SC in by_token_SC)
    acc_dtype = temperature.dtype
    logp_SCV = logits_SCV - normaliser_SC
    d_all_SCV = -jnp.exp(logp_SCV) * (d_logp_SC + d_entropy_SC * (logp_SCV + entropy_SC))
    d_target_SC = d_logp_SC / temperature
    d_logits_SCV = d_all_SCV / temperature + jnp.where(_is_target(logits_SCV, target_SC[..., 0]), d_target_SC, 0)
    # Low-precision inputs are multiplied in their own type, as the matrix units want it, and summed in float32.
    d_logits_SCV = d_logits_SCV.astype(jnp.promote_types(hidden_SCD.dtype, unembed_VD.dtype))
    d_hidden_SCD = jnp.einsum("scv,vd->scd", d_logits_SCV, unembed_VD, preferred_element_type=acc_dtype)
    d_unembed_SVD = jnp.einsum("scv,scd->svd", d_logits_SCV, hidden_SCD, preferred_element_type=acc_dtype)
    return d_hidden_SCD, d_unembed_SVD


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
