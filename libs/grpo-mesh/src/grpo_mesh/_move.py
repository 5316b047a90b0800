"""Moving data: batches of one host to global arrays and back, and pytrees from one mesh to another."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from grpo_mesh._errors import MeshError
from grpo_mesh._rules import path_name, shard_count


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """Tells which rows of a global batch this process has to supply to `to_global`.

    The devices of a process need not hold neighbouring rows, nor the lower ranks the lower rows: that is decided by
    the interconnect. Ask, then load exactly these rows in this order.

    Args:
        sharding: sharding of the batch, rows first (`batch_sharding(mesh)`).
        rows: rows of the global batch.

    Returns:
        Ascending global row numbers, int64 [rows of this process].

    Raises:
        MeshError: the rows do not divide over the devices.
    """
    row_sharding = _fitted("the batch", sharding, (rows,))
    wanted = np.zeros(rows, bool)
    for (where,) in row_sharding.addressable_devices_indices_map((rows,)).values():  # pyright: ignore[reportGeneralTypeIssues]
        wanted[where] = True
    return np.flatnonzero(wanted)


def to_global(tree: Any, sharding: NamedSharding, rows: int | None = None) -> Any:
    """Turns host arrays into global arrays.

    Args:
        tree: pytree of host arrays. Without `rows` each process passes the whole arrays, the same everywhere; with
            `rows`, rows come first and each passes only its `local_rows`, in that order.
        sharding: sharding of the global arrays; its spec is cut to the rank of each leaf.
        rows: rows of the global batch, if the leaves hold only those of this process.

    Returns:
        The pytree with global `jax.Array` leaves.

    Raises:
        MeshError: a dimension does not divide over its mesh axes, or a leaf has other rows than this process'.
    """

    def place(path: Any, leaf: Any) -> jax.Array:
        leaf, name = np.asarray(leaf), path_name(path) or "the array"
        if rows is None:
            fitted = _fitted(name, sharding, leaf.shape)
            return jax.make_array_from_callback(leaf.shape, fitted, lambda where: leaf[where])
        mine = local_rows(sharding, rows).size
        if leaf.ndim == 0 or leaf.shape[0] != mine:
            raise MeshError(
                f"{name} must have this process' {mine} of {rows} rows: got shape {leaf.shape}. "
                "`local_rows(sharding, rows)` lists them."
            )
        shape = (rows, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(_fitted(name, sharding, shape), leaf, shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def to_host(tree: Any) -> Any:
    """Brings whole arrays to every host, rows in global order. In a job of many processes all must call it.

    Args:
        tree: pytree of arrays, sharded in any way.

    Returns:
        The pytree with numpy leaves of global shape.
    """

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def to_local(tree: Any) -> Any:
    """Brings this process' rows to the host: the inverse of `to_global`, without communication.

    Args:
        tree: pytree of arrays sharded over rows only.

    Returns:
        The pytree with numpy leaves whose rows are `local_rows`, in that order.

    Raises:
        MeshError: a leaf is sharded over another dimension as well.
    """

    def fetch(path: Any, leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_replicated:
            return np.asarray(leaf)
        blocks: dict[int, np.ndarray] = {}
        for shard in leaf.addressable_shards:
            if shard.data.shape[1:] != leaf.shape[1:]:
                name = path_name(path)
                raise MeshError(
                    f"{name or 'the array'} must be sharded over rows only: got {leaf.sharding}. Use `to_host`."
                )
            start = shard.index[0].start or 0
            if start not in blocks:
                blocks[start] = np.asarray(shard.data)
        return np.concatenate([blocks[start] for start in sorted(blocks)])

    return jax.tree_util.tree_map_with_path(fetch, tree)


def reshard(tree: Any, shardings: Any, *, donate: bool = False) -> Any:
    """Lays a pytree out anew, device to device, for instance from the trainer's mesh to the sampler's.

    Args:
        tree: pytree of arrays.
        shardings: one sharding, or a pytree of them shaped like `tree` (`shardings(tree, mesh, rules)`).
        donate: the input's memory may be reused; the input is unusable afterwards.

    Returns:
        The pytree on its new shardings, bit for bit the same.
    """
    return jax.device_put(tree, shardings, donate=donate)


def _fitted(name: str, sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Cuts a sharding to an array's rank, and checks that it divides."""
    spec = sharding.spec[: len(shape)]
    for dimension, entry in enumerate(spec):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        shards, size = shard_count(sharding.mesh, axes), shape[dimension]
        if size % shards:
            raise MeshError(
                f"{name}: dimension {dimension} of {shape} must divide over {'·'.join(axes)} = {shards}: got {size}. "
                f"Use {max(size - size % shards, shards)} or {size + -size % shards}."
            )
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
