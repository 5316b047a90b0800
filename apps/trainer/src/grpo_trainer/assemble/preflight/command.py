"""`preflight`: does this run fit the slice it is meant for, how fast can it be there, and what to change if not."""

from __future__ import annotations

import os
from collections.abc import Iterator

from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.schema import Config

__all__ = ["preflight"]


def preflight(config: Config, *, search: bool = False) -> int:
    """Print what a run needs of every device, and whether its slices have it.

    Args:
        config: the resolved settings; `slices` names TPU slices, or is empty for the devices of this machine.
        search: try other meshes and micro-batches as well, and rank those that fit.

    Returns:
        Exit code: 0 the run fits every slice (or, with `search`, some layout does; without a slice: the prediction
        holds), 1 not.

    Raises:
        GrpoError: the run cannot be laid out on the slice, or there is no TPU compiler here.
    """
    if not config.slices:
        if search:
            raise ConfigError("preflight --search needs a slice to search for: --slice v5e-16, or slices in the config")
        from grpo_trainer.assemble.preflight.local import compare

        return compare(config)
    for line in _before_libtpu(config.slices[0]):
        print(line, flush=True)
    if search:
        from grpo_trainer.assemble.preflight.search import run_search as judge_one
    else:
        judge_one = _judge
    codes = []
    for slice_name in config.slices:
        print()
        codes.append(judge_one(config, slice_name))
    return max(codes)


def _judge(config: Config, slice_name: str) -> int:
    from grpo_mesh import find_slice, make_mesh, slice_devices
    from grpo_trainer.assemble.blueprint import blueprint, model_config
    from grpo_trainer.assemble.preflight.programs import measure
    from grpo_trainer.assemble.preflight.verdict import judge, table

    target = find_slice(slice_name)
    mesh = make_mesh(config.mesh, slice_devices(slice_name))
    plan = blueprint(config, model_config(config.model.path), mesh)
    axes = " ".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    rollout, shape = config.rollout, plan.pack_shape
    remat = ", remat" if config.model.remat else ""
    print(f"run      {config.model.path}, {config.model.dtype}, computed in {config.model.compute_dtype}{remat}")
    print(f"slice    {target.name}: {target.chips} chips ({target.topology}) on {target.hosts} hosts, mesh {axes}")
    print(f"kernels  attention {plan.attention} in training")
    print(
        f"shapes   {rollout.prompts} prompts x {rollout.group_size} samples, {config.data.max_prompt_length} + "
        f"{rollout.max_new_tokens} tokens, {plan.sampler.slots} slots; micro-batches of {shape.rows} rows x "
        f"{shape.row_length} and {shape.prompts} prompts",
        flush=True,
    )
    programs = []
    for program in measure(plan):
        programs.append(program)
        print(f"compiled {program.name} in {program.seconds:.1f} s of CPU", flush=True)
    verdict = judge(plan, programs, target)
    print(f"\n{table(verdict)}")
    return 0 if verdict.fits else 1


def _before_libtpu(slice_name: str) -> Iterator[str]:
    """Keeps libtpu from asking a cloud's metadata server which machine this is, and jax from taking real chips."""
    from grpo_mesh import find_slice

    target = find_slice(slice_name)
    size = slice_name.rpartition("-")[2]
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{target.chip.gcloud}-{size}",
    }.items():
        os.environ[name] = value
        yield f"environment  {name}={value} (preflight: the compiler alone, no chips)"
    import jax

    jax.config.update("jax_platforms", "cpu")
    # A program read from the cache would be said to compile in no time, and those for absent devices are not kept.
    jax.config.update("jax_enable_compilation_cache", False)
