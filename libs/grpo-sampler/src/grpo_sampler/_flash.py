"""Flash attention of packed rows to their prompts and to themselves: Pallas kernels for TPUs.

Queries are tiles of M rows: those of all the heads that share a key/value head, for some positions of one row. The
backward pass is the ordinary one: given the log-sum-exp over prompt and row together, each part has its gradient
without knowing of the other.

Additional suffixes: N query tiles, M queries of a tile.

Source: arXiv:2307.08691 (FlashAttention-2).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from grpo_sampler._flash_kernels import (
    PLAIN,
    Kernels,
    Steps,
    d_q_kernel,
    dot,
    forward_kernel,
    prompt_mask,
    row_mask,
    weights,
)
from grpo_sampler._tiles import TilePlan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash_attention(
    kernels: Kernels,
    q_NKME: Float[Array, "N K M E"],
    row_kv: tuple[Float[Array, "R K T E"], Float[Array, "R K T E"]],
    prompt_kv: tuple[Float[Array, "P K Tp E"], Float[Array, "P K Tp E"]],
    plan: TilePlan,
) -> Float[Array, "N K M E"]:
    """Attention of query tiles to what the plan lets them see.

    Args:
        kernels: what they are compiled for.
        q_NKME: query tiles, all those of the first row before those of the second.
        row_kv: keys and values of the rows, whole tiles.
        prompt_kv: keys and values of the prompts, whole tiles.
        plan: of this device.

    Returns:
        Mixed values in q's type; 0 for a query that sees nothing.
    """
    return _forward(kernels, q_NKME, row_kv, prompt_kv, plan)[0]


def _forward(kernels: Kernels, q: Array, row_kv: Any, prompt_kv: Any, plan: TilePlan) -> tuple[Array, tuple]:
    N, K, M, E = q.shape
    lse = jax.ShapeDtypeStruct((N, K, 1, M), jnp.float32)
    o, lse = _by_query(
        "packed_attention_fwd",
        forward_kernel,
        2,
        kernels,
        plan,
        tiles=(q,),
        kv=(*prompt_kv, *row_kv),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype), lse),
        scratch=[(1, M), (1, M), (E, M)],
    )
    return o, (q, row_kv, prompt_kv, plan, o, lse)


def _backward(kernels: Kernels, saved: tuple, d_o: Array) -> tuple[Array, Any, Any, None]:
    q, row_kv, prompt_kv, plan, o, lse = saved
    row_sum = jnp.sum(d_o.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)[:, :, None]
    tiles = (q, d_o, lse, row_sum)
    (d_q,) = _by_query(
        "packed_attention_dq",
        d_q_kernel,
        3,
        kernels,
        plan,
        tiles=tiles,
        kv=(*prompt_kv, *row_kv),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        scratch=[(q.shape[3], q.shape[2])],
    )
    d_row = _by_key("packed_attention_dkv", kernels, plan, tiles, row_kv, of_prompt=False)
    d_prompt = _by_key("packed_attention_prompt_dkv", kernels, plan, tiles, prompt_kv, of_prompt=True)
    return d_q, d_row, d_prompt, None


flash_attention.defvjp(_forward, _backward)


def _by_query(
    name: str,
    kernel: Callable[..., Steps],
    products: int,
    kernels: Kernels,
    plan: TilePlan,
    *,
    tiles: tuple[Array, ...],
    kv: tuple[Array, ...],
    out: tuple[jax.ShapeDtypeStruct, ...],
    scratch: list[tuple[int, int]],
) -> tuple[Array, ...]:
    """Runs a kernel that gathers, for each query tile, over the prompt's key tiles and then over the row's."""
    (N, K, M, E), (R, _, T, _) = tiles[0].shape, kv[2].shape
    tables = (plan.query_steps, plan.slot_N, plan.prompt_tiles_N, plan.first_N, plan.row_tiles_N, plan.length_P)
    per_row = N // R

    def query(r, k, i, s, *tables):
        return r * per_row + i, k, 0, 0

    def segments(r, k, i, s, *tables):
        return r * per_row + i, 0, 0

    def prompt_key(r, k, i, s, steps, slot, prompt_tiles, *rest):
        n = r * per_row + i
        return slot[n], k, jnp.clip(s, 0, jnp.maximum(prompt_tiles[n] - 1, 0)), 0

    def row_tile(r, i, s, steps, slot, prompt_tiles, first, row_tiles, length):
        n = r * per_row + i
        return first[n] + jnp.clip(s - prompt_tiles[n], 0, jnp.maximum(row_tiles[n] - 1, 0))

    def row_key(r, k, i, s, *tables):
        return r, k, row_tile(r, i, s, *tables), 0

    def row_segments(r, k, i, s, *tables):
        return r, row_tile(r, i, s, *tables), 0

    prompt_spec = pl.BlockSpec((None, None, kernels.prompt_keys, E), prompt_key)
    row_spec = pl.BlockSpec((None, None, kernels.keys, E), row_key)
    by_tile = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), query)  # noqa: E731

    def body(*refs: Any) -> None:
        steps, slot, prompt_tiles, first, row_tiles, length = refs[:6]
        q_segment, k_segment, prompt_k, prompt_v, k, v = refs[6:12]
        r, i, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        n = r * per_row + i
        start, add, end = kernel(kernels.scale, *refs[12:])
        pl.when(s == 0)(start)
        own = s - prompt_tiles[n]

        @pl.when(own < 0)
        def _() -> None:
            add(prompt_k[...], prompt_v[...], prompt_mask(s, length[slot[n]], kernels))

        @pl.when((own >= 0) & (own < row_tiles[n]))
        def _() -> None:
            add(k[...], v[...], row_mask(i, first[n] + own, q_segment, k_segment, kernels))

        pl.when(s == steps[0] - 1)(end)

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(R, K, per_row, plan.query_steps[0]),
            in_specs=[
                pl.BlockSpec((None, 1, M), segments),
                pl.BlockSpec((None, kernels.keys, 1), row_segments),
                prompt_spec,
                prompt_spec,
                row_spec,
                row_spec,
                *map(by_tile, tiles),
            ],
            out_specs=tuple(map(by_tile, out)),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=_semantics(),
        out_shape=out,
        cost_estimate=_cost(products, N * K * M * (T // 2 + kv[0].shape[2]), E, (*tiles, *kv, *out)),
        interpret=kernels.interpret,
        name=name,
    )(*tables, plan.q_segment_N1M, plan.k_segment_RT1, *kv, *tiles)


def _by_key(
    name: str,
    kernels: Kernels,
    plan: TilePlan,
    tiles: tuple[Array, ...],
    kv: tuple[Array, Array],
    *,
    of_prompt: bool,
) -> tuple[Array, Array]:
    """Gradients of keys and values: for each of their tiles, a sum over the query tiles that see it."""
    (N, K, M, E), (A, _, T, _) = tiles[0].shape, kv[0].shape
    size = kernels.prompt_keys if of_prompt else kernels.keys
    per_array, per_row = T // size, N // plan.k_segment_RT1.shape[0]
    if of_prompt:
        tables = plan.prompt_steps, plan.prompt_first_J, plan.prompt_count_J, plan.order_N, plan.length_P
    else:
        tables = plan.row_steps, plan.row_first_J, plan.row_count_J

    def query_tile(a, j, s, steps, first, count, *order):
        at = a * per_array + j
        place = jnp.minimum(first[at] + jnp.clip(s, 0, jnp.maximum(count[at] - 1, 0)), N - 1)
        return order[0][place] if of_prompt else place

    def query(a, k, j, s, *tables):
        return query_tile(a, j, s, *tables), k, 0, 0

    def segments(a, k, j, s, *tables):
        return query_tile(a, j, s, *tables), 0, 0

    def key(a, k, j, s, *tables):
        return a, k, j, 0

    def key_segments(a, k, j, s, *tables):
        return a, j, 0

    key_spec = pl.BlockSpec((None, None, size, E), key)
    in_specs = [key_spec, key_spec, *(pl.BlockSpec((None, None, *x.shape[2:]), query) for x in tiles)]
    inputs = [*kv, *tiles]
    if not of_prompt:
        in_specs += [pl.BlockSpec((None, 1, M), segments), pl.BlockSpec((None, size, 1), key_segments)]
        inputs += [plan.q_segment_N1M, plan.k_segment_RT1]

    def body(*refs: Any) -> None:
        scalars, refs = refs[: len(tables)], refs[len(tables) :]
        (k, v, q, d_o, lse, row_sum), segment, (d_k, d_v, k_sum, v_sum) = refs[:6], refs[6:-4], refs[-4:]
        a, j, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        steps, _, count = scalars[:3]

        @pl.when(s == 0)
        def _() -> None:
            k_sum[...], v_sum[...] = jnp.zeros_like(k_sum), jnp.zeros_like(v_sum)

        @pl.when(s < count[a * per_array + j])
        def _() -> None:
            if of_prompt:
                mask = prompt_mask(j, scalars[4][a], kernels)
            else:
                q_segment, k_segment = segment
                mask = row_mask(query_tile(a, j, s, *scalars) - a * per_row, j, q_segment, k_segment, kernels)
            weight, d_logits = weights(kernels.scale, k[...], v[...], q[...], d_o[...], lse[...], row_sum[...], mask)
            v_sum[...] += dot(weight.astype(d_o.dtype), d_o[...], PLAIN)
            k_sum[...] += dot(d_logits.astype(q.dtype), q[...], PLAIN)

        @pl.when(s == steps[0] - 1)
        def _() -> None:
            d_k[...] = (k_sum[...] * kernels.scale).astype(d_k.dtype)
            d_v[...] = v_sum[...].astype(d_v.dtype)

    out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kv)
    keys_seen = T if of_prompt else T // 2
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(A, K, per_array, tables[0][0]),
            in_specs=in_specs,
            out_specs=(key_spec, key_spec),
            scratch_shapes=[pltpu.VMEM((size, E), jnp.float32)] * 2,
        ),
        compiler_params=_semantics(),
        out_shape=out,
        cost_estimate=_cost(4, N * K * M * keys_seen, E, (*inputs, *out)),
        interpret=kernels.interpret,
        name=name,
    )(*tables, *inputs)


def _semantics() -> Any:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


def _cost(products: int, pairs: int, size: int, arrays: tuple[Any, ...]) -> pl.CostEstimate:
    """The most that a kernel computes: rows that hold one completion each, and prompts of full length."""
    return pl.CostEstimate(
        flops=2 * products * pairs * size,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
