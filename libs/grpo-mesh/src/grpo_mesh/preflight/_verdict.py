"""Memory against what a chip offers, the time of a step by phase, and a verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from grpo_mesh._chips import Slice, find_slice
from grpo_mesh._errors import MeshError
from grpo_mesh.preflight._programs import Measured
from grpo_mesh.preflight._work import Work

# Shares of the chip's peaks at which a step's time is estimated: matrix products, main memory, links between chips.
EFFICIENCY = {"compute": 0.5, "memory": 0.7, "network": 0.7}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Seconds of one phase of a step, each as if it were the only limit and the chip ran at its peak.

    Args:
        name: of the phase.
        work: of one device.
        compute: seconds of arithmetic.
        memory: seconds of memory traffic.
        network: seconds of collectives.
    """

    name: str
    work: Work
    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> float:
        """Seconds that no run can beat: the slowest of the three, at peak and fully overlapped."""
        return max(self.compute, self.memory, self.network)

    @property
    def expected(self) -> float:
        """Seconds at `EFFICIENCY`: arithmetic and memory traffic overlap; collectives overlap with neither."""
        return (
            max(self.compute / EFFICIENCY["compute"], self.memory / EFFICIENCY["memory"])
            + self.network / EFFICIENCY["network"]
        )

    @property
    def limit(self) -> str:
        """Which of the three takes longest."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a set of programs fits a slice.

    Args:
        programs: all of them.
        target: the slice.
        phases: of a step, those that compute anything.
        peak: bytes of the fullest moment on a device.
        fullest: the program of that moment.
        tokens: that a step processes; None if the caller did not say.
    """

    programs: tuple[Measured, ...]
    target: Slice
    phases: tuple[Phase, ...]
    peak: int
    fullest: Measured
    tokens: float | None

    @property
    def fits(self) -> bool:
        """Whether every program was compiled and the fullest moment is within what the chip lets a program use."""
        return self.peak <= self.target.chip.usable_bytes and all(program.report for program in self.programs)

    @property
    def seconds(self) -> float:
        """Expected seconds of a step."""
        return sum(phase.expected for phase in self.phases)

    @property
    def best(self) -> float:
        """Seconds of a step that no run can beat."""
        return sum(phase.bound for phase in self.phases)


def judge(
    measured: Sequence[Measured],
    target: Slice,
    *,
    phases: Sequence[str] | None = None,
    tokens: float | None = None,
) -> Verdict:
    """Adds up what the programs need and do.

    Args:
        measured: from `measure`; all must fit.
        target: the slice they are meant for.
        phases: those that make up a step, in order; None: all, in the order of the programs. A phase without programs
            or without arithmetic is left out.
        tokens: that a step processes, for the throughput.

    Returns:
        The verdict.

    Raises:
        MeshError: there are no programs, or none of them belongs to any of the phases.
    """
    if not measured:
        raise MeshError("judge needs at least one measured program: got none.")
    present = list(dict.fromkeys(program.phase for program in measured))
    if phases is not None and not set(phases) & set(present):
        raise MeshError(f"phases must name some of the programs' ({', '.join(present)}): got {', '.join(phases)}.")
    timed = []
    for name in present if phases is None else phases:
        work = sum((program.work for program in measured if program.phase == name), Work())
        if work.flops:
            chip = target.chip
            timed.append(
                Phase(
                    name,
                    work,
                    work.flops / chip.flops,
                    work.traffic / chip.hbm_bandwidth,
                    work.network / chip.ici_bandwidth,
                )
            )
    fullest = max(measured, key=lambda program: program.peak)
    return Verdict(tuple(measured), target, tuple(timed), fullest.peak, fullest, tokens)


def larger_slice(target: Slice, times: float) -> str | None:
    """Finds the next larger slice of the same chip that is rented.

    Args:
        target: the slice that is too small.
        times: how many times its memory is needed; at least twice the chips are taken.

    Returns:
        The slice's name, or None if no such slice has up to 256 chips.
    """
    chips = target.chips * 2 ** max(1, math.ceil(math.log2(times)))
    while chips <= 256:
        try:
            return find_slice(f"{target.chip.name}-{chips * (2 if target.chip.names_cores else 1)}").name
        except MeshError:
            chips *= 2
    return None
