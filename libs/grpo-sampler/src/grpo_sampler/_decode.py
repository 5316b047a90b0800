"""What runs on the device: prompts into the cache, a chunk of decoding steps, dropping rows. Pure functions.

A prompt of n tokens leaves the keys and values of its first n - 1 tokens in one *unit* of the cache, which up to g rows
of its group share; its last token is the first input of every row. A row's own keys and values live in a ring of
columns: in each step all rows write the same column, whenever each of them began, so a step is one slice update and no
scatter. A row that has emitted n tokens sees the last n + 1 columns written.

Suffixes beyond the usual: U units, g rows a unit, C columns of the ring, N words.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, UInt32

from grpo_sampler._config import ModelConfig
from grpo_sampler._kernels import Attention, self_attention
from grpo_sampler._law import LawArrays, draw
from grpo_sampler._layers import Layer, attention_out, mlp, qkv, rms_norm
from grpo_sampler._rope import rope_tables

_MASKED = -1e30


# The fields of these are arrays, of the device or the host, or what stands for them: shapes, shardings, axes.
class Weights(NamedTuple):
    """Parameters as decoding wants them: `layers` is a tuple of blocks (unrolled) or one stacked dictionary."""

    embed: Any
    unembed: Any
    final_norm: Any
    layers: Any


class Cache(NamedTuple):
    """Keys and values. Each field is a tuple of L arrays (unrolled) or one array with a leading L axis."""

    shared_keys: Any  # [U, K, E, Tp]
    shared_values: Any  # [U, K, Tp, E]
    own_keys: Any  # [S, K, E, C]
    own_values: Any  # [S, K, C, E]


class Rows(NamedTuple):
    """The rows' state between chunks, kept on the host. int32, `live_S` bool."""

    token_S: Any  # what the row reads next
    position_S: Any  # absolute position of that token
    emitted_S: Any  # tokens of the completion so far
    limit_S: Any  # tokens at which the completion ends
    live_S: Any
    prompt_id_S: Any
    sample_S: Any
    place_S: Any  # unit * g + seat
    row_Ug: Any  # the row in each seat
    shared_length_U: Any  # prompt tokens in each unit


class Emitted(NamedTuple):
    """What a chunk emitted, step by step; token -1 where a row emitted nothing."""

    token_iS: Any
    logp_iS: Any
    policy_logp_iS: Any
    column_1: Any  # the ring's next column


def weights_from(params: Any, config: ModelConfig, dtype: jnp.dtype, unroll: bool) -> Weights:
    """Casts parameters to the compute type and, if asked, unstacks the layers once instead of in every step."""
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    layers = cast["layers"]
    if unroll:
        layers = tuple({name: leaf[i] for name, leaf in layers.items()} for i in range(config.layers))
    return Weights(cast["embed"], cast["embed" if config.tied else "unembed"], cast["final_norm"], layers)


def empty_cache(
    config: ModelConfig, dtype: jnp.dtype, unroll: bool, *, units: int, prompt: int, rows: int, columns: int
) -> Cache:
    """A cache of zeros: whatever is masked must at least be finite."""
    K, E = config.kv_heads, config.head_size
    shapes = Cache((units, K, E, prompt), (units, K, prompt, E), (rows, K, E, columns), (rows, K, columns, E))
    if unroll:
        return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for shape in shapes))
    return Cache(*(jnp.zeros((config.layers, *shape), dtype) for shape in shapes))


def prefill(
    weights: Weights,
    cache: Cache,
    tokens_PT: Int[Array, "P T"],
    length_P: Int[Array, "P"],
    unit_P: Int[Array, "P"],
    *,
    config: ModelConfig,
    attention: Attention = "xla",
) -> Cache:
    """Writes the keys and values of whole prompts into their units.

    Args:
        weights: from `weights_from`.
        cache: where to; donated.
        tokens_PT: prompts, right-padded.
        length_P: tokens to be seen, without the last one.
        unit_P: unit of each prompt; one past the last unit drops the row.
        config: the model.
        attention: kernel of the prompt's own attention.
    Returns:
        The cache.
    """
    position_T = jnp.arange(tokens_PT.shape[1])
    segment_PT = (position_T < length_P[:, None]).astype(jnp.int32)
    cos, sin = rope_tables(position_T[None], config)

    def block(x: Array, layer: Layer) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = qkv(layer, x, cos, sin, config)
        x = attention_out(layer, x, self_attention(attention, q, k, v, segment_PT))
        return mlp(layer, x, config), (jnp.einsum("PTKE->PKET", k), jnp.einsum("PTKE->PKTE", v))

    x = weights.embed[tokens_PT]
    if isinstance(weights.layers, tuple):
        fresh = []
        for layer in weights.layers:
            x, pair = block(x, layer)
            fresh.append(pair)
        keys = tuple(old.at[unit_P].set(k, mode="drop") for old, (k, _) in zip(cache.shared_keys, fresh))
        values = tuple(old.at[unit_P].set(v, mode="drop") for old, (_, v) in zip(cache.shared_values, fresh))
    else:
        _, (k, v) = lax.scan(block, x, weights.layers)
        keys = cache.shared_keys.at[:, unit_P].set(k, mode="drop")
        values = cache.shared_values.at[:, unit_P].set(v, mode="drop")
    return cache._replace(shared_keys=keys, shared_values=values)


