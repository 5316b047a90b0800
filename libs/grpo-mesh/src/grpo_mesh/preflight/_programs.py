"""Programs compiled ahead of time, and what each needs and does."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
from jax.stages import Lowered

from grpo_mesh._errors import MeshError
from grpo_mesh._report import CompileReport, compile_with_text, memory_of
from grpo_mesh._schedule import schedule
from grpo_mesh.preflight._work import Work, read_work

# The TPU compiler's two messages about a program that does not fit. Both count arguments too, whatever the wording.
_REFUSAL = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds available HBM)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a step.

    Args:
        name: for the tables; unique within the step.
        lower: traces and lowers it: `lambda: jax.jit(f).lower(...)`.
        phase: the part of the step it belongs to.
        beside: bytes that every device holds while the program runs and that are not its arguments. A function receives
            the programs measured so far, by name.
        runs: how often a step runs it. A function receives the lowered program.
        trips: iterations of its outer loop whose end depends on the data, and of the loop inside that one.
        kernel_flops: (kernel name, lowered program) to the FLOPs of one call on one device, for Mosaic kernels that
            declare no cost; None counts none.
        branch_shares: as of `compile_report`.
    """

    name: str
    lower: Callable[[], Lowered]
    phase: str = "step"
    beside: int | Callable[[Mapping[str, Measured]], int] = 0
    runs: float | Callable[[Lowered], float] = 1
    trips: tuple[float, float] = (1, 1)
    kernel_flops: Callable[[str, Lowered], float] | None = None
    branch_shares: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A program that was compiled, or that the compiler refused because it needs too much memory.

    Args:
        name: of the program.
        phase: of the program.
        beside: bytes that stay on a device while it runs.
        seconds: CPU time that compiling took.
        report: the compiler's figures; None if it refused.
        refused: bytes that the compiler said the program needs; 0 if it did not refuse.
        work: of one step.
    """

    name: str
    phase: str
    beside: int
    seconds: float
    report: CompileReport | None
    refused: int
    work: Work

    @property
    def peak(self) -> int:
        """Bytes of a device in use while it runs."""
        return self.beside + (self.refused if self.report is None else self.report.peak)

    @property
    def outputs(self) -> int:
        """Bytes of its results; 0 if the compiler refused."""
        return 0 if self.report is None else self.report.outputs


def measure(programs: Iterable[Program], *, code: bool = True) -> Iterator[Measured]:
    """Compiles programs, one after the other, in the given order.

    Args:
        programs: of a step, and any others that must fit.
        code: wait until a program's code is generated. Without, figures are read from the schedule and the buffers that
            the TPU compiler writes before, after a twentieth of its time: nothing but `CompileReport.code`, then 0,
            and temporaries, by less than a MiB, is different. But the compiler goes on in a thread that nothing can
            stop. Measure one program in a process of its own, and end that by `os._exit`.

    Yields:
        What each needs and does, as soon as it is compiled.

    Raises:
        MeshError: two programs have the same name, or a program's text cannot be read (see `compile_report`).
    """
    measured: dict[str, Measured] = {}
    for program in programs:
        if program.name in measured:
            raise MeshError(f"programs must have different names: got {program.name!r} twice.")
        beside = program.beside(measured) if callable(program.beside) else program.beside
        measured[program.name] = _measure(program, beside, code=code)
        yield measured[program.name]


def _measure(program: Program, beside: int, *, code: bool) -> Measured:
    start = time.process_time()
    lowered = program.lower()
    try:
        if code:
            compiled, text = compile_with_text(lowered.compile)
            memory = memory_of(compiled)
        else:
            text, memory = schedule(lowered)
    except jax.errors.JaxRuntimeError as error:
        refusal = _REFUSAL.search(str(error))
        if refusal is None:
            raise
        needed = int(float(refusal[1]) * _UNITS[refusal[2]])
        return Measured(program.name, program.phase, beside, time.process_time() - start, None, needed, Work())
    seconds = time.process_time() - start
    of_kernel = program.kernel_flops
    kernel_flops = None if of_kernel is None else lambda kernel: of_kernel(kernel, lowered)
    report, work = read_work(text, memory, program.trips, kernel_flops, program.branch_shares)
    runs = program.runs(lowered) if callable(program.runs) else program.runs
    return Measured(program.name, program.phase, beside, seconds, report, 0, work.times(runs))
