"""Where the engine's arrays are: on one device, or on a mesh with rows split over its data axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from grpo_sampler._errors import SamplerError
from grpo_sampler._partition import TENSOR_AXIS, decoding_axes


class Placement:
    """Rows, units and their caches are split over every axis but `tp`; weights over `tp` alone.

    A shard decodes its rows without communication, so weights that training splits over `fsdp`, or over another mesh of
    the same devices, move from device to device once per call instead of once per step.
    """

    def __init__(self, mesh: Mesh | None, params: Any) -> None:
        leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "sharding")]
        self.mesh = mesh = None if mesh is None else _with_rows(mesh)
        if mesh is None:
            devices = {device for leaf in leaves if leaf.sharding is not None for device in leaf.sharding.device_set}
            if len(devices) > 1:
                raise SamplerError(
                    f"params must be on one device if the sampler has no mesh: got {len(devices)} devices. "
                    "Pass the mesh they are sharded over: Sampler(..., mesh=mesh)."
                )
            self.row_axes: tuple[str, ...] = ()
            self.shards = 1
            self.replicated: Sharding = SingleDeviceSharding(devices.pop() if devices else jax.devices()[0])
        else:
            self.row_axes = tuple(name for name in mesh.axis_names if name != TENSOR_AXIS)
            self.shards = mesh.size // mesh.shape.get(TENSOR_AXIS, 1)
            self.replicated = NamedSharding(mesh, PartitionSpec())
            _check_order(mesh, leaves)

    @property
    def tensor(self) -> int:
        """Number of devices that each product is split over."""
        return 1 if self.mesh is None else self.mesh.shape.get(TENSOR_AXIS, 1)

    def rows(self, axis: int = 0, heads: int | None = None) -> Sharding:
        """Sharding of an array whose `axis` is rows or units, and whose next axis is `heads`."""
        if self.mesh is None:
            return self.replicated
        split = heads is not None and self.tensor > 1 and heads % self.tensor == 0
        tail = (TENSOR_AXIS,) if split else ()
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, self.row_axes, *tail))

    def given(self, leaf: Any) -> Sharding | None:
        """Sharding of a given parameter; parameters that are not on the mesh are first replicated over it."""
        sharding = getattr(leaf, "sharding", None)
        if self.mesh is None or (sharding is not None and sharding.device_set == set(self.mesh.devices.flat)):
            return sharding
        return self.replicated

    def moves(self, params: Any) -> bool:
        """Whether the parameters lie on another mesh of the same devices."""
        if self.mesh is None:
            return False
        shardings = [self.given(leaf) for leaf in jax.tree.leaves(params)]
        return any(isinstance(one, NamedSharding) and one.mesh != self.mesh for one in shardings)

    def weight(self, path: str, drop: int = 0) -> Sharding:
        """Sharding of a weight for decoding: that of `PARTITION_RULES`, on the tensor axis only.

        Args:
            path: of the parameter, such as `layers/q`.
            drop: number of leading axes that the weight does not have.
        """
        if self.mesh is None or self.tensor == 1:
            return self.replicated
        return NamedSharding(self.mesh, PartitionSpec(*decoding_axes(path)[drop:]))

    def split(self, function: Callable, in_axes: Any, out_axes: Any) -> Callable:
        """Runs a function of one shard on every shard.

        Args:
            function: a function of the rows of one shard.
            in_axes: for each argument the axis of rows or units, None for what all shards share.
            out_axes: the same for the results.
        Returns:
            A function of the whole arrays.
        """
        if self.mesh is None:
            return function
        names = set(self.row_axes) if self.tensor > 1 else set(self.mesh.axis_names)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=jax.tree.map(self._spec, in_axes, is_leaf=_is_none),
            out_specs=jax.tree.map(self._spec, out_axes, is_leaf=_is_none),
            axis_names=names,
            check_vma=False,
        )

    def _spec(self, axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, self.row_axes)


def _with_rows(mesh: Mesh) -> Mesh:
    """The mesh, with an axis of size 1 for rows if `tp` is its only axis."""
    if mesh.axis_names != (TENSOR_AXIS,):
        return mesh
    return Mesh(mesh.devices[None], ("rows", TENSOR_AXIS), axis_types=2 * mesh.axis_types)


def _check_order(mesh: Mesh, leaves: list[Any]) -> None:
    """Refuses parameters on the same devices in another order, between which no compiled program can move arrays."""
    order = tuple(mesh.devices.flat)
    for leaf in leaves:
        if not isinstance(leaf.sharding, NamedSharding) or leaf.sharding.device_set != set(order):
            continue
        devices = leaf.sharding.mesh.devices
        if devices is not None and (got := tuple(devices.flat)) != order:
            raise SamplerError(
                "the sampler's mesh must list its devices in the order of the parameters' mesh: got "
                f"{[device.id for device in order]} and {[device.id for device in got]}. Make one mesh from the "
                "other: Mesh(mesh.devices.reshape(sizes), mesh.axis_names)."
            )


def _is_none(value: Any) -> bool:
    return value is None
