"""Manifests and scripts that start one job on existing engines: Kubernetes JobSet, gcloud TPU VMs, Slurm."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_mesh._chips import Slice, find_slice
from grpo_mesh._errors import RenderError

_RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One job, whichever engine runs it.

    Args:
        name: of the job and of what is rented for it; lower-case letters, digits and dashes.
        command: program and arguments, the same on every host.
        slice: TPU slice, such as "v5e-16"; None for GPUs.
        gpus: total number of GPUs; 0 for a TPU slice.
        slices: number of such TPU slices.
        gpus_per_host: GPUs of one host.
        image: container image (JobSet).
        namespace: Kubernetes namespace.
        max_restarts: how often a JobSet restarts after a failure; the run resumes from its checkpoint.
        project: Google Cloud project (gcloud).
        zone: Google Cloud zone (gcloud).
        runtime: TPU VM image; None takes the chip's.
        setup: shell lines to run on every host before the command (gcloud, Slurm).
        partition: Slurm partition.
        account: Slurm account.
        time: Slurm time limit, such as "04:00:00".
        env: environment variables of the command.
    """

    name: str
    command: Sequence[str]
    slice: str | None = None
    gpus: int = 0
    slices: int = 1
    gpus_per_host: int = 8
    image: str | None = None
    namespace: str = "default"
    max_restarts: int = 0
    project: str | None = None
    zone: str | None = None
    runtime: str | None = None
    setup: Sequence[str] = ()
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise RenderError(
                f"name must be lower-case letters, digits and dashes, 40 at most, beginning with a letter: "
                f"got {self.name!r}."
            )
        if isinstance(self.command, str) or not self.command or not all(isinstance(part, str) for part in self.command):
            raise RenderError(f'command must be a list of strings, as ["python", "train.py"]: got {self.command!r}.')
        if (self.slice is None) == (self.gpus == 0):
            raise RenderError(f"exactly one of slice and gpus must be given: got {self.slice!r} and {self.gpus}.")
        partly = self.gpus > self.gpus_per_host and self.gpus % max(1, self.gpus_per_host)
        if self.gpus_per_host < 1 or self.gpus < 0 or partly:
            raise RenderError(f"gpus must fill hosts of gpus_per_host = {self.gpus_per_host}: got {self.gpus}.")
        if self.slices < 1 or (self.gpus and self.slices != 1):
            raise RenderError(f"slices must be positive, and 1 for GPUs: got {self.slices}.")

    @property
    def tpu(self) -> Slice | None:
        """The slice, None for GPUs."""
        return None if self.slice is None else find_slice(self.slice)


def read_launch(settings: Mapping[str, Any]) -> Launch:
    """Makes a `Launch` from the table of a TOML file.

    Raises:
        RenderError: an unknown or missing key, or a wrong value.
    """
    known = {field.name for field in dataclasses.fields(Launch)}
    if unknown := sorted(set(settings) - known):
        raise RenderError(f"unknown key {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    if missing := sorted({"name", "command"} - set(settings)):
        raise RenderError(f"missing key {', '.join(missing)}.")
    return Launch(**settings)


def render_jobset(launch: Launch) -> str:
    """Renders a Kubernetes JobSet (jobset.x-k8s.io/v1alpha2) for TPU slices on GKE or for GPU hosts.

    Raises:
        RenderError: the image is missing.
    """
    if launch.image is None:
        raise RenderError("a JobSet needs image, the container to run.")
    return _yaml(jobset(launch))


def jobset(launch: Launch) -> dict[str, Any]:
    """Builds the JobSet as a tree: one Job per slice, one pod per host, one container per pod."""
    tpu = launch.tpu
    gpus = min(launch.gpus, launch.gpus_per_host)
    pods = tpu.hosts if tpu else max(1, launch.gpus // launch.gpus_per_host)
    devices = {"google.com/tpu": tpu.chips_per_host} if tpu else {"nvidia.com/gpu": gpus}
    container: dict[str, Any] = {
        "name": "worker",
        "image": launch.image,
        "command": list(launch.command),
        "env": _jobset_env(launch, pods),
        "ports": [{"containerPort": 8476 if tpu is None else 8471}],
        "resources": {"limits": devices, "requests": devices},
        # Host memory for the collectives of GPUs and for data workers.
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    metadata: dict[str, Any] = {"name": launch.name, "namespace": launch.namespace}
    if tpu:
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": tpu.chip.accelerator,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
        }
        # One Job on one node pool, that is on one slice.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    # One lost host ends the job, because the others could only wait. With backoffLimit 0 the JobSet decides.
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": launch.max_restarts},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": "workers", "replicas": launch.slices, "template": {"spec": job}}],
        },
    }


