"""Joining the processes of a job, wherever they were started, and aborting so that the others notice."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

import jax

from grpo_mesh import _runtime
from grpo_mesh._errors import HostsError

COORDINATOR, PROCESS_COUNT, PROCESS_ID = "GRPO_COORDINATOR", "GRPO_PROCESS_COUNT", "GRPO_PROCESS_ID"
KINDS = ("auto", "single", "explicit", "tpu", "slurm", "jobset")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_JOBSET = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_INDEX", "JOB_COMPLETION_INDEX", "JOBSET_JOBS", "JOBSET_PODS")
_PORT = 8476
# Of what jax raises in a collective operation whose other end has died: gloo's words, on CPUs.
_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe")
_job: list[Job] = []  # the job that this process has joined, if any


@dataclasses.dataclass(frozen=True)
class Job:
    """The job that this process belongs to; `print(job)` for the log.

    Args:
        kind: "single", "explicit", "tpu", "slurm" or "jobset".
        rank: number of this process.
        processes: how many there are.
        coordinator: host:port of rank 0's service, None for a single process.
        detected: the environment variables that decided it, with their values.
        heartbeat: seconds after which a silent process counts as dead.
    """

    kind: str
    rank: int
    processes: int
    coordinator: str | None
    detected: Mapping[str, str]
    heartbeat: int

    def __str__(self) -> str:
        because = ", ".join(f"{key}={value}" for key, value in self.detected.items())
        where = f" at {self.coordinator}" if self.coordinator else ""
        return f"{self.kind} job{where}: rank {self.rank} of {self.processes}" + (f" ({because})" if because else "")


def initialize(
    kind: str = "auto",
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    rank: int | None = None,
    timeout: int = 300,
    heartbeat: int = 10,
    shutdown: int = 300,
) -> Job:
    """Joins this process to its job; call it before any array is made.

    Called again without arguments it returns the same job. After it, an uncaught exception ends this process at once,
    without waiting for the others at exit, and the others end with a message and a non-zero code within
    `heartbeat` + 10 seconds.

    Args:
        kind: "explicit" (arguments, or GRPO_COORDINATOR, GRPO_PROCESS_COUNT and GRPO_PROCESS_ID, as set by
            `grpo_mesh.launch`), "tpu" (a pod or several slices), "slurm" (inside srun), "jobset" (the variables of
            the manifests that `grpo_mesh.render` writes), "single", or "auto": the first of these that is present.
        coordinator: host:port on which rank 0 serves.
        processes: how many processes.
        rank: number of this one.
        timeout: seconds to wait for all to join.
        heartbeat: seconds after which a silent process counts as dead.
        shutdown: seconds that a finished process waits for the others.

    Returns:
        The job.

    Raises:
        HostsError: the environment does not describe the kind asked for, the processes did not join in time, or this
            process belongs to another job already.
    """
    if kind not in KINDS:
        raise HostsError(f"kind must be one of {', '.join(KINDS)}: got {kind!r}.")
    given = {"coordinator": coordinator, "processes": processes, "rank": rank}
    if _job:
        if kind != "auto" or any(value is not None for value in given.values()):
            raise HostsError(f"this process has already joined a job, and cannot change it: {_job[0]}.")
        return _job[0]
    if kind == "auto":
        kind = "explicit" if any(value is not None for value in given.values()) else detect(os.environ)
    if kind == "single":
        return Job("single", 0, 1, None, {}, heartbeat)
    seen, options = _options(kind, given, os.environ)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=shutdown,
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise HostsError(f"the processes of this {kind} job did not join within {timeout} s: {error}") from error
    job = Job(kind, _runtime.rank(), _runtime.process_count(), _runtime.coordinator_address(), seen, heartbeat)
    if job.processes > 1:
        sys.excepthook = _abort_on_exception
    _job.append(job)
    return job


def detect(environment: Mapping[str, str]) -> str:
    """Names the kind of job that these environment variables describe.

    Args:
        environment: `os.environ`, or a copy for a test.

    Returns:
        One of "explicit", "slurm", "jobset", "tpu", "single".
    """
    if COORDINATOR in environment:
        return "explicit"
    if all(name in environment for name in _SLURM) and int(environment["SLURM_NTASKS"]) > 1:
        return "slurm"
    if all(name in environment for name in _JOBSET):
        return "jobset"
    return "tpu" if _runtime.on_tpu_vm() else "single"


def abort(code: int, message: str) -> NoReturn:
    """Ends this process at once, so that the other processes of its job end soon.

    `sys.exit` would first wait for the others, which may wait for this one.

    Args:
        code: exit status, not 0.
        message: printed to standard error.
    """
    try:
        print(f"rank {_runtime.rank()} aborts with code {code}: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)  # even if nobody reads the message: the pipe may be closed, the disk full


def _options(
    kind: str, given: Mapping[str, Any], environment: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the environment variables that were read, and the arguments of `jax.distributed.initialize`."""
    if kind == "explicit":
        return _explicit(given, environment)
    if kind == "slurm":
        return _required(kind, _SLURM, environment), {"cluster_detection_method": "slurm"}
    if kind == "jobset":
        seen = _required(kind, _JOBSET, environment)
        name, job, pods = seen["JOBSET_NAME"], seen["REPLICATED_JOB_NAME"], int(seen["JOBSET_PODS"])
        return seen, {
            "coordinator_address": f"{name}-{job}-0-0.{name}:{_PORT}",
            "num_processes": int(seen["JOBSET_JOBS"]) * pods,
            "process_id": int(seen["JOB_INDEX"]) * pods + int(seen["JOB_COMPLETION_INDEX"]),
            "cluster_detection_method": "deactivate",
        }
    names = ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    return {name: environment[name] for name in names if name in environment}, {}


def _explicit(given: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    names = {"coordinator": COORDINATOR, "processes": PROCESS_COUNT, "rank": PROCESS_ID}
    seen = {name: environment[name] for key, name in names.items() if given[key] is None and name in environment}
    values = {key: seen.get(name) if given[key] is None else given[key] for key, name in names.items()}
    if missing := [f"{key} (or {names[key]})" for key, value in values.items() if value is None]:
        raise HostsError(f"an explicit job needs coordinator, processes and rank: missing {', '.join(missing)}.")
    count, number = (_whole_number(key, values[key]) for key in ("processes", "rank"))
    if not 0 <= number < count:
        raise HostsError(f"rank must lie in 0..{count - 1} ({count} processes): got {number}.")
    if ":" not in str(values["coordinator"]):
        raise HostsError(f"coordinator must be host:port: got {values['coordinator']!r}.")
    return seen, {
        "coordinator_address": values["coordinator"],
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def _whole_number(key: str, value: Any) -> int:
    if not str(value).isdecimal():
        raise HostsError(f"{key} must be a whole number: got {value!r}.")
    return int(value)


def _required(kind: str, names: tuple[str, ...], environment: Mapping[str, str]) -> dict[str, str]:
    if missing := [name for name in names if name not in environment]:
        raise HostsError(f"a {kind} job sets {', '.join(names)}: missing {', '.join(missing)}.")
    return {name: environment[name] for name in names}


def _abort_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    try:
        traceback.print_exception(kind, error, trace)
    finally:
        gone = _GONE.search(str(error))
        abort(1, f"another process of this job is gone ({gone[0]})" if gone else f"{kind.__name__}, see above")
