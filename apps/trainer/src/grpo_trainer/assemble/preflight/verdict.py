"""What compiled programs say about a run: memory against the chip's, time by phase, a verdict and what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mesh import MeshError, Slice, find_slice
from grpo_trainer.assemble.blueprint import Blueprint, bytes_per_device
from grpo_trainer.assemble.preflight.programs import Measured
from grpo_trainer.assemble.preflight.work import Work

__all__ = ["EFFICIENCY", "GIB", "Phase", "Verdict", "judge", "programs_table", "table"]

# Shares of the chip's peaks that a step's time is estimated at; matrix products, main memory, links between chips.
EFFICIENCY = {"compute": 0.5, "memory": 0.7, "network": 0.7}
GIB = 2**30


@dataclass(frozen=True)
class Phase:
    """Seconds of one phase of a step, each as if nothing else limited it and the chip ran at its peak.

    Args:
        name: rollout, scoring or update.
        work: of one device.
        compute, memory, network: seconds at peak.
    """

    name: str
    work: Work
    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> float:
        """No run is faster: the slowest of the three, at peak and fully overlapped."""
        return max(self.compute, self.memory, self.network)

    @property
    def expected(self) -> float:
        """Seconds at `EFFICIENCY`: arithmetic overlaps memory traffic, collectives overlap neither."""
        return (
            max(self.compute / EFFICIENCY["compute"], self.memory / EFFICIENCY["memory"])
            + self.network / EFFICIENCY["network"]
        )

    @property
    def limit(self) -> str:
        """Which of the three takes longest."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits its slice.

    Args:
        plan: the run.
        programs: all of them.
        target: the slice.
        phases: of a step, those that run.
        peak: bytes of the fullest moment on a device.
        fullest: the program of that moment.
    """

    plan: Blueprint
    programs: tuple[Measured, ...]
    target: Slice
    phases: tuple[Phase, ...]
    peak: int
    fullest: Measured

    @property
    def fits(self) -> bool:
        """Whether every program was compiled and the fullest moment is within what the chip lets a program use."""
        return self.peak <= self.target.chip.usable_bytes and all(program.report for program in self.programs)

    @property
    def seconds(self) -> float:
        """Expected time of a step in which every completion runs to its limit."""
        return sum(phase.expected for phase in self.phases)

    @property
    def tokens(self) -> int:
        """Completion tokens of such a step."""
        rollout = self.plan.config.rollout
        return rollout.prompts * rollout.group_size * rollout.max_new_tokens

    def advice(self) -> list[str]:
        """What to change, the cheapest first; empty if the run fits."""
        if self.fits:
            return []
        config, shards, tensor = self.plan.config, self.plan.shards, self.plan.tensor
        settled = bytes_per_device(self.plan.state) + bytes_per_device(self.plan.reference)
        over = self.peak - self.target.chip.usable_bytes
        lines = []
        if self.fullest.phase in ("update", "scoring"):
            if not config.model.remat:
                lines.append("model.remat=true: keep one activation a layer instead of all of them")
            if config.loss.rows > shards:
                lines.append(
                    f"loss.rows={max(shards, config.loss.rows // 2 // shards * shards)}: smaller micro-batches, the "
                    "same update"
                )
            shortest = config.rollout.max_new_tokens
            shortest += -shortest % config.loss.blocks
            if config.row_length > shortest:
                lines.append(f"loss.row_length={shortest}: shorter rows, the same update")
        elif self.fullest.phase in ("rollout", "evaluation"):
            slots = self.plan.sampler.slots
            if slots > shards:
                lines.append(f"rollout.slots={max(shards, slots // 2)}: fewer sequences at once, a smaller KV cache")
        if config.model.compute_dtype == "float32":
            lines.append("model.compute_dtype=bfloat16: half the bytes of activations, decoding weights and cache")
        wider = next(
            (
                tp
                for tp in range(tensor + 1, self.target.chips + 1)
                if self.target.chips % tp == 0 and self.plan.model.kv_heads % tp == 0
            ),
            None,
        )
        if wider:
            lines.append(
                f"mesh=dp:1,fsdp:-1,tp:{wider}: decoding holds 1/{wider} of the weights a device instead of "
                + (f"1/{tensor}" if tensor > 1 else "all of them")
            )
        if self.plan.mesh.shape["dp"] > 1:
            lines.append(f"mesh=dp:1,fsdp:-1,tp:{tensor}: no second copy of parameters and optimizer state")
        if larger := _larger(self.target, self.peak / self.target.chip.usable_bytes):
            lines.append(
                f"--slice {larger}: parameters and optimizer take {_gib(settled)} of a device here, and {_gib(over)} "
                "are missing"
            )
        return lines


def judge(plan: Blueprint, programs: Sequence[Measured], target: Slice) -> Verdict:
    """Adds a run's programs up.

    Args:
        plan: the run.
        programs: from `measure`.
        target: the slice it is meant for.

    Returns:
        The verdict.
    """
    phases = []
    for name in ("rollout", "scoring", "update"):
        work = sum((program.work for program in programs if program.phase == name), Work())
        if work.flops:
            phases.append(
                Phase(
                    name,
                    work,
                    work.flops / target.chip.flops,
                    work.traffic / target.chip.hbm_bandwidth,
                    work.network / target.chip.ici_bandwidth,
                )
            )
    fullest = max(programs, key=lambda program: program.peak)
    return Verdict(plan, tuple(programs), target, tuple(phases), fullest.peak, fullest)


def table(verdict: Verdict) -> str:
    """The whole report, as text."""
    parts = [
        _memory(verdict),
        programs_table(verdict.programs),
        _time(verdict),
        _kernels(verdict),
        _collectives(verdict),
        _said(verdict),
    ]
    return "\n\n".join(part for part in parts if part)


def programs_table(programs: Sequence[Measured]) -> str:
    """One line a program: what it takes, makes and leaves, and how long it took to compile."""
    rows = []
    for program in programs:
        if report := program.report:
            sizes = (report.arguments, report.outputs - report.aliased, report.temporaries)
            figures = [*map(_gib, sizes)]
        else:
            figures = ["refused", "", ""]
        rows.append((program.name, *figures, _gib(program.beside), _gib(program.peak), f"{program.seconds:.1f} s"))
    head = ("program", "arguments", "new results", "temporaries", "beside it", "peak", "CPU to compile")
    return _grid(head, rows)


def _larger(target: Slice, times: float) -> str:
    """The next slice of this chip that is rented and has so many times the memory; empty if there is none."""
    chips = target.chips * 2 ** max(1, math.ceil(math.log2(times)))
    while chips <= 256:
        name = f"{target.chip.name}-{chips * (2 if target.chip.names_cores else 1)}"
        try:
            return find_slice(name).name
        except MeshError:
            chips *= 2
    return ""


def _memory(verdict: Verdict) -> str:
    plan, by_name = verdict.plan, {program.name: program for program in verdict.programs}
    state = plan.state
    parameters = bytes_per_device(state.params)
    optimizer = bytes_per_device(state) - parameters
    rows = [
        ("parameters", plan.config.model.dtype, _gib(parameters)),
        ("optimizer", "moments, and master copy if any", _gib(optimizer)),
    ]
    if plan.reference is not None:
        rows.append(("reference", plan.config.model.dtype, _gib(bytes_per_device(plan.reference))))
    for name, label, note in (
        ("weights", "decoding weights", f"{plan.config.model.compute_dtype}, during rollouts"),
        ("cache", "KV cache", f"{-(-plan.sampler.slots // plan.shards)} sequences, during rollouts"),
    ):
        if name in by_name and (report := by_name[name].report):
            rows.append((label, note, _gib(report.outputs)))
    temporaries = [(program.report.temporaries, program.name) for program in verdict.programs if program.report]
    if temporaries:
        most, name = max(temporaries)
        rows.append(("temporaries", f"most: {name}", _gib(most)))
    usable = verdict.target.chip.usable_bytes
    rows.append(("peak", f"during {verdict.fullest.name}", _gib(verdict.peak)))
    rows.append(
        (
            "chip",
            f"{verdict.peak / usable:.0%} of what {verdict.target.chip.name} lets a program use",
            _gib(usable),
        )
    )
    return _grid(("memory of a device", "", "bytes"), rows)


def _time(verdict: Verdict) -> str:
    rows = [
        (
            phase.name,
            _si(phase.work.flops, "FLOP"),
            _si(phase.work.traffic, "B"),
            _si(phase.work.network, "B"),
            f"{phase.compute:.2f} s",
            f"{phase.memory:.2f} s",
            f"{phase.network:.2f} s",
            f"{phase.bound:.2f} s ({phase.limit})",
            f"{phase.expected:.2f} s",
        )
        for phase in verdict.phases
    ]
    if not rows:
        return ""
    head = (
        "a step, each device",
        "arithmetic",
        "memory",
        "network",
        "compute",
        "memory",
        "network",
        "bound",
        "expected",
    )
    chip, seconds = verdict.target.chip, verdict.seconds
    shares = ", ".join(f"{name} {share:.0%}" for name, share in EFFICIENCY.items())
    bound = sum(phase.bound for phase in verdict.phases)
    return "\n".join(
        [
            _grid(head, rows),
            f"every completion at its limit; {chip.name}: {chip.flops / 1e12:.0f} TFLOP/s, "
            f"{chip.hbm_bandwidth / 1e12:.2f} TB/s, links {chip.ici_bandwidth / 1e9:.0f} GB/s; expected at {shares}",
            f"step {seconds:.1f} s expected, {bound:.1f} s at best; {verdict.tokens / seconds:,.0f} tokens/s, "
            f"{verdict.tokens / seconds / verdict.target.chips:,.0f} a chip",
        ]
    )


def _kernels(verdict: Verdict) -> str:
    """Read off the compiled programs: a kernel that was asked for and is not listed is not there."""
    rows = [
        (phase.name, kernel, f"{calls:,.0f}")
        for phase in verdict.phases
        for kernel, calls in phase.work.kernels.items()
    ]
    return (
        _grid(("kernels of a step", "kernel", "calls"), rows) if rows else "kernels of a step: none but the compiler's"
    )


def _collectives(verdict: Verdict) -> str:
    rows = [
        (phase.name, kind, f"{count:,.0f}", _si(size, "B"))
        for phase in verdict.phases
        for kind, (count, size) in phase.work.collectives.items()
        if count
    ]
    return _grid(("collectives of a step", "kind", "count", "bytes"), rows) if rows else ""


def _said(verdict: Verdict) -> str:
    compiled = sum(program.seconds for program in verdict.programs)
    chip = verdict.target.chip
    fits = "fits" if verdict.fits else "DOES NOT FIT"
    lines = [
        f"{fits} {verdict.target.name}: peak {_gib(verdict.peak)} of {_gib(chip.usable_bytes)} a device, during "
        f"{verdict.fullest.name}; {len(verdict.programs)} programs compiled in {compiled:.0f} s of CPU"
    ]
    lines += [f"  change {line}" for line in verdict.advice()]
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 2 else f"{size / 2**20:.1f} MiB"


def _si(value: float, unit: str) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a ruled head: the first left, the others right where they are figures."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows)]
    numeric = [all(not row[i] or row[i][0].isdigit() or row[i] == "refused" for row in rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        put = (cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(cells, widths, numeric))
        return "  ".join(put).rstrip()

    return "\n".join([line(head), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])
