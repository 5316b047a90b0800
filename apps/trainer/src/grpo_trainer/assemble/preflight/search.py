"""Other meshes and micro-batches for a run: those that may fit are compiled, those that fit ranked by their time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from grpo_contracts import GrpoError
from grpo_mesh import Slice, bytes_per_device, find_slice, make_mesh, slice_devices
from grpo_mesh.preflight import GIB, Measured, Verdict, measure
from grpo_sampler import ModelConfig, decoding_sizes
from grpo_trainer.assemble.blueprint import Blueprint, blueprint
from grpo_trainer.assemble.preflight.programs import judge_step, programs
from grpo_trainer.settings.schema import Settings

__all__ = ["Candidate", "candidates", "search_layouts"]

_ROWS_OF_A_SHARD = (1, 2, 4, 8)
_DECODING = ("rollout", "evaluation")  # phases that run on the rollout mesh


@dataclass(frozen=True)
class Candidate:
    """A layout to try.

    Args:
        dp, fsdp, tp: sizes of the mesh's axes.
        rows: of a micro-batch.
        rollout_tp: of the rollout mesh, whose other devices spread the sequences.
    """

    dp: int
    fsdp: int
    tp: int
    rows: int
    rollout_tp: int

    def apply(self, settings: Settings) -> Settings:
        """The settings with this layout."""
        loss = settings.loss.model_copy(update={"rows": self.rows})
        rollout = settings.rollout.model_copy(update={"mesh": self.rollout_mesh})
        return settings.model_copy(update={"mesh": self.mesh, "rollout": rollout, "loss": loss})

    @property
    def mesh(self) -> str:
        """As in the settings."""
        return f"dp:{self.dp},fsdp:{self.fsdp},tp:{self.tp}"

    @property
    def rollout_mesh(self) -> str:
        """As in the settings: empty where the training mesh splits decoding as well."""
        if self.rollout_tp == self.tp:
            return ""
        return f"dp:{self.dp * self.fsdp * self.tp // self.rollout_tp},tp:{self.rollout_tp}"

    def __str__(self) -> str:
        rollout = f" rollout.mesh={self.rollout_mesh}" if self.rollout_mesh else ""
        return f"mesh={self.mesh} loss.rows={self.rows}{rollout}"


def candidates(settings: Settings, model: ModelConfig, chips: int) -> Iterator[Candidate]:
    """List the layouts whose sizes divide: fsdp before dp, few rows before many, small `tp` of rollouts before large.

    Args:
        settings: of the run; a micro-batch never holds more rows than a step has sequences.
        model: `tp` must divide its heads of both kinds; that of rollouts may repeat the key/value heads.
        chips: of the slice.

    Yields:
        Candidates, grouped by mesh.
    """
    sequences = settings.rollout.prompts * settings.rollout.group_size
    slots = (settings.rollout.slots or sequences, settings.eval.slots)
    rollouts = [n for n in decoding_sizes(model, chips) if all(count % (chips // n) == 0 for count in slots)]
    for tp in (n for n in range(1, chips + 1) if chips % n == 0 and model.kv_heads % n == 0):
        shards = chips // tp
        for dp in (n for n in range(1, shards + 1) if shards % n == 0):
            if model.width % (shards // dp):
                continue
            for rows in (shards * n for n in _ROWS_OF_A_SHARD if shards * n <= max(sequences, shards)):
                for rollout_tp in sorted({tp, *rollouts}):
                    yield Candidate(dp, shards // dp, tp, rows, rollout_tp)


def search_layouts(settings: Settings, model: ModelConfig, slice_name: str) -> int:
    """Compile every candidate that may fit and print those that do, fastest first.

    Args:
        settings: resolved.
        model: dimensions of the policy.
        slice_name: the slice to find layouts for.

    Returns:
        0 if any fits, 1 if none does.
    """
    target, devices = find_slice(slice_name), slice_devices(slice_name)
    layouts = list(candidates(settings, model, target.chips))
    meshes = len({layout.mesh for layout in layouts})
    print(
        f"search   {len(layouts)} layouts of {meshes} meshes for {target.name}; scoring and update are compiled once "
        "for each mesh and size of its micro-batch, decoding once for each tp of rollouts",
        flush=True,
    )
    fitting = list(_fitting(settings, model, target, devices, layouts))
    if not fitting:
        print(f"nothing fits {target.name}: take more chips, fewer rollout.slots, or a smaller model")
        return 1
    print(f"\n{len(fitting)} layouts fit {target.name}, fastest first (expected seconds of a step at its limits):")
    for candidate, verdict in sorted(fitting, key=lambda pair: pair[1].seconds):
        print(f"  {verdict.seconds:7.1f} s  {verdict.peak / GIB:6.2f} GiB  {candidate}")
    return 0


def _fitting(
    settings: Settings, model: ModelConfig, target: Slice, devices: Sequence[Any], layouts: Sequence[Candidate]
) -> Iterator[tuple[Candidate, Verdict]]:
    """Try each layout, print a line on it, and yield it if it fits."""
    compiled: dict[tuple, Measured] = {}
    hopeless: set[tuple] = set()
    for candidate in layouts:
        of_mesh, of_rollout = (candidate.mesh,), (candidate.mesh, candidate.rollout_tp)
        if hopeless & {of_mesh, of_rollout}:
            print(f"  skipped  {candidate}: less did not fit already", flush=True)
            continue
        try:
            plan = blueprint(candidate.apply(settings), model, make_mesh(candidate.mesh, devices))
        except GrpoError as error:
            print(f"  skipped  {candidate}: {error}", flush=True)
            continue
        for what, held, those in (
            ("parameters and optimizer", bytes_per_device(plan.state), of_mesh),
            ("parameters, optimizer, decoding weights and cache", _rollout_bytes(plan), of_rollout),
        ):
            if held > target.chip.usable_bytes:
                print(f"  skipped  {candidate}: {what} alone take {held / GIB:.1f} GiB", flush=True)
                hopeless.add(those)
                break
        else:
            try:
                verdict = judge_step(plan, _measured(plan, candidate, compiled), target)
            except jax.errors.JaxRuntimeError as error:
                # A layout that the compiler fails at is no reason to give up the others.
                print(f"  failed   {candidate}: {str(error).splitlines()[0]}", flush=True)
                continue
            print(
                f"  {'fits' if verdict.fits else 'too big':7}  {candidate}: peak {verdict.peak / GIB:.2f} GiB during "
                f"{verdict.fullest.name}, step {verdict.seconds:.1f} s, at best {verdict.best:.1f} s",
                flush=True,
            )
            if verdict.fits:
                yield candidate, verdict
            else:
                hopeless.add(of_rollout if verdict.fullest.phase in _DECODING else of_mesh)


def _rollout_bytes(plan: Blueprint) -> int:
    """Bytes that a device holds at least while it decodes."""
    rollout, network = plan.settings.rollout, plan.network(plan.state.params, *plan.frozen)
    streaming = rollout.prompts * rollout.group_size > plan.sampler.slots
    decoding = plan.sampler.allocation(network, group_size=rollout.group_size, streaming=streaming)
    return bytes_per_device((plan.state, plan.frozen, plan.reference, decoding))


def _measured(plan: Blueprint, candidate: Candidate, compiled: dict[tuple, Measured]) -> list[Measured]:
    """A run's programs; those that other candidates compiled already are taken from there."""
    measured: dict[str, Measured] = {}
    for program in programs(plan):
        if program.phase == "start":
            key: tuple = (program.name, candidate.mesh)
        elif program.name == "weights":
            key = (program.name, candidate.mesh, candidate.rollout_tp)
        elif program.phase in _DECODING:
            key = (program.name, candidate.rollout_tp)
        else:
            key = (program.name, candidate.mesh, candidate.rows)
        beside = program.beside(measured) if callable(program.beside) else program.beside
        if key not in compiled:
            [compiled[key]] = measure([replace(program, beside=beside)])
        measured[program.name] = replace(compiled[key], beside=beside)
    return list(measured.values())
