"""Predicted against measured peak memory on the devices at hand: what a prediction for a slice is worth."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from grpo_contracts import PolicyIdentity, TrainBatch
from grpo_mesh import digest
from grpo_trainer.assemble.blueprint import blueprint, model_config
from grpo_trainer.assemble.preflight.programs import Measured, measure
from grpo_trainer.assemble.preflight.verdict import programs_table
from grpo_trainer.assemble.run import Assembly, assemble
from grpo_trainer.learn import advantages, learn
from grpo_trainer.settings.schema import Config

__all__ = ["Comparison", "compare"]

# Errors of a prediction above this share make preflight fail: planning by it would be guessing.
TOLERANCE = 0.25
_MMAP_THRESHOLD, _SMALLEST_MAPPED = -3, 64 * 1024  # malloc.h
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured peak of one phase, bytes over all devices of this process."""

    phase: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        return (
            f"{self.phase:9} predicted {self.predicted / 2**20:8.1f} MiB, measured {self.measured / 2**20:8.1f} MiB: "
            f"error {self.error:+.1%}"
        )


def compare(config: Config) -> int:
    """Compile the run's programs for this machine, take real steps, and print how far the prediction was off.

    Args:
        config: the resolved settings, without a slice.

    Returns:
        0 if every error is within `TOLERANCE`, 1 otherwise.
    """
    run = assemble(config)
    for line in run.description:
        print(line, flush=True)
    plan = blueprint(config, model_config(config.model.path), run.mesh)
    programs = list(measure(plan, phases=("start", "rollout", "scoring", "update")))
    print(f"\n{programs_table(programs)}\n", flush=True)
    comparisons = _compared(run, programs)
    if not comparisons:
        print(f"measured: {sys.platform} tells no peak memory of a {run.device}, so there is nothing to compare with")
        return 0
    for comparison in comparisons:
        print(comparison)
    worst = max(comparisons, key=lambda comparison: abs(comparison.error))
    close = abs(worst.error) <= TOLERANCE
    print(f"prediction {'holds' if close else 'IS OFF'}: worst error {worst.error:+.1%}, bound {TOLERANCE:.0%}")
    return 0 if close else 1


def _compared(run: Assembly, programs: list[Measured]) -> list[Comparison]:
    devices = len(run.mesh.local_devices)
    predicted = {
        name: devices * max(program.peak for program in programs if program.phase in phases)
        for name, phases in (("rollout", ("rollout",)), ("update", ("scoring", "update")))
    }
    statistics = run.mesh.local_devices[0].memory_stats()
    if statistics is None and not _RESET.exists():
        return []
    # All sizes of a draining batch at once: a compiler at work in the background would be measured as the rollout's.
    run.sampler.warmup(run.state.params, group_sizes=(run.config.rollout.group_size,))
    state, _, _ = _step(run, run.state, 0, lambda phase, work: work())
    if statistics is not None:
        peak = sum(device.memory_stats()["peak_bytes_in_use"] for device in run.mesh.local_devices)
        return [Comparison("both", max(predicted.values()), peak)]
    # The first step compiled everything; what the compiler left behind is given back before the second is measured.
    _unpooled()
    measured: dict[str, int] = {}

    def watched(phase: str, work: Callable[[], Any]) -> Any:
        _trim()
        before, held = _status("VmRSS"), _held()
        _RESET.write_text("5")  # the peak starts again from here
        result = jax.block_until_ready(work())
        measured[phase] = _status("VmHWM") - before + held
        return result

    # A draining batch may meet a size for the first time; a compiler at work would be measured as the rollout's.
    for step in itertools.count(1):
        compiled = run.sampler.compile_count
        state, _, _ = _step(run, state, step, watched)
        if run.sampler.compile_count == compiled:
            break
    return [Comparison(name, predicted[name], measured[name]) for name in predicted]


def _step(run: Assembly, state: Any, step: int, watched: Callable[[str, Callable[[], Any]], Any]) -> Any:
    """One step of training, whose two phases that use the devices pass through `watched`."""
    config, asked = run.config, next(run.problems)
    policy = PolicyIdentity(step, digest(state.params))
    rollout = watched(
        "rollout",
        lambda: run.sampler.generate(
            state.params,
            asked.prompts,
            group_size=config.rollout.group_size,
            seed=config.seed,
            step=step,
            policy=policy,
        ),
    )
    scored = run.rewards.score(rollout, asked)
    batch = TrainBatch(scored, advantages(scored, config))
    state, learned = watched("update", lambda: learn(run, state, batch, step))
    return state, learned, rollout


def _held() -> int:
    """Bytes of all live arrays of this process."""
    return sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _unpooled() -> None:
    """Has glibc map every array by itself: kept in its pools, freed ones would count as used, with the gaps between."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _SMALLEST_MAPPED)


def _trim() -> None:
    """Has glibc give back what was freed: counted as used already, it would hide what the next phase takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
