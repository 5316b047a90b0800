"""The one module that uses jax's private parts: the distributed key-value store, barriers and environment checks.

jax has no public barrier with a timeout and no public access to the store behind `jax.distributed`. When that changes,
only this module changes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax._src import cloud_tpu_init, distributed, xla_bridge

from grpo_mesh._errors import HostsError


def on_tpu_vm() -> bool:
    """Returns whether jax found TPU chips and libtpu on this host (without starting them)."""
    return cloud_tpu_init.running_in_cloud_tpu_vm


def backend_started() -> bool:
    """Returns whether jax has started its devices, whose number is then fixed."""
    return xla_bridge.backends_are_initialized()


def started() -> bool:
    """Returns whether this process has joined a job of several."""
    return distributed.global_state.client is not None


def coordinator_address() -> str | None:
    """Returns the coordinator's host:port."""
    return distributed.global_state.coordinator_address


def rank() -> int:
    """Returns this process' number, without starting a backend."""
    return distributed.global_state.process_id


def process_count() -> int:
    """Returns the number of processes, without starting a backend."""
    return distributed.global_state.num_processes


def put(key: str, value: str) -> None:
    """Stores a value for all processes, replacing an older one."""
    _client().key_value_set(key, value, allow_overwrite=True)


def entries(folder: str) -> dict[str, str]:
    """Returns what lies under a folder, by the last part of the key."""
    return {key.rpartition("/")[2]: value for key, value in _client().key_value_dir_get(folder + "/")}


def remove(folder: str) -> None:
    """Removes a folder, if it is there."""
    _client().key_value_delete(folder + "/")


def barrier(name: str, seconds: float) -> None:
    """Waits until every process has called it.

    Args:
        name: unique in the life of a job.
        seconds: how long to wait.

    Raises:
        TimeoutError: not all came in time.
        HostsError: the job is already failing.
    """
    try:
        _client().wait_at_barrier(name, max(1, math.ceil(1000 * seconds)))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise TimeoutError(str(error)) from error
        raise HostsError(f"the job is failing while rank {rank()} waits for {name!r}: {error}") from error


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise HostsError("this needs a job of several processes: call `grpo_mesh.initialize()` first.")
    return client
