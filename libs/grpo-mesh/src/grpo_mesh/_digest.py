"""One hexadecimal name for a pytree of arrays, the same for any sharding, device and number of processes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from grpo_mesh._errors import MeshError
from grpo_mesh._mesh import replicated

_LANES = 2


def digest(tree: Any) -> str:
    """Digests the bits of every leaf with its path, shape and dtype.

    The elements are hashed on the devices that hold them: bits mixed with their position, summed modulo 2^32 in two
    lanes. Integer sums are exact in any order, so the sharding and the number of processes cannot change the result.
    It finds corruption and mix-ups, but does not withstand an adversary. In a job of many processes all must call it.

    Args:
        tree: pytree of jax or numpy arrays (any dtype, PRNG keys included). Placement of leaves is not changed.

    Returns:
        64 hexadecimal digits.

    Raises:
        MeshError: a leaf is not an array.
    """
    paths_and_leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths_and_leaves]
    leaves = []
    for path, (_, leaf) in zip(paths, paths_and_leaves):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise MeshError(f"digest: leaf {path!r} must be an array: got {type(leaf).__name__}.")
        leaves.append(leaf)
    sums = np.asarray(_hash_leaves(leaves)) if leaves else np.zeros((0, _LANES), np.uint32)
    summary = hashlib.sha256()
    for path, leaf, lanes in zip(paths, leaves, sums):
        summary.update(f"{path}\0{leaf.shape}\0{leaf.dtype}\0{' '.join(map(str, lanes))}\n".encode())
    return summary.hexdigest()


def _hash_leaves(leaves: list[Any]) -> jax.Array:
    # Inputs may live on devices of other processes; every process can read a replicated result.
    meshes = [leaf.sharding.mesh for leaf in leaves if isinstance(getattr(leaf, "sharding", None), NamedSharding)]
    return _hash_program(replicated(meshes[0]) if meshes else None)(leaves)


@functools.cache
def _hash_program(out_sharding: NamedSharding | None) -> Callable[[list[Any]], jax.Array]:
    return jax.jit(lambda leaves: jnp.stack([_hash_array(leaf) for leaf in leaves]), out_shardings=out_sharding)


def _hash_array(x: jax.Array) -> jax.Array:
    """Two sums over the elements of a mix of bits and position, uint32 [2]."""
    bits = _bits(x)
    # Each coordinate times a multiplier of its axis, because a linear index overflows 32 bits on large leaves. With
    # random odd multipliers, two elements swap places unnoticed with a probability of about 1 in 2^64.
    multipliers = np.random.default_rng(0x6D657368).integers(2**32, size=(_LANES, bits.ndim + 1), dtype=np.uint32) | 1
    lanes = []
    for lane in multipliers:
        keys = bits * lane[0]
        for axis, size in enumerate(bits.shape):
            shape = (1,) * axis + (size,) + (1,) * (bits.ndim - axis - 1)
            keys += (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + 1) * lane[axis + 1]
        lanes.append(_mix(keys))
    # One reduction of both lanes reads the array once; on a CPU it is also vectorised, which two jnp.sum are not.
    zeros = (jnp.uint32(0),) * _LANES
    return jnp.stack(jax.lax.reduce(tuple(lanes), zeros, _add, tuple(range(bits.ndim))))


def _add(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(a + b for a, b in zip(left, right))


def _bits(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
        x = x.astype(jnp.uint8)
    width = x.dtype.itemsize * 8
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}"))
    return words.astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
