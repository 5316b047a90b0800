"""Measured peak memory on the devices at hand: what a prediction is worth."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Literal, TypeVar

import jax

from grpo_mesh._mesh import Device

Result = TypeVar("Result")

_MMAP_THRESHOLD, _SMALLEST_MAPPED = -3, 64 * 1024  # malloc.h
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Peak(Generic[Result]):
    """The peak memory of a piece of work.

    Args:
        result: what the work returned, ready.
        bytes: summed over the devices; None if this platform does not report a peak.
        scope: "block": of the work alone, arrays that were alive before included; "process": since the process started,
            because the counters of accelerators cannot be reset.
    """

    result: Result
    bytes: int | None
    scope: Literal["block", "process"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Predicted and measured peak of one phase.

    Args:
        phase: its name.
        predicted: bytes over all devices of this process.
        measured: bytes over all devices of this process.
    """

    phase: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Error of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        return (
            f"{self.phase:9} predicted {self.predicted / 2**20:8.1f} MiB, measured {self.measured / 2**20:8.1f} MiB: "
            f"error {self.error:+.1%}"
        )


def measure_peak(work: Callable[[], Result], devices: Sequence[Device] | None = None) -> Peak[Result]:
    """Runs a piece of work and measures the most memory in use meanwhile.

    On accelerators it reads the allocator's peak. On a CPU under Linux it reads the peak of the process, which includes
    whatever else runs in it: compile first (run the work once), and measure the second run. From the first call on,
    glibc maps every array by itself in the whole process; otherwise its pools of freed arrays would count as used.

    Args:
        work: runs on the devices of this process; it is awaited.
        devices: of this process; None: `jax.local_devices()`.

    Returns:
        The result, and the peak in bytes.
    """
    devices = jax.local_devices() if devices is None else devices
    if devices[0].memory_stats() is not None:
        result = jax.block_until_ready(work())
        return Peak(result, sum(device.memory_stats()["peak_bytes_in_use"] for device in devices), "process")
    if not _RESET.exists():
        return Peak(jax.block_until_ready(work()), None, "block")
    _call_glibc("mallopt", _MMAP_THRESHOLD, _SMALLEST_MAPPED)
    # Return what was freed to the system. It would count as used already and hide what the work takes.
    _call_glibc("malloc_trim", 0)
    before, arrays = _status("VmRSS"), _live_bytes()
    _RESET.write_text("5")  # restarts the peak
    result = jax.block_until_ready(work())
    return Peak(result, _status("VmHWM") - before + arrays, "block")


def _live_bytes() -> int:
    return sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _call_glibc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)  # absent from other C libraries
    if function is not None:
        function(*arguments)
