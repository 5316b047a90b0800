"""`preflight`: does this run fit the slice it is meant for, how fast can it be there, and what to change if not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from grpo_contracts import PolicyVersion, Rollout
from grpo_loss import TrainState
from grpo_mesh import find_slice, make_mesh, slice_devices
from grpo_mesh.preflight import (
    Comparison,
    Measured,
    Peak,
    Verdict,
    compile_only,
    measure,
    measure_peak,
    programs_table,
    table,
)
from grpo_sampler import ModelConfig
from grpo_trainer.assemble.blueprint import Blueprint, blueprint
from grpo_trainer.assemble.policy import model_config
from grpo_trainer.assemble.preflight.advice import advice
from grpo_trainer.assemble.preflight.apart import Compilers
from grpo_trainer.assemble.preflight.floor import least_rollout, least_update
from grpo_trainer.assemble.preflight.programs import generate_code, judge_step, memory_rows, programs
from grpo_trainer.assemble.preflight.search import search_layouts
from grpo_trainer.assemble.run import Run, assemble
from grpo_trainer.learn import learn, make_batch
from grpo_trainer.rewards.scoring import transcribe
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Task
from grpo_trainer.train import sample

__all__ = ["TOLERANCE", "preflight", "report"]

TOLERANCE = 0.25  # a prediction that is further off is no use for planning, and preflight fails


def preflight(settings: Settings, task: Task, *, search: bool = False, quick: bool = False) -> int:
    """Print what a run needs of every device, and whether its slices have it.

    Args:
        settings: resolved; `slices` names TPU slices, or is empty for the devices of this machine.
        task: what is learned.
        search: try other meshes, rollout meshes and micro-batches as well, and rank those that fit.
        quick: do not generate code, which takes most of the time: see `grpo_mesh.preflight.measure(code=False)`.

    Returns:
        Exit code: 0 the run fits every slice (or, with `search`, some layout does; without a slice: the prediction
        holds), 1 not.

    Raises:
        GrpoError: the run cannot be laid out on the slice, or there is no TPU compiler here.
    """
    if not settings.slices:
        if search:
            raise ConfigError("preflight --search needs a slice to search for: --slice v5e-16, or slices in the config")
        if quick:
            raise ConfigError("preflight --quick needs a slice to compile for: --slice v5e-16, or slices in the config")
        return _compare_with_measured(assemble(settings, task))
    for variable in compile_only(settings.slices[0]):
        print(f"environment  {variable} (preflight: the compiler alone, no chips)", flush=True)
    model = model_config(settings.model.path, task.policies)
    compile_for = search_layouts if search else _compile_for
    codes = []
    for slice_name in settings.slices:
        print()
        codes.append(compile_for(settings, model, slice_name, quick=quick))
    return max(codes)


def report(plan: Blueprint, verdict: Verdict) -> str:
    """Format the tables and the verdict on a run.

    Args:
        plan: the run.
        verdict: on its programs.

    Returns:
        Text of many lines.
    """
    return table(
        verdict,
        memory_rows=memory_rows(plan, verdict.programs),
        assumption="every completion at its limit",
        advice=advice(plan, verdict),
    )


def _compile_for(settings: Settings, model: ModelConfig, slice_name: str, *, quick: bool) -> int:
    target = find_slice(slice_name)
    plan = blueprint(settings, model, make_mesh(settings.mesh, slice_devices(slice_name)))
    axes, decoding = (
        " ".join(f"{axis}:{size}" for axis, size in mesh.shape.items()) for mesh in (plan.mesh, plan.rollout_mesh)
    )
    sampling = f", sampling on {decoding}" if decoding != axes else ""
    rollout, shape = settings.rollout, plan.pack_shape
    remat = ", remat" if settings.model.remat else ""
    print(f"run      {settings.model.path}, {settings.model.dtype}, computed in {settings.model.compute_dtype}{remat}")
    print(
        f"slice    {target.name}: {target.chips} chips ({target.topology}) on {target.hosts} hosts, "
        f"mesh {axes}{sampling}"
    )
    print(f"kernels  attention {plan.attention} in training")
    print(
        f"shapes   {rollout.prompts} prompts x {rollout.group_size} samples, {settings.data.max_prompt_length} + "
        f"{rollout.max_new_tokens} tokens, {plan.sampler.slots} slots; micro-batches of {shape.rows} rows x "
        f"{shape.row_length} and {shape.prompts} prompts"
    )
    least = [
        least_update(settings, plan.model, target, **{axis: plan.mesh.shape[axis] for axis in ("dp", "fsdp", "tp")}),
        least_rollout(settings, plan.model, target, tp=plan.rollout_mesh.shape["tp"]),
    ]
    parts = ", ".join(f"{phase.name} {phase.bound:.2f} s ({phase.limit})" for phase in least)
    print(f"floor    {sum(phase.bound for phase in least):.2f} s a step at best, by arithmetic: {parts}", flush=True)
    measured = []
    with Compilers(model, slice_name) as compilers:
        for program in compilers.measure(list(programs(plan)), settings):
            measured.append(program)
            print(f"scheduled {program.name} in {program.seconds:.1f} s of CPU", flush=True)
    verdict = judge_step(plan, measured, target)
    print(f"\n{report(plan, verdict)}", flush=True)
    if verdict.fits and not quick:
        print()
        verdict = generate_code(plan, target)
    return 0 if verdict.fits else 1


def _compare_with_measured(run: Run) -> int:
    """Compile the run's programs for this machine, take real steps, and print how far the prediction was off."""
    for line in run.description:
        print(line, flush=True)
    measured = list(measure(programs(run.plan, phases=("start", "rollout", "scoring", "update"))))
    print(f"\n{programs_table(measured)}\n", flush=True)
    comparisons = _comparisons(run, measured)
    if not comparisons:
        device = run.plan.device
        print(f"measured: {sys.platform} tells no peak memory of a {device}, so there is nothing to compare with")
        return 0
    for comparison in comparisons:
        print(comparison)
    worst = max(comparisons, key=lambda comparison: abs(comparison.error))
    close = abs(worst.error) <= TOLERANCE
    print(f"prediction {'holds' if close else 'IS OFF'}: worst error {worst.error:+.1%}, bound {TOLERANCE:.0%}")
    return 0 if close else 1


