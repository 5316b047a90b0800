"""What a set of rules does to a tree, as a table to read before renting the machines."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from grpo_mesh._rules import AnyMesh, Rules, check_array, path_name, shardings


@dataclasses.dataclass(frozen=True)
class Placement:
    """One leaf: path, global shape, dtype, partition spec (one text per dimension) and bytes on each device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[str, ...]
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The placements of a tree; `str` gives the table. `total` and `bytes_per_device` are sums in bytes."""

    mesh: str
    placements: tuple[Placement, ...]
    total: int
    bytes_per_device: int

    def __str__(self) -> str:
        head = ("path", "shape", "dtype", "spec", "bytes/device")
        rows = [
            (
                p.path,
                "×".join(map(str, p.shape)) or "scalar",
                p.dtype,
                ", ".join(p.spec) or "–",
                f"{p.bytes_per_device:,}",
            )
            for p in self.placements
        ]
        foot = ("total", f"{self.total:,} bytes", "", self.mesh, f"{self.bytes_per_device:,}")
        widths = [max(map(len, column)) for column in zip(head, *rows, foot)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row[:-1], widths)) + "  " + row[-1].rjust(widths[-1])
            for row in (head, *rows, foot)
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def explain(tree: Any, mesh: AnyMesh, rules: Rules) -> Explanation:
    """Tabulates where every leaf goes and how many bytes a device holds of it.

    Args:
        tree: pytree of arrays or `jax.ShapeDtypeStruct`.
        mesh: mesh to shard over.
        rules: see `Rules`.

    Returns:
        An `Explanation`; print it.

    Raises:
        MeshError: as `shardings`.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    placed = jax.tree.leaves(shardings(tree, mesh, rules))
    placements, total = [], 0
    for (path, leaf), sharding in zip(flat, placed):
        size = jnp.dtype(leaf.dtype).itemsize
        total += size * math.prod(leaf.shape)
        entries = tuple(sharding.spec) + (None,) * (len(leaf.shape) - len(sharding.spec))
        spec = tuple("·".join(axes) if isinstance(axes, tuple) else axes or "–" for axes in entries)
        per_device = size * math.prod(sharding.shard_shape(tuple(leaf.shape)))
        placements.append(Placement(path_name(path), tuple(leaf.shape), str(leaf.dtype), spec, per_device))
    axes = ", ".join(f"{name}:{size}" for name, size in mesh.shape.items())
    return Explanation(axes, tuple(placements), total, sum(p.bytes_per_device for p in placements))


def bytes_per_device(tree: Any) -> int:
    """Adds up the bytes that one device holds of a tree.

    Args:
        tree: pytree of arrays or `jax.ShapeDtypeStruct`; a leaf without a sharding counts whole.

    Returns:
        Bytes.

    Raises:
        MeshError: a leaf is not an array.
    """
    return sum(_leaf_bytes(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0])


def _leaf_bytes(path: str, leaf: Any) -> int:
    check_array(path, leaf)
    sharding = getattr(leaf, "sharding", None)
    shape = tuple(leaf.shape) if sharding is None else sharding.shard_shape(tuple(leaf.shape))
    return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize
