"""How packed rows and prompts are cut into tiles, and which tiles of keys each tile of queries sees.

Tiles that a mask empties are not visited: the causal upper half, other segments, other prompts, and padding.

Additional suffixes: Z devices; N query tiles of a device, I of a row, with q positions and M queries each; J key tiles
of the rows, Jp of the prompts.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Tiles are multiples of 128 lanes. Splash's authors use 512 for keys; queries are counted over the heads of a group.
_LANES, _KEYS, _QUERIES = 128, 512, 1024


class TileSizes(NamedTuple):
    """Lengths in token positions.

    Args:
        block: a block of a row, padded to whole tiles.
        keys: a tile of a row's keys.
        queries: a tile of queries; it lies within one block.
        prompt: a prompt, padded to whole tiles.
        prompt_keys: a tile of a prompt's keys.
    """

    block: int
    keys: int
    queries: int
    prompt: int
    prompt_keys: int


class TilePlan(NamedTuple):
    """What the kernels look up.

    Args:
        q_segment_N1M: segment of each query, repeated for the heads of a group.
        k_segment_RT1: segment of each key; -1 at padding, which no query has.
        slot_N: prompt slot of each query tile.
        prompt_tiles_N: the key tiles that it sees of its prompt: the first ones.
        first_N: the first key tile of its row that it sees.
        row_tiles_N: how many, from there on.
        length_P: lengths of the prompts.
        order_N: query tiles by slot.
        prompt_first_J: where in that order the query tiles that see a prompt's key tile begin.
        prompt_count_J: and how many they are.
        row_first_J: the first query tile that sees a row's key tile.
        row_count_J: how many, from there on.
        query_steps: the most key tiles that a query tile sees, at least 1; an array of one.
        prompt_steps: the most query tiles that see a prompt's key tile, likewise.
        row_steps: the most query tiles that see a row's key tile, likewise.
    """

    q_segment_N1M: Int[Array, "*Z N 1 M"]
    k_segment_RT1: Int[Array, "*Z R T 1"]
    slot_N: Int[Array, "*Z N"]
    prompt_tiles_N: Int[Array, "*Z N"]
    first_N: Int[Array, "*Z N"]
    row_tiles_N: Int[Array, "*Z N"]
    length_P: Int[Array, "*Z P"]
    order_N: Int[Array, "*Z N"]
    prompt_first_J: Int[Array, "*Z Jp"]
    prompt_count_J: Int[Array, "*Z Jp"]
    row_first_J: Int[Array, "*Z J"]
    row_count_J: Int[Array, "*Z J"]
    query_steps: Int[Array, "*Z 1"]
    prompt_steps: Int[Array, "*Z 1"]
    row_steps: Int[Array, "*Z 1"]


def tile_sizes(*, block: int, prompt: int, group: int) -> TileSizes:
    """Tiles for rows and prompts, with little padding.

    Args:
        block: length of a row's block.
        prompt: padded length of the prompts.
        group: query heads that share a key/value head.

    Returns:
        The sizes.
    """
    padded, keys = _whole_tiles(block)
    most = max(_LANES, _QUERIES // group)
    queries = next(size for size in range(keys, 0, -_LANES) if keys % size == 0 and size <= most)
    return TileSizes(padded, keys, queries, *_whole_tiles(prompt))


def plan_tiles(
    segment_RT: Int[Array, "R T"], slot_RC: Int[Array, "R C"], length_P: Int[Array, "P"], sizes: TileSizes, group: int
) -> TilePlan:
    """Which tiles see which, for the rows of one device.

    Args:
        segment_RT: segment of each token, blocks padded to whole tiles; 0 is padding.
        slot_RC: prompt slot of each block, counted on the device.
        length_P: lengths of the device's prompts.
        sizes: of the tiles.
        group: query heads that share a key/value head.

    Returns:
        The plan, without the leading axis Z.
    """
    R, T = segment_RT.shape
    P = length_P.shape[0]
    q_segment_RIq = segment_RT.reshape(R, -1, sizes.queries)
    sees_RIJ = _sees(segment_RT, sizes)
    first_RI, row_tiles_RI = _range(sees_RIJ)
    row_first_RJ, row_count_RJ = _range(sees_RIJ.swapaxes(1, 2))
    per_row = T // sizes.queries
    row_first_RJ += per_row * jnp.arange(R, dtype=jnp.int32)[:, None]

    live_N = (q_segment_RIq > 0).any(2).reshape(-1)
    slot_N = jnp.repeat(slot_RC, sizes.block // sizes.queries, axis=1).reshape(-1)
    prompt_tiles_P = -(-length_P // sizes.prompt_keys)
    prompt_tiles_N = jnp.where(live_N, prompt_tiles_P[slot_N], 0)
    # Tiles of padding belong to no slot.
    user_N = jnp.where(live_N, slot_N, P)
    users_P = (user_N[:, None] == jnp.arange(P, dtype=jnp.int32)).sum(0, dtype=jnp.int32)
    inside_PJ = jnp.arange(sizes.prompt // sizes.prompt_keys, dtype=jnp.int32) < prompt_tiles_P[:, None]
    prompt_count_PJ = jnp.where(inside_PJ, users_P[:, None], 0)
    prompt_first_PJ = jnp.broadcast_to((jnp.cumsum(users_P, dtype=jnp.int32) - users_P)[:, None], inside_PJ.shape)
    row_tiles_N = row_tiles_RI.reshape(-1)
    return TilePlan(
        q_segment_N1M=jnp.tile(q_segment_RIq.reshape(-1, 1, sizes.queries), (1, 1, group)),
        k_segment_RT1=jnp.where(segment_RT > 0, segment_RT, -1)[:, :, None],
        slot_N=slot_N,
        prompt_tiles_N=prompt_tiles_N,
        first_N=first_RI.reshape(-1),
        row_tiles_N=row_tiles_N,
        length_P=length_P,
        order_N=jnp.argsort(user_N, stable=True).astype(jnp.int32),
        prompt_first_J=prompt_first_PJ.reshape(-1),
        prompt_count_J=prompt_count_PJ.reshape(-1),
        row_first_J=row_first_RJ.reshape(-1),
        row_count_J=row_count_RJ.reshape(-1),
        query_steps=_most(prompt_tiles_N + row_tiles_N),
        prompt_steps=_most(prompt_count_PJ),
        row_steps=_most(row_count_RJ),
    )


def _whole_tiles(length: int) -> tuple[int, int]:
    """(padded length, length of a tile): as few tiles as may be, of equal size."""
    count = max(1, math.ceil(length / _KEYS))
    tile = max(1, math.ceil(length / count / _LANES)) * _LANES
    return count * tile, tile


def _sees(segment_RT: Int[Array, "R T"], sizes: TileSizes) -> Bool[Array, "R I J"]:
    """Whether some query of tile i may see some key of tile j, judged by the tiles' ranges of segments.

    The ranges are all there is to know where segments are numbered in order, as in packed rows.
    """
    none = jnp.iinfo(jnp.int32).max

    def ranges(size: int) -> tuple[Array, Array]:
        tiles = segment_RT.reshape(segment_RT.shape[0], -1, size)
        return jnp.where(tiles > 0, tiles, none).min(2), tiles.max(2)

    (q_least, q_most), (k_least, k_most) = ranges(sizes.queries), ranges(sizes.keys)
    shared = (q_least[:, :, None] <= k_most[:, None]) & (k_least[:, None] <= q_most[:, :, None])
    last_query = jnp.arange(1, q_least.shape[1] + 1) * sizes.queries - 1
    return shared & (jnp.arange(k_least.shape[1]) * sizes.keys <= last_query[:, None])


def _range(seen: Bool[Array, "R I J"]) -> tuple[Int[Array, "R I"], Int[Array, "R I"]]:
    """The first True along the last axis, and the number of places from it to the last one."""
    first = jnp.argmax(seen, axis=2).astype(jnp.int32)
    last = seen.shape[2] - 1 - jnp.argmax(seen[:, :, ::-1], axis=2).astype(jnp.int32)
    return first, jnp.where(seen.any(2), last - first + 1, 0)


def _most(counts: Array) -> Int[Array, "1"]:
    return jnp.maximum(counts.max(), 1).astype(jnp.int32)[None]
