"""What runs on the device, as pure functions: prefill, a chunk of decoding steps, and shrinking the cache.

Prefill stores the keys and values of a prompt's first n - 1 tokens in its unit of the cache. The last token is the
first input of every row of its group.

Additional suffixes: U units, g rows per unit, C columns of the ring, I steps of a chunk, N shards or words, e pairs of
a head, A states of the stop strings' automaton.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, UInt32

from grpo_sampler._cache import Cache, attend_cached, seen, write
from grpo_sampler._config import ModelConfig
from grpo_sampler._kernels import Attention, self_attention
from grpo_sampler._layers import Layer, attention_out, fuse, mlp, qkv, rms_norm
from grpo_sampler._lora import merge_adapters
from grpo_sampler._partition import TENSOR_AXIS
from grpo_sampler._rope import rope_tables
from grpo_sampler._sampling import Draw, SamplingArrays, draw
from grpo_sampler._table import Rows, read_call, read_table, renew_table

# Steps after which the shards agree on how many rows are live.
STRIDE = 4


# The fields are arrays on the device or host, or stand-ins for them: shapes, shardings, axes.
class Weights(NamedTuple):
    """Parameters laid out for decoding: `layers` is a tuple of blocks (unrolled) or one stacked dictionary."""

    embed: Any
    unembed: Any  # None for the embedding
    final_norm: Any
    layers: Any


class Emitted(NamedTuple):
    """What a chunk emitted in each step; token -1 if a row emitted nothing."""

    token_IS: Any
    logp_IS: Any
    policy_logp_IS: Any


def weights_from(
    params: Any, config: ModelConfig, dtype: jnp.dtype, *, unroll: bool, fused: bool, given: Any = None
) -> Weights:
    """Merges adapters and casts parameters to the compute type, once per call instead of once per step.

    Key/value heads are repeated up to the number that `config` has: those of the cache. `given` are the parameters'
    shardings where another mesh decodes: cast before they move, they move in the compute type.

    Unrolling, the layout for CPUs, separates the layers. `fused` (unrolled only): see `fuse`.
    """
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), merge_adapters(params, config))
    if given is not None:
        cast = lax.with_sharding_constraint(cast, given)
    layers, unembed = _repeated(cast["layers"], config.kv_heads), None if config.tied else cast["unembed"]
    if unroll:
        layers = tuple({name: leaf[i] for name, leaf in layers.items()} for i in range(config.layers))
        layers = tuple(fuse(layer, config) for layer in layers) if fused else layers
    return Weights(cast["embed"], unembed, cast["final_norm"], layers)


def _repeated(layers: Layer, kv_heads: int) -> Layer:
    repeats = kv_heads // layers["k"].shape[-2]
    if repeats == 1:
        return layers
    names = [name for name in ("k", "v", "k_bias", "v_bias") if name in layers]
    return {**layers, **{name: jnp.repeat(layers[name], repeats, axis=-2) for name in names}}


def prefill(
    weights: Weights,
    cache: Cache,
    prompts_Pn: Int[Array, "P n"],
    *,
    config: ModelConfig,
    attention: Attention = "xla",
    mesh: Mesh | None = None,
) -> Cache:
    """Writes the keys and values of prompts into their units of the cache.

    Args:
        weights: from `weights_from`.
        cache: the cache to write to; donated.
        prompts_Pn: right-padded tokens, as many as the cache has columns or fewer, then how many of them to store (all
            but the last), then the unit; rows for the unit after the last one are dropped.
        config: the model.
        attention: kernel of the prompt's own attention.
        mesh: a mesh with a tensor axis, to split the kernel's heads over; None if there is nothing to split.
    Returns:
        The cache.
    """
    tokens_PT, length_P, unit_P = prompts_Pn[:, :-2], prompts_Pn[:, -2], prompts_Pn[:, -1]
    position_T, columns = jnp.arange(tokens_PT.shape[1]), slice(tokens_PT.shape[1])
    segment_PT = (position_T < length_P[:, None]).astype(jnp.int32)
    cos, sin = rope_tables(position_T[None], config)

    def block(x: Array, layer: Layer) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = qkv(layer, x, cos, sin, config)
        x = attention_out(layer, x, self_attention(attention, q, k, v, segment_PT, mesh), config)
        return mlp(layer, x, config), (jnp.einsum("PTKE->PKET", k), jnp.einsum("PTKE->PKTE", v))

    x = weights.embed[tokens_PT]
    if isinstance(weights.layers, tuple):
        fresh = []
        for layer in weights.layers:
            x, pair = block(x, layer)
            fresh.append(pair)
        keys = tuple(old.at[unit_P, :, :, columns].set(k, mode="drop") for old, (k, _) in zip(cache.shared_keys, fresh))
        values = tuple(
            old.at[unit_P, :, columns].set(v, mode="drop") for old, (_, v) in zip(cache.shared_values, fresh)
        )
    else:
        _, (k, v) = lax.scan(block, x, weights.layers)
        keys = cache.shared_keys.at[:, unit_P, :, :, columns].set(k, mode="drop")
        values = cache.shared_values.at[:, unit_P, :, columns].set(v, mode="drop")
    return cache._replace(shared_keys=keys, shared_values=values)


def keep(cache: Cache, kept_n: Int[Array, "n"], *, units: int) -> Cache:
    """The cache of the given units and rows (units first), in that order, for a draining batch."""
    axis = 0 if isinstance(cache.own_keys, tuple) else 1

    def take(tree: Any, index: Array) -> Any:
        return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=axis, mode="clip"), tree)

    unit_U, row_S = kept_n[:units], kept_n[units:]
    return Cache(
        take(cache.shared_keys, unit_U),
        take(cache.shared_values, unit_U),
        take(cache.own_keys, row_S),
        take(cache.own_values, row_S),
    )


def row_keys(seed_N: UInt32[Array, "2"], step: Array, prompt_id_S: Array, sample_S: Array) -> Array:
    """Random keys that depend only on (seed, step, prompt, sample).

    Source: Threefry-2x32, Salmon et al. 2011; always this generator, whatever jax's default is.
    """
    root = jax.random.fold_in(jax.random.wrap_key_data(seed_N, impl="threefry2x32"), step)
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(root, prompt), sample))(
        prompt_id_S, sample_S
    )


def decode(
    weights: Weights,
    cache: Cache,
    table_n: Int[Array, "n"],
    call_n: Int[Array, "n"],
    until_2: Int[Array, "2"],
    next_AV: Int[Array, "A V"] | None = None,
    *,
    config: ModelConfig,
    sizes: tuple[int, int, int],
    capacity: int,
    filtered: bool,
    shard_axes: tuple[str, ...] = (),
    tensor: int = 1,
) -> tuple[Cache, Array, Array]:
    """Decodes until some steps are done or few rows are live, without leaving the device.

    Args:
        weights: from `weights_from`.
        cache: donated.
        table_n: the rows' state, from `write_table`; donated.
        call_n: from `write_call`.
        until_2: steps, at most `capacity`; and the number of live rows of every shard at which to return early.
        next_AV: the stop strings' automaton, as for `Sampler`; None for none.
        config: the model.
        sizes: rows, units and rows per unit; static.
        capacity: steps that the record has room for; static.
        filtered: see `draw`; static.
        shard_axes: mesh axes of the shards, which agree every few steps whether to continue.
        tensor: devices that each product is split over: if several, steps contain collectives, so all shards must take
            equally many.
    Returns:
        The cache, the table, and the bits of the `Emitted` as int32 [3, I, S].
    """
    rows, call = read_table(table_n, *sizes, matching=next_AV is not None), read_call(call_n)
    columns, prompt = (jax.tree.leaves(tree)[0].shape[-1] for tree in (cache.own_keys, cache.shared_keys))
    steps, floor = until_2
    # Draw all random bits of the chunk at once: in the loop, the generator would cost as much as two layers.
    keys_S = row_keys(call.seed_N, call.step, rows.prompt_id_S, rows.sample_S)
    emitted_IS = rows.emitted_S + jnp.arange(capacity)[:, None]
    # The same for angles: in the loop, XLA on CPUs would recompute them for every head of every layer.
    turns_ISe = rope_tables(rows.start_S + emitted_IS, config)
    fold = jax.vmap(jax.random.fold_in)
    bits_IS2 = jax.random.key_data(jax.vmap(lambda emitted_S: fold(keys_S, emitted_S))(emitted_IS))

    pick = partial(draw, filtered=filtered)
    if tensor > 1:
        pick = _split_draw(pick, rows.token_S.shape[0] % tensor == 0)

    def one(carry: tuple) -> tuple:
        i, rows, cache, record = carry
        cos_Se, sin_Se = (table_ISe[i] for table_ISe in turns_ISe)
        hidden_SD, cache = _forward(weights, cache, rows, cos_Se, sin_Se, columns, prompt, config)
        unembed_VD = weights.embed if weights.unembed is None else weights.unembed
        logits_SV = _rows_last(jnp.einsum("SD,VD->SV", hidden_SD, unembed_VD, preferred_element_type=jnp.float32))
        forbid_S = rows.emitted_S < call.min_new if filtered else jnp.zeros(len(logits_SV), bool)
        drawn = pick(logits_SV, bits_IS2[i], call.sampling, forbid_S)
        token_S, *logps = _as_ints(drawn)
        fresh = jnp.stack([jnp.where(rows.live_S, token_S, -1), *logps])
        emitted_S = rows.emitted_S + 1
        stopped_S = (drawn.token_B[:, None] == call.sampling.stop_ids).any(-1)
        if next_AV is not None:
            next_S = next_AV[rows.match_S, drawn.token_B].astype(jnp.int32)
            stopped_S |= next_S < 0
            rows = rows._replace(match_S=jnp.maximum(next_S, 0))
        rows = rows._replace(
            token_S=drawn.token_B,
            emitted_S=jnp.where(rows.live_S, emitted_S, rows.emitted_S),
            live_S=rows.live_S & ~stopped_S & (emitted_S < rows.limit_S),
            column=(rows.column + 1) % columns,
        )
        return i + 1, rows, cache, record.at[:, i].set(fresh)

    def run(carry: tuple, last: Array, at: Array | int) -> tuple:
        return lax.while_loop(lambda c: (c[0] < last) & (c[1].live_S.sum() > at), one, carry)

    record_3IS = jnp.full((3, capacity, rows.token_S.shape[0]), -1, jnp.int32)
    carry = (jnp.int32(0), rows, cache, record_3IS)
    if not shard_axes:
        _, rows, cache, record_3IS = run(carry, steps, floor)
    else:

        def stride(state: tuple) -> tuple:
            begun, _, carry = state
            last = jnp.minimum(begun + STRIDE, steps)
            carry = run(carry, last, -1 if tensor > 1 else 0)
            return last, lax.pmax(carry[1].live_S.sum(), shard_axes), (last, *carry[1:])

        state = jnp.int32(0), lax.pmax(rows.live_S.sum(), shard_axes), carry
        _, _, (_, rows, cache, record_3IS) = lax.while_loop(lambda s: (s[0] < steps) & (s[1] > floor), stride, state)
    return cache, renew_table(table_n, rows), record_3IS


def _split_draw(pick: Callable[..., Draw], divides: bool) -> Callable[..., Draw]:
    """Draws from logits that are split over the vocabulary, each device for some of the rows, or each for all of them.

    Logits move once per step. If they stayed split, each of a filter's thirty comparisons would reduce over the mesh,
    and latency dominates a step.
    """

    def of_some_rows(logits_Sv: Array, bits_S2: Array, sampling: SamplingArrays, forbid_S: Array) -> Draw:
        logits_sV = lax.all_to_all(logits_Sv, TENSOR_AXIS, 0, 1, tiled=True)
        count = len(logits_sV)
        mine = partial(lax.dynamic_slice_in_dim, start_index=lax.axis_index(TENSOR_AXIS) * count, slice_size=count)
        drawn = pick(logits_sV, mine(bits_S2), sampling, mine(forbid_S))
        bits_3S = lax.all_gather(jnp.stack(_as_ints(drawn)), TENSOR_AXIS, axis=1, tiled=True)
        token_S, *logps = bits_3S
        return Draw(token_S, *(lax.bitcast_convert_type(logp_S, jnp.float32) for logp_S in logps))

    def of_all_rows(logits_Sv: Array, *rest: Any) -> Draw:
        return pick(lax.all_gather(logits_Sv, TENSOR_AXIS, axis=1, tiled=True), *rest)

    # All but the logits is whole on every device: whatever is split by rows here would split the rows of all layers.
    return jax.shard_map(
        of_some_rows if divides else of_all_rows,
        in_specs=(PartitionSpec(None, TENSOR_AXIS), PartitionSpec(), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={TENSOR_AXIS},
        check_vma=False,
    )


def _rows_last(logits_SV: Array) -> Array:
    """On a TPU, logits in the layout that sums over the vocabulary read: else they would be copied for it.

    Those of 128 rows and 150,000 tokens then stay in on-chip memory.
    """

    def pinned(logits_SV: Array) -> Array:
        return with_layout_constraint(logits_SV, Layout((1, 0)))

    return lax.platform_dependent(logits_SV, tpu=pinned, default=lambda logits_SV: logits_SV)


def _as_ints(drawn: Draw) -> list[Array]:
    """The token, and the bits of both log-probabilities."""
    return [drawn.token_B, *(lax.bitcast_convert_type(logp_B, jnp.int32) for logp_B in drawn[1:])]


def _forward(
    weights: Weights, cache: Cache, rows: Rows, cos: Array, sin: Array, columns: int, prompt: int, config: ModelConfig
) -> tuple[Array, Cache]:
    """Hidden states of one token per row, after the final norm, and the cache including that token."""
    visible = seen(rows, rows.column, columns, prompt, fine=not isinstance(weights.layers, tuple))

    def block(x: Array, layer: Layer, shared: tuple, own: tuple, at: tuple) -> tuple[Array, tuple]:
        """`at` is () for the arrays of one layer, (layer index,) for stacked arrays."""
        q, k, v = qkv(layer, x, cos, sin, config)
        own = write(own, k, v, rows.column, at)
        shared = tuple(leaf[at[0]] if at else leaf for leaf in shared)
        x = attention_out(layer, x, attend_cached(q, rows, visible, shared, own, at), config)
        return mlp(layer, x, config), own

    x = weights.embed[rows.token_S]
    if isinstance(weights.layers, tuple):
        fresh = []
        for layer, *pairs in zip(weights.layers, *cache):
            x, pair = block(x, layer, tuple(pairs[:2]), tuple(pairs[2:]), ())
            fresh.append(pair)
        own_keys, own_values = (tuple(side) for side in zip(*fresh))
    else:

        def one_layer(i: Array, carry: tuple) -> tuple:
            x, own = carry
            layer = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), weights.layers)
            return block(x, layer, (cache.shared_keys, cache.shared_values), own, (i,))

        x, (own_keys, own_values) = lax.fori_loop(0, config.layers, one_layer, (x, (cache.own_keys, cache.own_values)))
    cache = cache._replace(own_keys=own_keys, own_values=own_values)
    return rms_norm(x, weights.final_norm, config.norm_eps), cache
