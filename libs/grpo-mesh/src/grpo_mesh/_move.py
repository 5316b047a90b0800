"""Moving data: batches of one host to global arrays and back, and pytrees from one mesh to another."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from grpo_mesh._errors import MeshError


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
    _check_rows(sharding, rows)
    row_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    wanted = np.zeros(rows, bool)
    for (where,) in row_sharding.addressable_devices_indices_map((rows,)).values():  # pyright: ignore[reportGeneralTypeIssues]
        wanted[where] = True
    return np.flatnonzero(wanted)


def to_global(tree: Any, sharding: NamedSharding, rows: int | None = None) -> Any:
    """Turns host-local batches into global arrays.

    Args:
        tree: pytree of host arrays with rows first. Each process passes either its `local_rows`, in that order, or
            the whole global batch (the same on every process).
        sharding: sharding of the global arrays; its spec is cut to the rank of each leaf.
        rows: rows of the global batch; default: those of the leaves, i.e. every process passes the whole batch.

    Returns:
        The pytree with global `jax.Array` leaves.

    Raises:
        MeshError: a leaf has neither this process' rows nor all rows.
    """

    def place(path: Any, leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        total = leaf.shape[0] if rows is None else rows
        mine = local_rows(sharding, total).size
        if leaf.shape[0] not in (mine, total):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise MeshError(
                f"{name or 'the batch'} must have this process' {mine} rows or all {total}: got {leaf.shape[0]}. "
                "`local_rows(sharding, rows)` lists this process' rows."
            )
        fitted = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: leaf.ndim]))
        return jax.make_array_from_process_local_data(fitted, leaf, (total, *leaf.shape[1:]))

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
                name = jax.tree_util.keystr(path, simple=True, separator="/")
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


def _check_rows(sharding: NamedSharding, rows: int) -> None:
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    shards = int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int))
    if rows % shards:
        raise MeshError(
            f"rows must divide over {'·'.join(names)} = {shards}: got {rows}. "
            f"Use {max(rows - rows % shards, shards)} or {rows + -rows % shards} rows."
        )
