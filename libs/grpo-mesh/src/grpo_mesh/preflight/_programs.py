"""Programs compiled ahead of time, one after the other, and what each needs and does."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
from jax.stages import Compiled

from grpo_mesh._errors import MeshError
from grpo_mesh._report import CompileReport, compile_with_text
from grpo_mesh.preflight._work import Work, read_work

# The TPU compiler's two messages about a program that does not fit. Both count arguments too, whatever the wording.
_REFUSAL = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds available HBM)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _no_flops(kernel: str, compiled: Compiled) -> float:
    return 0.0


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a step.

    Args:
        name: for the tables; unique within the step.
        compile: compiles it and accepts `compiler_options`: `jax.jit(f).lower(...).compile`.
        phase: the part of the step it belongs to.
        beside: bytes that every device holds while the program runs and that are not its arguments. A function receives
            the programs measured so far, by name.
        runs: how often a step runs it. A function receives the compiled program.
        trips: iterations of its outer loop whose end depends on the data, and of the loop inside that one.
        kernel_flops: (kernel name, compiled program) to the FLOPs of one call on one device, for Mosaic kernels that
            declare no cost.
        branch_shares: as of `compile_report`.
    """

    name: str
    compile: Callable[..., Compiled]
    phase: str = "step"
    beside: int | Callable[[Mapping[str, Measured]], int] = 0
    runs: float | Callable[[Compiled], float] = 1
    trips: tuple[float, float] = (1, 1)
    kernel_flops: Callable[[str, Compiled], float] = _no_flops
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


def measure(programs: Iterable[Program]) -> Iterator[Measured]:
    """Compiles programs, one after the other, in the given order.

    Args:
        programs: of a step, and any others that must fit.

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
        measured[program.name] = _compile(program, beside)
        yield measured[program.name]


def _compile(program: Program, beside: int) -> Measured:
    start = time.process_time()
    try:
        compiled, text = compile_with_text(program.compile)
    except jax.errors.JaxRuntimeError as error:
        refusal = _REFUSAL.search(str(error))
        if refusal is None:
            raise
        needed = int(float(refusal[1]) * _UNITS[refusal[2]])
        return Measured(program.name, program.phase, beside, time.process_time() - start, None, needed, Work())
    seconds = time.process_time() - start
    report, work = read_work(compiled, text, program.trips, program.kernel_flops, program.branch_shares)
    runs = program.runs(compiled) if callable(program.runs) else program.runs
    return Measured(program.name, program.phase, beside, seconds, report, 0, work.times(runs))
