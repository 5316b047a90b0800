"""Memory of one policy update on a device of a TPU slice, by the limit on new tokens. No TPU is needed.

    hatch run tpu:memory --config qwen2.5-3b --lengths 2048 8192 32256 --set mesh=dp:1,fsdp:-1,tp:1

Each device has one row of a micro-batch, which holds one completion of that limit. 32,256 is the longest completion
that a context of 32,768 leaves behind a prompt of 512.
"""

import argparse

from grpo_gsm8k.task import TASK
from grpo_mesh import find_slice, make_mesh, slice_devices
from grpo_mesh.preflight import GIB, compile_only
from grpo_trainer.assemble.blueprint import blueprint
from grpo_trainer.assemble.policy import model_config
from grpo_trainer.assemble.preflight.apart import Compilers
from grpo_trainer.assemble.preflight.programs import programs
from grpo_trainer.settings.layers import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="qwen2.5-3b", help="a preset")
    parser.add_argument("--slice", default="v6e-8", help="such as v6e-8")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32256], help="limits on new tokens")
    parser.add_argument("--set", dest="sets", nargs="+", default=[], help="settings, as for preflight")
    options = parser.parse_args()
    compile_only(options.slice)
    usable = find_slice(options.slice).chip.usable_bytes / GIB
    for length in options.lengths:
        print(f"{length:6d} tokens: {update(options, length)} of {usable:.2f} GiB", flush=True)


def update(options: argparse.Namespace, length: int) -> str:
    """Schedule the update for this limit and describe its memory on a device."""
    mesh = make_mesh(load(TASK, [options.config], options.sets).mesh, slice_devices(options.slice))
    rows = mesh.shape["dp"] * mesh.shape["fsdp"]
    sizes = [f"rollout.max_new_tokens={length}", f"loss.row_length={length}", f"loss.rows={rows}", "loss.sizes=1"]
    settings = load(TASK, [options.config], [*sizes, *options.sets])
    plan = blueprint(settings, model_config(settings.model.path, TASK.policies), mesh)
    with Compilers(plan.model, options.slice) as compilers:
        (program,) = compilers.measure(list(programs(plan, phases=("update",))), settings)
    if program.report is None:
        return f"refused, {program.refused / GIB:.1f}"
    figures = {"arguments": program.report.arguments, "temporaries": program.report.temporaries}
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in figures.items())
    kernels = ", ".join(f"{name} {calls:.0f}" for name, calls in program.work.kernels.items()) or "none"
    return (
        f"scheduled in {program.seconds:.0f} s of CPU; kernels {kernels}; {program.work.flops / 1e12:.1f} TFLOP; "
        f"{shown}, together {program.peak / GIB:.2f}"
    )


if __name__ == "__main__":
    main()
