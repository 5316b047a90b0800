"""The report as text: memory of a device, programs, time of a step, kernels, collectives, verdict."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mesh.preflight._programs import Measured
from grpo_mesh.preflight._verdict import EFFICIENCY, Verdict

GIB = 2**30


def table(
    verdict: Verdict,
    *,
    memory_rows: Sequence[tuple[str, str, int]] = (),
    assumption: str = "",
    advice: Sequence[str] = (),
) -> str:
    """Formats the whole report.

    Args:
        verdict: from `judge`.
        memory_rows: what a device's memory holds: (label, note, bytes), such as ("parameters", "bfloat16", 10**9).
        assumption: under which the step's time was computed, such as "every completion at its limit".
        advice: what to change, one line each; printed under the verdict.

    Returns:
        Several tables, separated by blank lines. The last lines say whether the programs fit.
    """
    parts = [
        _memory_table(verdict, memory_rows),
        programs_table(verdict.programs),
        _time_table(verdict, assumption),
        _kernels_table(verdict),
        _collectives_table(verdict),
        _conclusion(verdict, advice),
    ]
    return "\n\n".join(part for part in parts if part)


def programs_table(measured: Sequence[Measured]) -> str:
    """Formats one line per program: its arguments, results, temporaries and peak, and the time to compile it.

    Args:
        measured: from `measure`.

    Returns:
        The table.
    """
    rows = []
    for program in measured:
        if report := program.report:
            sizes = (report.arguments, report.outputs - report.aliased, report.temporaries)
            figures = [*map(format_bytes, sizes)]
        else:
            figures = ["refused", "", ""]
        memory = format_bytes(program.beside), format_bytes(program.peak)
        rows.append((program.name, *figures, *memory, f"{program.seconds:.1f} s"))
    head = ("program", "arguments", "new results", "temporaries", "beside it", "peak", "CPU to compile")
    return _grid(head, rows)


def format_bytes(size: float) -> str:
    """Formats a size: "5.52 GiB", or "12.0 MiB" below half a GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 2 else f"{size / 2**20:.1f} MiB"


def format_si(value: float, unit: str) -> str:
    """Formats a value with a decimal prefix: "1.5 TFLOP"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _memory_table(verdict: Verdict, memory_rows: Sequence[tuple[str, str, int]]) -> str:
    rows = [(label, note, format_bytes(size)) for label, note, size in memory_rows]
    temporaries = [(program.report.temporaries, program.name) for program in verdict.programs if program.report]
    if temporaries:
        most, name = max(temporaries)
        rows.append(("temporaries", f"most: {name}", format_bytes(most)))
    chip = verdict.target.chip
    usage = f"{verdict.peak / chip.usable_bytes:.0%} of what {chip.name} lets a program use"
    rows.append(("peak", f"during {verdict.fullest.name}", format_bytes(verdict.peak)))
    rows.append(("chip", usage, format_bytes(chip.usable_bytes)))
    return _grid(("memory of a device", "", "bytes"), rows)


def _time_table(verdict: Verdict, assumption: str) -> str:
    rows = [
        (
            phase.name,
            format_si(phase.work.flops, "FLOP"),
            format_si(phase.work.traffic, "B"),
            format_si(phase.work.network, "B"),
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
    work, seconds = ("arithmetic", "memory", "network"), ("compute", "memory", "network", "bound", "expected")
    chip = verdict.target.chip
    shares = ", ".join(f"{name} {share:.0%}" for name, share in EFFICIENCY.items())
    total = f"step {verdict.seconds:.1f} s expected, {verdict.best:.1f} s at best"
    if verdict.tokens is not None:
        rate = verdict.tokens / verdict.seconds
        total += f"; {rate:,.0f} tokens/s, {rate / verdict.target.chips:,.0f} a chip"
    return "\n".join(
        [
            _grid(("a step, each device", *work, *seconds), rows),
            f"{assumption + '; ' if assumption else ''}{chip.name}: {chip.flops / 1e12:.0f} TFLOP/s, "
            f"{chip.hbm_bandwidth / 1e12:.2f} TB/s, links {chip.ici_bandwidth / 1e9:.0f} GB/s; expected at {shares}",
            total,
        ]
    )


def _kernels_table(verdict: Verdict) -> str:
    """Lists what the compiled programs contain: a kernel that was asked for and is not listed is not in them."""
    rows = [
        (phase.name, kernel, f"{calls:,.0f}")
        for phase in verdict.phases
        for kernel, calls in phase.work.kernels.items()
    ]
    return (
        _grid(("kernels of a step", "kernel", "calls"), rows) if rows else "kernels of a step: none but the compiler's"
    )


def _collectives_table(verdict: Verdict) -> str:
    rows = [
        (phase.name, kind, f"{count:,.0f}", format_si(size, "B"))
        for phase in verdict.phases
        for kind, (count, size) in phase.work.collectives.items()
        if count
    ]
    return _grid(("collectives of a step", "kind", "count", "bytes"), rows) if rows else ""


def _conclusion(verdict: Verdict, advice: Sequence[str]) -> str:
    compiling = sum(program.seconds for program in verdict.programs)
    fits = "fits" if verdict.fits else "DOES NOT FIT"
    usable = format_bytes(verdict.target.chip.usable_bytes)
    count = f"{len(verdict.programs)} program{'s' if len(verdict.programs) > 1 else ''}"
    conclusion = (
        f"{fits} {verdict.target.name}: peak {format_bytes(verdict.peak)} of {usable} a device, during "
        f"{verdict.fullest.name}; {count} compiled in {compiling:.0f} s of CPU"
    )
    return "\n".join([conclusion, *(f"  change {line}" for line in advice)])


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns under a ruled head: figures to the right, all else to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows)]
    numeric = [all(not row[i] or row[i][0].isdigit() or row[i] == "refused" for row in rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(cells, widths, numeric)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])
