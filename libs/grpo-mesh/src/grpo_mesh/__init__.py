"""Device meshes, sharding rules, many hosts and what a TPU slice can hold, for JAX trainers."""

from grpo_mesh._agree import check_agreement
from grpo_mesh._chips import CHIPS, Chip, Slice, find_slice, slice_devices
from grpo_mesh._deadline import barrier, deadline
from grpo_mesh._digest import digest
from grpo_mesh._errors import DeadlineError, HostsError, MeshError, RenderError
from grpo_mesh._explain import Explanation, Placement, bytes_per_device, explain
from grpo_mesh._hosts import Job, abort, initialize
from grpo_mesh._mesh import AXES, BATCH_AXES, batch_sharding, make_mesh, parse_mesh, replicated, reshape_mesh
from grpo_mesh._move import local_rows, reshard, to_global, to_host, to_local
from grpo_mesh._pad import pad, unpad
from grpo_mesh._preemption import EXIT_PREEMPTED, Preemption, preemption
from grpo_mesh._render import Launch, render_gcloud, render_jobset, render_slurm
from grpo_mesh._report import Collectives, CompileReport, compile_report, compile_with_text
from grpo_mesh._rules import Rules, shardings, state_shardings
from grpo_mesh._startup import force_cpu_devices, has_huge_pages, restart_with_huge_pages, use_compilation_cache
from grpo_mesh._supervised import SupervisedProcess

__all__ = [
    "AXES",
    "BATCH_AXES",
    "CHIPS",
    "EXIT_PREEMPTED",
    "Chip",
    "Collectives",
    "CompileReport",
    "DeadlineError",
    "Explanation",
    "HostsError",
    "Job",
    "Launch",
    "MeshError",
    "Placement",
    "Preemption",
    "RenderError",
    "Rules",
    "Slice",
    "SupervisedProcess",
    "abort",
    "barrier",
    "batch_sharding",
    "bytes_per_device",
    "check_agreement",
    "compile_report",
    "compile_with_text",
    "deadline",
    "digest",
    "explain",
    "find_slice",
    "force_cpu_devices",
    "has_huge_pages",
    "initialize",
    "local_rows",
    "make_mesh",
    "pad",
    "parse_mesh",
    "preemption",
    "render_gcloud",
    "render_jobset",
    "render_slurm",
    "replicated",
    "reshape_mesh",
    "reshard",
    "restart_with_huge_pages",
    "shardings",
    "slice_devices",
    "state_shardings",
    "to_global",
    "to_host",
    "to_local",
    "unpad",
    "use_compilation_cache",
]
