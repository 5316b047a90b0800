"""libtpu as a compiler alone, on a machine without TPU chips."""

from __future__ import annotations

import os

import jax

from grpo_mesh._chips import find_slice


def compile_only(slice_name: str) -> list[str]:
    """Sets libtpu up to compile for a slice; call it before `slice_devices`.

    libtpu does not ask a cloud's metadata server which machine this is, and jax uses the CPU even where there are TPU
    chips. jax's compilation cache is switched off: it keeps no programs for absent devices, and compiling from it would
    appear to take no time.

    Args:
        slice_name: see `find_slice`.

    Returns:
        The environment variables that were set, as "NAME=value".

    Raises:
        MeshError: an unknown slice.
    """
    size = slice_name.rpartition("-")[2]
    variables = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilers may work side by side
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{find_slice(slice_name).chip.gcloud}-{size}",
    }
    os.environ.update(variables)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    return [f"{name}={value}" for name, value in variables.items()]
