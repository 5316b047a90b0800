"""Attention of packed rows to their prompts and to themselves on TPUs, in memory linear in the length of a row."""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from grpo_sampler._kernels import dividing
from grpo_sampler._partition import BATCH_AXES, TENSOR_AXIS
from grpo_sampler._tiles import TilePlan, TileSizes, plan_tiles, tile_sizes


class PackedPlan(NamedTuple):
    """What all layers share.

    Args:
        tiles: the plan of each device, under a leading axis.
        sizes: of the tiles.
        blocks: blocks of a row.
        rows: mesh axes that rows are split over, or None.
        prompts: mesh axes that prompts are split over, or None.
        mesh: the devices; None for one.
        interpret: run the kernels without a TPU, for tests.
    """

    tiles: TilePlan
    sizes: TileSizes
    blocks: int
    rows: tuple[str, ...] | None
    prompts: tuple[str, ...] | None
    mesh: Mesh | None
    interpret: bool


def plan_packed(
    segment_RT: Int[Array, "R T"],
    prompt_RC: Int[Array, "R C"],
    prompt_length_P: Int[Array, "P"],
    *,
    prompt_length: int,
    group: int,
    shards: int,
    mesh: Mesh | None,
    interpret: bool = False,
) -> PackedPlan:
    """Finds out once which tiles of keys each tile of queries sees.

    Args:
        segment_RT: 0 is padding.
        prompt_RC: the prompt that each of a row's equal blocks continues.
        prompt_length_P: lengths of the prompts.
        prompt_length: padded length of the prompts.
        group: query heads that share a key/value head.
        shards: equal parts of rows and prompts, where rows continue only prompts of their own part.
        mesh: rows are split over dp and fsdp, heads over tp. If `shards` does not keep a row's prompts on the row's own
            device, every device gets all prompts. Inside a `shard_map` over the rows, only heads are split.
        interpret: run the kernels without a TPU, for tests.

    Returns:
        The plan.
    """
    (R, T), C, P = segment_RT.shape, prompt_RC.shape[1], prompt_length_P.shape[0]
    sizes = tile_sizes(block=T // C, prompt=prompt_length, group=group)
    rows = None if mesh is None or jax.sharding.get_abstract_mesh().manual_axes else dividing(mesh, BATCH_AXES, R)
    parts = math.prod(mesh.shape[axis] for axis in rows) if mesh is not None and rows else 1
    stay = shards % parts == 0
    slot_RC, length_ZP = prompt_RC, jnp.broadcast_to(prompt_length_P, (parts, P))
    if stay:
        slot_RC, length_ZP = prompt_RC % (P // parts), prompt_length_P.reshape(parts, -1)
    tiles = jax.vmap(functools.partial(plan_tiles, sizes=sizes, group=group))(
        _padded(segment_RT, C, sizes.block).reshape(parts, R // parts, -1),
        slot_RC.reshape(parts, R // parts, C),
        length_ZP,
    )
    return PackedPlan(tiles, sizes, C, rows, rows if stay else None, mesh, interpret)


def packed_attention(
    plan: PackedPlan,
    prompt_kv: tuple[Float[Array, "P Tp K E"], Float[Array, "P Tp K E"]],
    row_qkv: tuple[Float[Array, "R T H E"], Float[Array, "R T K E"], Float[Array, "R T K E"]],
) -> Float[Array, "R T H E"]:
    """Attention of packed rows to the live part of their prompts and to earlier tokens of their own segments.

    Args:
        plan: from `plan_packed`.
        prompt_kv: keys and values of the prompts.
        row_qkv: queries, keys and values of the rows.

    Returns:
        Mixed values, in the queries' type; undefined at padding.
    """
    # Imported here because Pallas takes a second to import and only TPUs need it.
    from grpo_sampler._flash import flash_attention
    from grpo_sampler._flash_kernels import Kernels

    sizes, (_, T, _, E) = plan.sizes, row_qkv[0].shape
    kernels = Kernels(1 / math.sqrt(E), sizes.queries, sizes.keys, sizes.prompt_keys, plan.interpret)

    def local(tiles: TilePlan, prompt_kv: tuple[Array, Array], row_qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = (_padded(x, plan.blocks, sizes.block) for x in row_qkv)
        R, K, G = len(q), k.shape[2], q.shape[2] // k.shape[2]
        # Every query tile holds the heads of a group one after the other.
        q_NKME = q.reshape(R, -1, sizes.queries, K, G, E).transpose(0, 1, 3, 4, 2, 5)
        shape = q_NKME.shape
        out = flash_attention(
            kernels,
            q_NKME.reshape(-1, K, G * sizes.queries, E),
            (k.swapaxes(1, 2), v.swapaxes(1, 2)),
            tuple(_padded(x, 1, sizes.prompt).swapaxes(1, 2) for x in prompt_kv),
            TilePlan(*(x[0] for x in tiles)),
        )
        out = cast(Array, out).reshape(shape).transpose(0, 1, 4, 2, 3, 5).reshape(R, plan.blocks, sizes.block, K * G, E)
        return out[:, :, : T // plan.blocks].reshape(R, T, K * G, E)

    if plan.mesh is None:
        return local(plan.tiles, prompt_kv, row_qkv)
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    heads = dividing(plan.mesh, (TENSOR_AXIS,), row_qkv[1].shape[2])
    split = PartitionSpec(plan.rows, None, heads, None)
    return jax.shard_map(
        local,
        mesh=None if manual else plan.mesh,  # a nested shard_map takes the mesh from the outer one
        in_specs=(PartitionSpec(plan.rows), PartitionSpec(plan.prompts, None, heads, None), split),
        out_specs=split,
        axis_names=set(plan.mesh.axis_names) - manual,
        check_vma=False,
    )(plan.tiles, prompt_kv, row_qkv)


def _padded(x_RT: Any, blocks: int, block: int) -> Array:
    """Pads each of a row's blocks to the length of whole tiles."""
    R, T, *rest = x_RT.shape
    x_RCt = x_RT.reshape(R, blocks, T // blocks, *rest)
    widths = [(0, 0), (0, 0), (0, block - T // blocks), *((0, 0) for _ in rest)]
    return jnp.pad(x_RCt, widths).reshape(R, blocks * block, *rest)
