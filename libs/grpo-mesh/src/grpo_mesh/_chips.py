"""TPU chips and slices: memory and speed of a chip, and the topology behind a name such as "v5e-16"."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.experimental import topologies

from grpo_mesh._errors import MeshError
from grpo_mesh._mesh import Device

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip.

    Args:
        name: family, as in slice names.
        hbm_bytes: nominal high-bandwidth memory.
        usable_bytes: what the compiler lets a program use (from its out-of-memory message, libtpu 0.0.42).
        flops: bf16 peak, FLOP/s.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s over all inter-chip links, one direction.
        dimensions: of the torus.
        names_cores: whether slice names count tensor cores (two per chip) instead of chips: v4-8 has four chips.
        family: its name in the compiler's topology descriptions.
        accelerator: GKE's node label.
        gcloud: the prefix of gcloud's accelerator types.

    Source: Cloud TPU system architecture pages; "How to Scale Your Model", chapter 2 (links).
    """

    name: str
    hbm_bytes: int
    usable_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dimensions: int
    names_cores: bool
    family: str
    accelerator: str
    gcloud: str


CHIPS = {
    "v4": Chip(
        name="v4",
        hbm_bytes=32 * GIB,
        usable_bytes=int(30.75 * GIB),
        flops=275e12,
        hbm_bandwidth=1.228e12,
        ici_bandwidth=6 * 45e9,
        dimensions=3,
        names_cores=True,
        family="v4",
        accelerator="tpu-v4-podslice",
        gcloud="v4",
    ),
    "v5e": Chip(
        name="v5e",
        hbm_bytes=16 * GIB,
        usable_bytes=int(15.75 * GIB),
        flops=197e12,
        hbm_bandwidth=0.819e12,
        ici_bandwidth=4 * 45e9,
        dimensions=2,
        names_cores=False,
        family="v5e",
        accelerator="tpu-v5-lite-podslice",
        gcloud="v5litepod",
    ),
    "v5p": Chip(
        name="v5p",
        hbm_bytes=95 * GIB,
        usable_bytes=int(95.74 * GIB),
        flops=459e12,
        hbm_bandwidth=2.765e12,
        ici_bandwidth=6 * 90e9,
        dimensions=3,
        names_cores=True,
        family="v5",
        accelerator="tpu-v5p-slice",
        gcloud="v5p",
    ),
    "v6e": Chip(
        name="v6e",
        hbm_bytes=32 * GIB,
        usable_bytes=int(31.25 * GIB),
        flops=918e12,
        hbm_bandwidth=1.64e12,
        ici_bandwidth=4 * 90e9,
        dimensions=2,
        names_cores=False,
        family="v6e",
        accelerator="tpu-v6e-slice",
        gcloud="v6e",
    ),
}

_GRIDS_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_GRIDS_3D = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of one TPU pod: its chip, its grid, and how the grid is cut into hosts.

    Args:
        name: as the user wrote it, "v5e-16".
        chip: see `Chip`.
        grid: chips along each dimension.
        host: chips of one host along each of three dimensions.
    """

    name: str
    chip: Chip
    grid: tuple[int, ...]
    host: tuple[int, int, int]

    @property
    def chips(self) -> int:
        """Chips of the slice; each is one jax device."""
        return math.prod(self.grid)

    @property
    def hosts(self) -> int:
        """Hosts of the slice; each runs one process."""
        return self.chips // math.prod(self.host)

    @property
    def chips_per_host(self) -> int:
        """Chips, and jax devices, of one process."""
        return math.prod(self.host)

    @property
    def topology(self) -> str:
        """The grid as text, "4x4"."""
        return "x".join(map(str, self.grid))


def find_slice(name: str) -> Slice:
    """Looks up a slice by the name under which it is rented.

    Args:
        name: "v5e-16", "v6e-8" (chips), "v4-8", "v5p-32" (tensor cores, two per chip). Up to 256 chips.

    Returns:
        The slice in its usual topology.

    Raises:
        MeshError: an unknown family, or a size that is not rented.
    """
    if not isinstance(name, str):
        raise MeshError(f"a slice is named by text such as 'v5e-16': got {name!r}.")
    family, _, size = name.partition("-")
    if family not in CHIPS:
        raise MeshError(f"slice {name!r} must start with one of {', '.join(CHIPS)}, as in 'v5e-16'.")
    chip = CHIPS[family]
    grids = _GRIDS_2D if chip.dimensions == 2 else _GRIDS_3D
    per_chip = 2 if chip.names_cores else 1
    if not size.isdecimal() or int(size) % per_chip or int(size) // per_chip not in grids:
        offered = ", ".join(f"{family}-{chips * per_chip}" for chips in grids)
        raise MeshError(f"slice {name!r} is not offered: choose one of {offered}.")
    chips = int(size) // per_chip
    if chips == 1:
        host = (1, 1, 1)
    elif chips == 8 and chip.dimensions == 2:
        host = (2, 4, 1)  # v5e-8 and v6e-8 are one host
    else:
        host = (2, 2, 1)
    return Slice(name, chip, grids[chips], host)


def slice_devices(name: str, slices: int = 1) -> list[Device]:
    """Returns the devices of a slice for the TPU compiler, on a machine that has none.

    Args:
        name: see `find_slice`.
        slices: number of such slices, joined by the data-centre network.

    Returns:
        Compile-only devices: for `make_mesh` and `jax.jit(...).lower(...).compile()`; they cannot hold data.

    Raises:
        MeshError: an unknown slice, or no TPU compiler (`pip install grpo-mesh[tpu-compiler]`).
    """
    target = find_slice(name)
    if slices < 1:
        raise MeshError(f"slices must be at least 1: got {slices}.")
    # A v4 chip's two cores are one device only in this configuration; the other families default to it.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if target.chip.name == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        description = topologies.get_topology_desc(
            f"{target.chip.family}:{target.topology}", "tpu", chips_per_host_bounds=target.host, **options
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        if "lockfile" in str(error):
            raise MeshError(
                "another process is using the TPU compiler, and libtpu admits one at a time. Wait for it, or start "
                "both with ALLOW_MULTIPLE_LIBTPU_LOAD=1 (libtpu's own switch; harmless where there is no TPU)."
            ) from error
        raise MeshError(
            f"the TPU compiler cannot describe {slices} × {name}: {error}. It comes with libtpu: "
            "`pip install grpo-mesh[tpu-compiler]`."
        ) from error
    return list(description.devices)