def _jobset_env(launch: Launch, pods: int) -> list[dict[str, Any]]:
    """For GPUs, what `initialize` reads from the pod's annotations; on GKE the TPU runtime knows the ranks itself."""
    env: list[dict[str, Any]] = [{"name": name, "value": str(value)} for name, value in launch.env.items()]
    if launch.tpu:
        return env
    for name, key in (
        ("JOBSET_NAME", "jobset-name"),
        ("REPLICATED_JOB_NAME", "replicatedjob-name"),
        ("JOB_INDEX", "job-index"),
    ):
        path = f"metadata.annotations['jobset.sigs.k8s.io/{key}']"
        env.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
    return [*env, {"name": "JOBSET_JOBS", "value": "1"}, {"name": "JOBSET_PODS", "value": str(pods)}]


def render_gcloud(launch: Launch) -> str:
    """Renders a shell script that rents a slice with gcloud, runs the command on every host, and deletes the slice.

    Raises:
        RenderError: GPUs or several slices, or the project or zone is missing.
    """
    tpu = launch.tpu
    if tpu is None or launch.slices != 1:
        raise RenderError("gcloud tpu-vm rents one TPU slice: give slice and leave slices at 1 (or use jobset).")
    if launch.project is None or launch.zone is None:
        raise RenderError("gcloud needs project and zone.")
    size = tpu.name.partition("-")[2]
    where = f"--project={shlex.quote(launch.project)} --zone={shlex.quote(launch.zone)}"
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in launch.env.items()]
    remote = "\n".join(["set -e", *launch.setup, *exports, shlex.join(launch.command)])
    return f"""#!/usr/bin/env bash
# {launch.name}: {tpu.name}, {tpu.chips} chips on {tpu.hosts} host(s). Rendered by grpo_mesh.render.
set -euo pipefail
tpu() {{ gcloud compute tpus tpu-vm "$1" {launch.name} {where} "${{@:2}}"; }}

tpu create --accelerator-type={tpu.chip.gcloud}-{size} --version={launch.runtime or _RUNTIMES[tpu.chip.name]}
trap 'tpu delete --quiet' EXIT
# On all workers: a job started on worker 0 alone would wait for the others.
tpu ssh --worker=all --command={shlex.quote(remote)}
"""


def render_slurm(launch: Launch) -> str:
    """Renders a Slurm batch script, one task per GPU.

    Raises:
        RenderError: a TPU slice.
    """
    if launch.tpu:
        raise RenderError("slurm runs GPU jobs: give gpus instead of slice.")
    hosts = max(1, launch.gpus // launch.gpus_per_host)
    per_host = min(launch.gpus, launch.gpus_per_host)
    options = {
        "job-name": launch.name,
        "nodes": hosts,
        "ntasks-per-node": per_host,
        "gpus-per-node": per_host,
        "partition": launch.partition,
        "account": launch.account,
        "time": launch.time,
        "output": "%x-%j.log",
        "signal": "TERM@120",  # two minutes before the end: time for a checkpoint
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in launch.env.items()]
    run = f"srun --kill-on-bad-exit=1 --label {shlex.join(launch.command)}"
    return "\n".join(["#!/usr/bin/env bash", *lines, "set -euo pipefail", *launch.setup, *exports, run, ""])


def _yaml(value: Any, indent: str = "") -> str:
    """Writes a tree of dictionaries, lists and scalars as YAML; strings are quoted, so none is misread."""
    if isinstance(value, Mapping) and value:
        return "".join(
            f"{indent}{key if _plain(key) else json.dumps(key)}:{_nested(item, indent)}" for key, item in value.items()
        )
    if isinstance(value, list) and value:
        return "".join(f"{indent}-{_nested(item, indent, compact=True)}" for item in value)
    return f"{indent}{json.dumps(value)}\n"


def _nested(value: Any, indent: str, compact: bool = False) -> str:
    if not isinstance(value, (Mapping, list)) or not value:
        return " " + _yaml(value)
    inner = _yaml(value, indent + "  ")
    return " " + inner.removeprefix(indent + "  ") if compact else "\n" + inner


def _plain(key: str) -> bool:
    return re.fullmatch(r"[A-Za-z][\w./-]*", key) is not None
