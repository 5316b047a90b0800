"""Other meshes and micro-batches for a run: each compiled, those that fit ranked by the time of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from grpo_contracts import GrpoError
from grpo_mesh import Slice, bytes_per_device, find_slice, make_mesh, slice_devices
from grpo_mesh.preflight import GIB, Measured, Verdict, measure
from grpo_sampler import ModelConfig
from grpo_trainer.assemble.blueprint import Blueprint, blueprint
from grpo_trainer.assemble.preflight.programs import judge_step, programs
from grpo_trainer.settings.schema import Settings

__all__ = ["Candidate", "candidates", "search_layouts"]

_ROWS_OF_A_SHARD = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """A layout to try.

    Args:
        dp, fsdp, tp: sizes of the mesh's axes.
        rows: of a micro-batch.
    """

    dp: int
    fsdp: int
    tp: int
    rows: int

    def apply(self, settings: Settings) -> Settings:
        """The settings with this layout."""
        loss = settings.loss.model_copy(update={"rows": self.rows})
        return settings.model_copy(update={"mesh": self.mesh, "loss": loss})

    @property
    def mesh(self) -> str:
        """As in the settings."""
        return f"dp:{self.dp},fsdp:{self.fsdp},tp:{self.tp}"

    def __str__(self) -> str:
        return f"mesh={self.mesh} loss.rows={self.rows}"


def candidates(settings: Settings, model: ModelConfig, chips: int) -> Iterator[Candidate]:
    """List the layouts whose sizes divide: fsdp before dp, few rows before many.

    Args:
        settings: of the run; a micro-batch never holds more rows than a step has sequences.
        model: `tp` must divide its heads of both kinds.
        chips: of the slice.

    Yields:
        Candidates, grouped by mesh.
    """
    sequences = settings.rollout.prompts * settings.rollout.group_size
    for tp in (n for n in range(1, chips + 1) if chips % n == 0 and model.kv_heads % n == 0):
        shards = chips // tp
        for dp in (n for n in range(1, shards + 1) if shards % n == 0):
            if model.width % (shards // dp):
                continue
            for rows in (shards * n for n in _ROWS_OF_A_SHARD if shards * n <= max(sequences, shards)):
                yield Candidate(dp, shards // dp, tp, rows)


def search_layouts(settings: Settings, model: ModelConfig, slice_name: str) -> int:
    """Compile every candidate and print those that fit, fastest first.

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
        f"search   {len(layouts)} layouts of {meshes} meshes for {target.name}; a new mesh takes about as long as a "
        "preflight, each further size of its micro-batch the time of scoring and update",
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
    rollouts: dict[str, list[Measured]] = {}
    too_many_rows: set[str] = set()
    for candidate in layouts:
        if candidate.mesh in too_many_rows:
            print(f"  skipped  {candidate}: fewer rows did not fit already", flush=True)
            continue
        try:
            plan = blueprint(candidate.apply(settings), model, make_mesh(candidate.mesh, devices))
        except GrpoError as error:
            print(f"  skipped  {candidate}: {error}", flush=True)
            continue
        state = bytes_per_device(plan.state)
        if state > target.chip.usable_bytes:
            print(f"  skipped  {candidate}: parameters and optimizer alone take {state / GIB:.1f} GiB", flush=True)
            too_many_rows.add(candidate.mesh)
            continue
        try:
            verdict = judge_step(plan, _measured(plan, candidate.mesh, rollouts), target)
        except jax.errors.JaxRuntimeError as error:
            # A layout that the compiler fails at is no reason to give up the others.
            print(f"  failed   {candidate}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(
            f"  {'fits' if verdict.fits else 'too big':7}  {candidate}: peak {verdict.peak / GIB:.2f} GiB during "
            f"{verdict.fullest.name}, step {verdict.seconds:.1f} s",
            flush=True,
        )
        if verdict.fits:
            yield candidate, verdict
        else:
            too_many_rows.add(candidate.mesh)


def _measured(plan: Blueprint, mesh: str, rollouts: dict[str, list[Measured]]) -> list[Measured]:
    """Rollouts depend on the mesh alone, so they are compiled once for all its micro-batches."""
    if mesh not in rollouts:
        rollouts[mesh] = list(measure(programs(plan, phases=("start", "rollout", "evaluation"))))
    return [*rollouts[mesh], *measure(programs(plan, phases=("scoring", "update")))]
