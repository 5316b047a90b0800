"""Moving data: host arrays to global arrays and back, and pytrees from one mesh to another."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Int64

from grpo_mesh._errors import MeshError
from grpo_mesh._rules import path_name, shard_count


def local_rows(sharding: NamedSharding, rows: int) -> Int64[np.ndarray, " N"]:
    """Returns the rows of a global batch that this process has to pass to `to_global`.

    The interconnect decides which rows the devices of a process hold: they need not be neighbours, and lower ranks need
    not hold lower rows. Load exactly these rows in this order.

    Args:
        sharding: sharding of the batch, rows first (`batch_sharding(mesh)`).
        rows: rows of the global batch.

    Returns:
        Ascending global row numbers, one for each row of this process.

    Raises:
        MeshError: `sharding` is not a NamedSharding, or the rows do not divide over the devices.
    """
    _check_sharding(sharding)
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
        MeshError: `sharding` is not a NamedSharding, a dimension does not divide over its mesh axes, or a leaf does not
            have the rows of this process.
    """
    _check_sharding(sharding)

    def place(path: Any, leaf: Any) -> jax.Array:
        leaf, name = np.asarray(leaf), path_name(path) or "the array"
        if rows is None:
            fitted = _fitted(name, sharding, leaf.shape)
            return jax.make_array_from_callback(leaf.shape, fitted, lambda where: leaf[where])
        local = local_rows(sharding, rows).size
        if leaf.ndim == 0 or leaf.shape[0] != local:
            raise MeshError(
                f"{name} must have this process' {local} of {rows} rows: got shape {leaf.shape}. "
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
    """Moves a pytree to other shardings, device to device, for instance from the trainer's mesh to the sampler's.

    To a mesh of another number of devices each array is gathered first, one after the other, on the devices it is on.

    Args:
        tree: pytree of arrays.
        shardings: one sharding, or a pytree of them shaped like `tree` (`shardings(tree, mesh, rules)`).
        donate: the input's memory may be reused; do not use the input afterwards.

    Returns:
        The pytree on its new shardings, bit for bit the same.

    Raises:
        MeshError: `shardings` holds something else than shardings, such as a mesh.
    """
    for place in jax.tree.leaves(shardings):
        if not isinstance(place, Sharding):
            raise MeshError(f"shardings must be a sharding or a pytree of them: got {type(place).__name__}.")
    return jax.tree.map(lambda leaf, place: _move(leaf, place, donate), tree, jax.tree.broadcast(shardings, tree))


def _move(leaf: Any, place: Sharding, donate: bool) -> jax.Array:
    """Reshards where the array is, by a program, and then copies shard to shard: `device_put` reshards on the host."""
    here = leaf.sharding if isinstance(leaf, jax.Array) else None
    if not (isinstance(here, NamedSharding) and isinstance(place, NamedSharding)):
        return jax.device_put(leaf, place, donate=donate)
    old, new = here.mesh, place.mesh
    if not (isinstance(old, Mesh) and isinstance(new, Mesh)):
        return jax.device_put(leaf, place, donate=donate)
    as_many = old.devices.size == new.devices.size
    if as_many:
        devices = old.devices.reshape(new.devices.shape)
        staged = NamedSharding(Mesh(devices, new.axis_names, axis_types=new.axis_types), place.spec)
    else:
        staged = NamedSharding(old, PartitionSpec())
    moved = leaf
    if not here.is_equivalent_to(staged, leaf.ndim):
        moved = jax.jit(_same, out_shardings=staged)(leaf)
    if as_many or not place.is_fully_addressable:
        return jax.device_put(moved, place, donate=donate or moved is not leaf)
    whole = moved.addressable_shards[0].data
    where = place.addressable_devices_indices_map(leaf.shape)
    pieces = [jax.device_put(whole[index], device) for device, index in where.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, place, pieces)


def _same(array: jax.Array) -> jax.Array:
    return array


def _check_sharding(sharding: Any) -> None:
    if not isinstance(sharding, NamedSharding):
        raise MeshError(
            f"sharding must be a NamedSharding such as `batch_sharding(mesh)`: got {type(sharding).__name__}. "
            "The order is to_global(tree, sharding) and local_rows(sharding, rows)."
        )


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