def keep(cache: Cache, unit_U: Int[Array, "U"], row_S: Int[Array, "S"]) -> Cache:
    """The cache of some rows and units, in the given order: how a draining batch shrinks."""
    axis = 0 if isinstance(cache.own_keys, tuple) else 1

    def take(tree: Any, index: Array) -> Any:
        return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=axis, mode="clip"), tree)

    return Cache(
        take(cache.shared_keys, unit_U),
        take(cache.shared_values, unit_U),
        take(cache.own_keys, row_S),
        take(cache.own_values, row_S),
    )


def row_keys(seed_N: UInt32[Array, "2"], step: Array, prompt_id_S: Array, sample_S: Array) -> Array:
    """Random keys that depend on (seed, step, prompt, sample) alone.

    Source: Threefry-2x32, Salmon et al. 2011; always this generator, whatever jax's default is.
    """
    root = jax.random.fold_in(jax.random.wrap_key_data(seed_N, impl="threefry2x32"), step)
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(root, prompt), sample))(
        prompt_id_S, sample_S
    )


def decode(
    weights: Weights,
    cache: Cache,
    rows: Rows,
    law: LawArrays,
    seed_N: UInt32[Array, "2"],
    step: Array,
    min_new: Array,
    column_1: Int[Array, "1"],
    steps: Array,
    floor: Array,
    *,
    config: ModelConfig,
    capacity: int,
    filtered: bool,
    in_step: tuple[str, ...] = (),
) -> tuple[Cache, Emitted]:
    """Decodes until `steps` steps are done or at most `floor` rows live; nothing leaves the device in between.

    Args:
        weights: from `weights_from`.
        cache: donated.
        rows: what each row is about to read, and where.
        law: from `law_arrays`.
        seed_N: the seed's two words.
        step: optimizer step, part of every row's key.
        min_new: tokens before which stop ids are forbidden.
        column_1: the ring's next column.
        steps: at most `capacity`.
        floor: live rows at which to come back early.
        config: the model.
        capacity: length of the record; static.
        filtered: see `draw`; static.
        in_step: mesh axes whose shards must take the same number of steps, because collectives run inside them.
    Returns:
        The cache, and what was emitted.
    """
    rows_count = rows.token_S.shape[0]
    columns = jax.tree.leaves(cache.own_values)[0].shape[-2]
    keys_S = row_keys(seed_N, step, rows.prompt_id_S, rows.sample_S)

    def count(live_S: Array) -> Array:
        return lax.pmax(live_S.sum(), in_step) if in_step else live_S.sum()

    def more(carry: tuple) -> Array:
        i, living = carry[0], carry[1]
        return (i < steps) & (living > floor)

    def one(carry: tuple) -> tuple:
        i, _, column, token_S, emitted_S, live_S, cache, record = carry
        position_S = rows.position_S + i
        age_C = (column - jnp.arange(columns)) % columns
        hidden_SD, cache = _forward(weights, cache, rows, token_S, position_S, emitted_S, age_C, column, config)
        logits_SV = jnp.einsum("SD,VD->SV", hidden_SD, weights.unembed, preferred_element_type=jnp.float32)
        if in_step:
            # One gather a step. Left split over the vocabulary, a filter's search reduces over the mesh in each of its
            # thirty comparisons, and latency, not bytes, is what a step pays for.
            logits_SV = lax.with_sharding_constraint(logits_SV, PartitionSpec(None, None))
        bits_S2 = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys_S, emitted_S))
        forbid_S = emitted_S < min_new if filtered else None
        token_S, logp_S, policy_logp_S = draw(logits_SV, bits_S2, law, forbid_S, filtered=filtered)
        record = (
            record[0].at[i].set(jnp.where(live_S, token_S, -1)),
            record[1].at[i].set(logp_S),
            record[2].at[i].set(policy_logp_S),
        )
        emitted_S = emitted_S + 1
        stopped_S = (token_S[:, None] == law.stop_ids).any(-1)
        live_S = live_S & ~stopped_S & (emitted_S < rows.limit_S)
        return i + 1, count(live_S), (column + 1) % columns, token_S, emitted_S, live_S, cache, record

    record = (
        jnp.full((capacity, rows_count), -1, jnp.int32),
        jnp.zeros((capacity, rows_count)),
        jnp.zeros((capacity, rows_count)),
    )
    start = (jnp.int32(0), count(rows.live_S), column_1[0], rows.token_S, rows.emitted_S, rows.live_S, cache, record)
    _, _, column, _, _, _, cache, record = lax.while_loop(more, one, start)
    return cache, Emitted(*record, column[None])