def _comparisons(run: Run, measured: Sequence[Measured]) -> list[Comparison]:
    sampler, devices = run.plan.sampler, len(run.plan.mesh.local_devices)
    predicted = {
        name: devices * max(program.peak for program in measured if program.phase in phases)
        for name, phases in (("rollout", ("rollout",)), ("update", ("scoring", "update")))
    }
    # Whatever compiles in the background would be measured too: decoding is compiled for every size of a draining batch
    # first, the rest in step 0, and a step that met something new after all is no measurement.
    sampler.warmup(run.state.params, group_sizes=(run.settings.rollout.group_size,))
    state, step = run.state, 0
    while True:
        compiled = sampler.compile_count
        rollout, update = _measured_step(run, state, step)
        if rollout.bytes is None or update.bytes is None:
            return []
        if update.scope == "process":
            return [Comparison("both", max(predicted.values()), update.bytes)]
        if sampler.compile_count == compiled and step:
            return [
                Comparison("rollout", predicted["rollout"], rollout.bytes),
                Comparison("update", predicted["update"], update.bytes),
            ]
        (state, _), step = update.result, step + 1


def _measured_step(
    run: Run, state: TrainState, step: int
) -> tuple[Peak[Rollout], Peak[tuple[TrainState, dict[str, float]]]]:
    """Take one step of training, and measure its rollout and its updates."""
    devices, batch = run.plan.mesh.local_devices, next(run.problems)
    sampled = measure_peak(lambda: sample(run, state.params, batch, PolicyVersion(step, "")), devices)
    rollout = sampled.result
    scored = run.rewards.score(rollout, transcribe(rollout, batch.problems, run.tokenizer, run.settings.rollout.stop))

    def update() -> tuple[TrainState, dict[str, float]]:
        return learn(run, state, make_batch(run, state.params, scored), step)

    return sampled, measure_peak(update, devices)
