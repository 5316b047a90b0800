"""Sampling on the device: exact draws and their log-probabilities.

Sampling parameters turn logits into a distribution in the order of transformers and vLLM: forbidden ids, temperature,
top-k, top-p, min-p, then renormalization. All tokens that tie at a filter's boundary stay, so the distribution does not
depend on the order of the vocabulary. On the device the parameters are arrays: changing them compiles nothing.

A draw inverts the cumulative distribution on two levels: first a block of the vocabulary, then a token of that block.
The masses of the blocks are partial sums of the normalizer, so a draw costs one pass over the logits.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, UInt32

from grpo_contracts import SamplingParams
from grpo_sampler._errors import SamplerError

STOP_CAPACITY = 16
_ONE_AS_BITS = 30  # 1.0 is 0x3F800000: floats in [0, 1] are ordered like their low 30 bits


class SamplingArrays(NamedTuple):
    """Sampling parameters as arrays: scalars, and stop ids padded with -1 to a fixed length."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    stop_ids: Any  # int32 [N]


class Draw(NamedTuple):
    """Drawn tokens, with their log-probabilities under the sampling parameters and under the plain policy."""

    token_B: Int[Array, "B"]
    logp_B: Float[Array, "B"]
    policy_logp_B: Float[Array, "B"]


def check_sampling(sampling: Any) -> None:
    """Raises a SamplerError unless the argument is sampling parameters."""
    if not isinstance(sampling, SamplingParams):
        hint = "Write SamplingParams(**sampling)." if isinstance(sampling, Mapping) else "grpo_contracts has them."
        raise SamplerError(f"sampling must be a SamplingParams: got a {type(sampling).__name__}. {hint}")


def is_filtered(sampling: SamplingParams, min_new_tokens: int = 0) -> bool:
    """Whether tokens are removed, which needs the program that searches for a threshold."""
    check_sampling(sampling)
    filters = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
    return (sampling.temperature > 0.0 and filters) or (min_new_tokens > 0 and len(sampling.stop_ids) > 0)


def sampling_arrays(sampling: SamplingParams, vocab_size: int, min_new_tokens: int = 0) -> SamplingArrays:
    """Sampling parameters as arrays for the device.

    Args:
        sampling: how to draw tokens.
        vocab_size: number of rows of the unembedding.
        min_new_tokens: tokens before which stop ids are forbidden.
    Returns:
        Arrays on the host.
    Raises:
        SamplerError: not sampling parameters, stop ids outside the vocabulary, too many of them, or no token left.
    """
    check_sampling(sampling)
    stop = np.unique(np.asarray(sampling.stop_ids, np.int64))
    outside = stop[(stop < 0) | (stop >= vocab_size)]
    if outside.size:
        raise SamplerError(
            f"stop_ids must lie in [0, {vocab_size}): got {outside[:4].tolist()}. Take them from the model's tokenizer."
        )
    if min_new_tokens > 0 and stop.size >= vocab_size:
        raise SamplerError(
            f"min_new_tokens={min_new_tokens} forbids every stop id, and stop_ids contain the whole vocabulary of "
            f"{vocab_size}: no token is left to sample. Remove stop ids or set min_new_tokens=0."
        )
    if stop.size > STOP_CAPACITY:
        raise SamplerError(f"stop_ids must hold at most {STOP_CAPACITY} different ids: got {stop.size}.")
    padded = np.full(STOP_CAPACITY, -1, np.int32)
    padded[: stop.size] = stop
    return SamplingArrays(
        np.float32(sampling.temperature),
        np.int32(sampling.top_k),
        np.float32(sampling.top_p),
        np.float32(sampling.min_p),
        padded,
    )


def draw(
    logits_BV: Float[Array, "B V"],
    bits_B2: UInt32[Array, "B 2"],
    sampling: SamplingArrays,
    forbid_stop_B: Bool[Array, "B"] | None = None,
    *,
    filtered: bool,
) -> Draw:
    """Draws one token per row from exactly the requested distribution.

    Args:
        logits_BV: float32 logits.
        bits_B2: 64 random bits per row: one word picks the block, the other the token in it.
        sampling: from `sampling_arrays`.
        forbid_stop_B: rows that must not stop yet; only used if `filtered`.
        filtered: static; False skips top-k, top-p, min-p and forbidden ids. See `is_filtered`.
    Returns:
        Token ids; log-probabilities under the sampling parameters (0 if greedy), and at temperature 1 without filters.
    """
    allowed_BV = _forbid(logits_BV, sampling, forbid_stop_B) if filtered else logits_BV
    sampled = _filtered if filtered else _tempered
    return lax.cond(sampling.temperature == 0, _greedy, sampled, logits_BV, allowed_BV, bits_B2, sampling)