def _forward(
    weights: Weights,
    cache: Cache,
    rows: Rows,
    token_S: Array,
    position_S: Array,
    emitted_S: Array,
    age_C: Array,
    column: Array,
    config: ModelConfig,
) -> tuple[Array, Cache]:
    """Hidden states of one token a row, after the final norm, and the cache with that token in it."""
    cos, sin = rope_tables(position_S, config)
    own_mask_SC = age_C <= emitted_S[:, None]
    zero = jnp.int32(0)

    def block(x: Array, layer: Layer, shared: tuple, own: tuple, at: tuple) -> tuple[Array, tuple]:
        """`at` is empty (arrays of this layer) or (layer index,) (stacked arrays)."""
        q, k, v = qkv(layer, x, cos, sin, config)
        lead = (None,) * len(at)
        keys = lax.dynamic_update_slice(own[0], k[(*lead, ..., None)], (*at, zero, zero, zero, column))
        values = lax.dynamic_update_slice(own[1], v[(*lead, ..., None, slice(None))], (*at, zero, zero, column, zero))
        here = [leaf[at[0]] if at else leaf for leaf in (*shared, keys, values)]
        x = attention_out(layer, x, _attend(q, rows, here[0], here[1], here[2], here[3], own_mask_SC))
        return mlp(layer, x, config), (keys, values)

    x = weights.embed[token_S]
    if isinstance(weights.layers, tuple):
        fresh = []
        for layer, *pairs in zip(weights.layers, *cache):
            x, pair = block(x, layer, tuple(pairs[:2]), tuple(pairs[2:]), ())
            fresh.append(pair)
        own_keys, own_values = (tuple(side) for side in zip(*fresh))
    else:

        def turn(i: Array, carry: tuple) -> tuple:
            x, own = carry
            layer = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), weights.layers)
            return block(x, layer, (cache.shared_keys, cache.shared_values), own, (i,))

        x, (own_keys, own_values) = lax.fori_loop(0, config.layers, turn, (x, (cache.own_keys, cache.own_values)))
    cache = cache._replace(own_keys=own_keys, own_values=own_values)
    return rms_norm(x, weights.final_norm, config.norm_eps), cache


def _attend(
    q_SHE: Array,
    rows: Rows,
    shared_keys: Array,
    shared_values: Array,
    own_keys: Array,
    own_values: Array,
    own_mask_SC: Array,
) -> Array:
    """One softmax over a row's shared prompt and its own ring; neither is copied, heads are grouped, not repeated."""
    S, H, E = q_SHE.shape
    K, Tp = shared_keys.shape[1], shared_keys.shape[3]
    U, g = rows.row_Ug.shape
    M = H // K
    scale = 1 / math.sqrt(E)
    q_SKME = q_SHE.reshape(S, K, M, E)

    # Prompt: the g rows of a unit are one batch of queries against one set of keys.
    q_UgKME = (q_SKME if U * g == S else jnp.take(q_SKME, rows.row_Ug.reshape(-1), 0, mode="clip")).reshape(
        U, g, K, M, E
    )
    q_UKNE = jnp.swapaxes(q_UgKME, 1, 2).reshape(U, K, g * M, E)
    shared_mask_UT = jnp.arange(Tp) < rows.shared_length_U[:, None]
    shared = _part("UKNE,UKET->UKNT", "UKNT,UKTE->UKNE", q_UKNE, shared_keys, shared_values, shared_mask_UT, scale)

    def to_rows(x_UKN: Array) -> Array:
        x_PKM = jnp.swapaxes(x_UKN.reshape(U, K, g, M, -1), 1, 2).reshape(U * g, K, M, -1)
        return x_PKM if U * g == S else jnp.take(x_PKM, rows.place_S, 0, mode="clip")

    top_s, sum_s, mixed_s = (to_rows(x) for x in shared)
    own = _part("SKME,SKEC->SKMC", "SKMC,SKCE->SKME", q_SKME, own_keys, own_values, own_mask_SC, scale)
    top_o, sum_o, mixed_o = own
    top_o, sum_o = top_o[..., None], sum_o[..., None]
    top = jnp.maximum(top_s, top_o)
    share_s, share_o = jnp.exp(top_s - top), jnp.exp(top_o - top)
    mixed = (mixed_s * share_s + mixed_o * share_o) / (sum_s * share_s + sum_o * share_o)
    return mixed.reshape(S, H, E).astype(q_SHE.dtype)


def _part(
    scores: str, mixes: str, q: Array, keys: Array, values: Array, mask: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Maximum, sum of exponentials and mixed values of one part of a softmax; sum 0 where nothing is seen."""
    mask = mask[:, None, None]
    logits = jnp.where(mask, jnp.einsum(scores, q, keys, preferred_element_type=jnp.float32) * scale, _MASKED)
    top = logits.max(-1)
    weight = jnp.where(mask, jnp.exp(logits - top[..., None]), 0)
    mixed = jnp.einsum(mixes, weight.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return top, weight.sum(-1), mixed
