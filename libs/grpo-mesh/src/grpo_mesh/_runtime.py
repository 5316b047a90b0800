"""The one module that touches jax's private distributed runtime: its key-value store, barriers and environment checks.

jax offers no public way to a barrier with a timeout or to the store behind `jax.distributed`; when that changes, only
this module does.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax._src import cloud_tpu_init, distributed

from grpo_mesh._errors import HostsError


def on_tpu_vm() -> bool:
    """Tells whether jax found TPU chips and libtpu on this host (without starting them)."""
    return cloud_tpu_init.running_in_cloud_tpu_vm


def started() -> bool:
    """Tells whether this process has joined a job of several."""
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
    """Forgets a folder; a folder that is not there is no error."""
    _client().key_value_delete(folder + "/")


def barrier(name: str, seconds: float) -> None:
    """Waits until every process is here.

    Args:
        name: used once in the life of a job.
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