def log_probabilities(
    logits_BV: Float[Array, "B V"], sampling: SamplingParams, forbid_stop_B: Bool[Array, "B"] | None = None
) -> Float[Array, "B V"]:
    """The whole distribution that each row's next token is drawn from.

    Args:
        logits_BV: float32 logits.
        sampling: how tokens are drawn.
        forbid_stop_B: rows that must not stop yet; None for none.

    Returns:
        Log-probabilities in nats, -inf where a filter removed the token; the exponentials of each row sum to 1. At
        temperature 0 the most likely token has probability 1, the first one if several are equal.

    Raises:
        SamplerError: logits that are no floats, of another shape or (outside `jit`) NaN; a stop id outside the
            vocabulary, or too many stop ids.
    """
    logits_BV = jnp.asarray(logits_BV)
    if logits_BV.ndim != 2 or not jnp.issubdtype(logits_BV.dtype, jnp.floating):
        raise SamplerError(
            f"logits_BV must be floats with two axes, rows and vocabulary: got {logits_BV.dtype} of shape "
            f"{logits_BV.shape}."
        )
    if not isinstance(logits_BV, Tracer) and jnp.isnan(logits_BV).any():
        raise SamplerError("logits_BV must not hold NaN: such a row has no distribution. Are the parameters finite?")
    vocabulary = logits_BV.shape[-1]
    arrays = sampling_arrays(sampling, vocabulary)
    allowed_BV = _forbid(logits_BV, arrays, forbid_stop_B)
    if sampling.temperature == 0:
        return jnp.where(jnp.arange(vocabulary) == jnp.argmax(allowed_BV, -1)[:, None], 0.0, -jnp.inf)
    scaled_BV, weight_BV = _kept_weights(allowed_BV, arrays)
    total_B1 = weight_BV.sum(-1, keepdims=True)
    centred_BV = scaled_BV - scaled_BV.max(-1, keepdims=True)
    return jnp.where(weight_BV > 0, centred_BV - jnp.log(total_B1), -jnp.inf)


def _greedy(logits_BV: Array, allowed_BV: Array, bits_B2: Array, sampling: SamplingArrays) -> Draw:
    # On a CPU, jnp.argmax over a vocabulary takes 10 to 50 times as long as a maximum: find the block by its maximum.
    blocks_BNC = _blocks(allowed_BV, -jnp.inf)
    block_B = jnp.argmax(blocks_BNC.max(-1), -1)
    inside_BC = _pick(blocks_BNC, block_B)
    token_B = block_B * blocks_BNC.shape[-1] + jnp.argmax(inside_BC, -1)
    return Draw(token_B.astype(jnp.int32), jnp.zeros(len(token_B)), _policy_logp(logits_BV, token_B))


def _tempered(logits_BV: Array, allowed_BV: Array, bits_B2: Array, sampling: SamplingArrays) -> Draw:
    token_B, logp_B = _invert(logits_BV, sampling.temperature, bits_B2)
    policy_logp_B = lax.cond(sampling.temperature == 1, lambda: logp_B, lambda: _policy_logp(logits_BV, token_B))
    return Draw(token_B, logp_B, policy_logp_B)


def _filtered(logits_BV: Array, allowed_BV: Array, bits_B2: Array, sampling: SamplingArrays) -> Draw:
    scaled_BV, weight_BV = _kept_weights(allowed_BV, sampling)
    token_B, logp_B = _invert(jnp.where(weight_BV > 0, scaled_BV, -jnp.inf), 1.0, bits_B2)
    return Draw(token_B, logp_B, _policy_logp(logits_BV, token_B))


def _forbid(logits_BV: Array, sampling: SamplingArrays, forbid_stop_B: Array | None) -> Array:
    if forbid_stop_B is None:
        return logits_BV
    vocabulary = logits_BV.shape[-1]
    # Padding (-1) goes past the end: a negative index would wrap around to the last token.
    ids_N = jnp.where(sampling.stop_ids < 0, vocabulary, sampling.stop_ids)
    is_stop_V = jnp.zeros(vocabulary, bool).at[ids_N].set(True, mode="drop")
    return jnp.where(forbid_stop_B[:, None] & is_stop_V, -jnp.inf, logits_BV)


