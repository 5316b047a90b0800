"""From "dp:1,fsdp:-1,tp:1" and the devices at hand to a `jax.sharding.Mesh` in the order of the interconnect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_mesh._errors import MeshError

# From the slowest to the fastest network: the order in which jax lays axes onto the interconnect.
BATCH_AXES = ("dp", "fsdp")
AXES = (*BATCH_AXES, "tp")
Device = Any  # to a type checker jax.Device is a variable, not a type

_LONGEST_SIZE = 9  # digits


def parse_mesh(spec: str | Mapping[str, int], device_count: int, slice_count: int = 1) -> dict[str, int]:
    """Resolves a mesh specification to the size of every axis.

    Args:
        spec: `"dp:1,fsdp:-1,tp:1"` (any order and subset; an absent axis has size 1; one size may be -1 for the
            devices that are left), `{"fsdp": -1}` likewise, positional `"1,-1,1"` for dp, fsdp, tp, or `"auto"`:
            dp = slices, fsdp = devices of a slice.
        device_count: devices to lay out.
        slice_count: slices these devices belong to (TPU slices joined by the data-centre network).

    Returns:
        Axis name to size, in the order dp, fsdp, tp.

    Raises:
        MeshError: unknown or repeated axes, more than one -1, or sizes whose product is not `device_count`.
    """
    if isinstance(spec, Mapping):
        spec = ",".join(f"{name}:{size}" for name, size in spec.items())
    if not isinstance(spec, str):
        raise MeshError(f"mesh must be text such as 'dp:1,fsdp:-1,tp:1', or a mapping: got {type(spec).__name__}.")
    if spec.strip() == "auto":
        # Weights are sharded over every chip of a slice, hosts or not; only gradients cross the slow network.
        if device_count % slice_count:
            raise MeshError(f"mesh 'auto' needs slices of one size: {device_count} devices in {slice_count} slices.")
        return {"dp": slice_count, "fsdp": device_count // slice_count, "tp": 1}
    sizes = dict.fromkeys(AXES, 1) | _parse_sizes(spec)
    free = [name for name in AXES if sizes[name] == -1]
    if len(free) > 1:
        raise MeshError(f"mesh {spec!r} may leave one axis at -1: got {' and '.join(free)}. Give the others a size.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if device_count % known:
            rest = "·".join(name for name in AXES if name not in free)
            raise MeshError(
                f"mesh {spec!r}: {free[0]} = {device_count} devices / ({rest} = {known}) is not a whole number. "
                f"{rest} must divide {device_count}: one of {_divisors(device_count)}."
            )
        sizes[free[0]] = device_count // known
    elif known != device_count:
        arithmetic = "·".join(str(size) for size in sizes.values())
        raise MeshError(
            f"mesh {spec!r}: dp·fsdp·tp = {arithmetic} = {known} but {device_count} devices. "
            "Set one axis to -1 to take what is left."
        )
    return sizes


def make_mesh(spec: str | Mapping[str, int] = "auto", devices: Sequence[Device] | None = None) -> Mesh:
    """Builds the mesh with axes dp, fsdp, tp (all three always present) in the order of the interconnect.

    Args:
        spec: see `parse_mesh`.
        devices: devices to use, all of them; default `jax.devices()`. Compile-only devices of
            `jax.experimental.topologies.get_topology_desc` work as well.

    Returns:
        A mesh whose tp neighbours are the closest. With several slices, dp (then fsdp) spans the slices.

    Raises:
        MeshError: the sizes do not fit the devices, or tp would have to cross slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise MeshError("a mesh needs at least one device: got none.")
    slices = sorted({_slice_of(device) for device in devices})
    sizes = parse_mesh(spec, len(devices), len(slices))
    shape = tuple(sizes.values())
    if len(slices) == 1:
        grid = _lay_out(shape, devices)
    else:
        across = _axes_across_slices(spec, sizes, len(slices))
        inside = tuple(size // outer for size, outer in zip(shape, across))
        blocks = np.empty(across, dtype=object)
        for place, index in zip(np.ndindex(across), slices):
            blocks[place] = _lay_out(inside, [device for device in devices if _slice_of(device) == index])
        grid = np.block(blocks.tolist())
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def reshape_mesh(mesh: Mesh, spec: str | Mapping[str, int]) -> Mesh:
    """Builds a mesh of other axis sizes on the same devices in the same order.

    One compiled program can therefore read arrays on one of the two meshes and write arrays on the other.

    Args:
        mesh: from `make_mesh`.
        spec: see `parse_mesh`.

    Returns:
        The mesh; each of its tp groups is a run of neighbours in the order of `mesh`.

    Raises:
        MeshError: the sizes do not fit the devices, or tp would have to cross slices.
    """
    slices = {_slice_of(device) for device in mesh.devices.flat}
    sizes = parse_mesh(spec, mesh.size, len(slices))
    grid = mesh.devices.reshape(tuple(sizes.values()))
    for group in grid.reshape(-1, sizes["tp"]):
        if len({_slice_of(device) for device in group}) > 1:
            raise MeshError(f"mesh {spec!r}: tp = {sizes['tp']} must stay inside one slice. Choose a smaller tp.")
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over dp and fsdp, everything else replicated.

    Args:
        mesh: from `make_mesh`.

    Raises:
        MeshError: not a mesh with these axes.
    """
    if not isinstance(mesh, Mesh) or not set(BATCH_AXES) <= set(mesh.axis_names):
        axes = f"axes {', '.join(mesh.axis_names)}" if isinstance(mesh, Mesh) else type(mesh).__name__
        raise MeshError(f"a batch needs a mesh with axes {' and '.join(BATCH_AXES)} (see `make_mesh`): got {axes}.")
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _parse_sizes(spec: str) -> dict[str, int]:
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise MeshError("mesh must name an axis, as in 'dp:1,fsdp:-1,tp:1': got nothing.")
    if any(":" in part for part in parts):
        pairs = [tuple(piece.strip() for piece in part.partition(":")[::2]) for part in parts]
    else:
        if len(parts) != len(AXES):
            raise MeshError(f"a positional mesh has three sizes, dp,fsdp,tp: got {len(parts)} in {spec!r}.")
        pairs = list(zip(AXES, parts))
    sizes: dict[str, int] = {}
    for name, text in pairs:
        if name not in AXES:
            raise MeshError(f"mesh {spec!r}: unknown axis {name!r}; the axes are {', '.join(AXES)}.")
        if name in sizes:
            raise MeshError(f"mesh {spec!r}: axis {name} is given twice.")
        if not text.removeprefix("-").isdecimal() or len(text) > _LONGEST_SIZE or (int(text) < 1 and int(text) != -1):
            raise MeshError(f"mesh {spec!r}: {name} must be a positive whole number or -1: got {text!r}.")
        sizes[name] = int(text)
    return sizes


def _lay_out(shape: tuple[int, ...], devices: list[Device]) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        # A logical axis that is not a product of whole physical axes (fsdp:2,tp:8 on a 4x4 torus) has to split one.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _axes_across_slices(spec: str | Mapping[str, int], sizes: dict[str, int], slice_count: int) -> tuple[int, ...]:
    """Spreads the slices over dp first, then fsdp; never over tp, which communicates in every layer."""
    left, across = slice_count, []
    for name in BATCH_AXES:
        across.append(math.gcd(sizes[name], left))
        left //= across[-1]
    if left != 1:
        raise MeshError(
            f"mesh {spec!r}: dp·fsdp = {sizes['dp']}·{sizes['fsdp']} cannot be spread over {slice_count} slices, "
            f"and tp must stay inside one. Let dp be a multiple of {slice_count}."
        )
    return (*across, 1)


def _slice_of(device: Device) -> int:
    # Only TPU slices are joined by a slower network, which needs a hybrid mesh. Other platforms may number hosts here.
    return getattr(device, "slice_index", 0) or 0 if device.platform == "tpu" else 0


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