def _kept_weights(allowed_BV: Array, sampling: SamplingArrays) -> tuple[Array, Array]:
    """Logits divided by the temperature, and exp(logit - maximum), 0 where a filter removes the token."""
    scaled_BV = allowed_BV / sampling.temperature
    weight_BV = jnp.exp(scaled_BV - scaled_BV.max(-1, keepdims=True))
    zero_B = jnp.zeros(len(weight_BV))

    def mass_from(threshold_B: Array, floor_B: Array) -> Array:
        return jnp.where(weight_BV >= jnp.maximum(threshold_B, floor_B)[:, None], weight_BV, 0).sum(-1)

    def top_k() -> Array:
        return _largest(lambda t_B: (weight_BV >= t_B[:, None]).sum(-1) >= sampling.top_k, zero_B)

    def top_p(floor_B: Array) -> Array:
        wanted_B = sampling.top_p * mass_from(floor_B, floor_B)
        return _largest(lambda t_B: mass_from(t_B, floor_B) >= wanted_B, zero_B)

    floor_B = lax.cond(sampling.top_k > 0, top_k, lambda: zero_B)
    floor_B = jnp.maximum(floor_B, lax.cond(sampling.top_p < 1, top_p, lambda floor_B: floor_B, floor_B))
    floor_B = jnp.maximum(floor_B, sampling.min_p)  # the largest weight is 1
    return scaled_BV, jnp.where(weight_BV >= floor_B[:, None], weight_BV, 0)


def _largest(holds: Callable[[Array], Array], like_B: Array) -> Array:
    """The largest float in [0, 1] for which a monotone condition, true at 0, holds.

    Thirty comparisons determine the thirty bits of the float, without sorting the vocabulary and with the same work for
    all logits.
    """

    def step(i: Array, bits_B: Array) -> Array:
        candidate_B = bits_B | (1 << (_ONE_AS_BITS - 1 - i))
        return jnp.where(holds(lax.bitcast_convert_type(candidate_B, jnp.float32)), candidate_B, bits_B)

    bits_B = lax.fori_loop(0, _ONE_AS_BITS, step, jnp.zeros_like(like_B, jnp.int32))
    return lax.bitcast_convert_type(bits_B, jnp.float32)


def _invert(logits_BV: Array, temperature: Array | float, bits_B2: Array) -> tuple[Array, Array]:
    """Draws from softmax(logits / temperature) by inverting its cumulative distribution; token and log-probability."""
    # Divided where they are used: a quotient of all logits would be written to memory and read again.
    top_B1 = logits_BV.max(-1, keepdims=True) / temperature
    blocks_BNC = _blocks(logits_BV, -jnp.inf)
    mass_BN = jnp.exp(blocks_BNC / temperature - top_B1[..., None]).sum(-1)
    uniform_B2 = (bits_B2 >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    block_B = _first_past(mass_BN, uniform_B2[:, 0])
    inside_BC = _pick(blocks_BNC, block_B) / temperature - top_B1
    place_B = _first_past(jnp.exp(inside_BC), uniform_B2[:, 1])
    token_B = block_B * blocks_BNC.shape[-1] + place_B
    logp_B = jnp.take_along_axis(inside_BC, place_B[:, None], -1)[:, 0] - jnp.log(mass_BN.sum(-1))
    return token_B.astype(jnp.int32), logp_B


def _first_past(mass_BN: Array, uniform_B: Array) -> Array:
    """An index drawn in proportion to `mass_BN`; never one of mass zero, whatever the rounding of the running sum."""
    running_BN = jnp.cumsum(mass_BN, -1)
    positive_BN = mass_BN > 0
    past_BN = (running_BN > (uniform_B * running_BN[:, -1])[:, None]) & positive_BN
    last_B = mass_BN.shape[-1] - 1 - jnp.argmax(positive_BN[:, ::-1], -1)
    return jnp.where(past_BN.any(-1), jnp.argmax(past_BN, -1), last_B)


def _policy_logp(logits_BV: Array, token_B: Array) -> Array:
    return _pick(logits_BV[..., None], token_B)[:, 0] - jax.nn.logsumexp(logits_BV, -1)


def _blocks(values_BV: Array, fill: float) -> Array:
    """The vocabulary in blocks of about its square root, padded only if there is no divisor nearby."""
    vocabulary = values_BV.shape[-1]
    size = _block_size(vocabulary)
    short = -vocabulary % size
    if short:
        values_BV = jnp.pad(values_BV, ((0, 0), (0, short)), constant_values=fill)
    return values_BV.reshape(len(values_BV), -1, size)


def _block_size(vocabulary: int) -> int:
    root = max(1, round(vocabulary**0.5))
    divisors = [size for size in range(max(1, root // 4), root * 4 + 1) if vocabulary % size == 0]
    return min(divisors, key=lambda size: abs(size - root)) if divisors else root


def _pick(values_BNC: Array, index_B: Array) -> Array:
    """The entry of each row that its index names."""

    def gather(values_BNC: Array, index_B: Array) -> Array:
        return jnp.take_along_axis(values_BNC, index_B[:, None, None], 1)[:, 0]

    def mask(values_BNC: Array, index_B: Array) -> Array:
        here_BN1 = jnp.arange(values_BNC.shape[1])[:, None] == index_B[:, None, None]
        return jnp.where(here_BN1, values_BNC, -jnp.inf).max(1)

    # A gather on a TPU wants another layout than sums over the vocabulary do: all logits would be copied for it.
    return lax.platform_dependent(values_BNC, index_B, tpu=mask, default=gather)
