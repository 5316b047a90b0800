"""What a compiled program needs and does on one device: memory, arithmetic, memory traffic, collectives."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.stages import Compiled, Lowered

from grpo_mesh._errors import MeshError
from grpo_mesh._tally import Program

DUMP_AS_TEXT = {"xla_dump_hlo_as_text": True}


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Collectives of one kind in one run: their count, and the sum of the bytes of each one's larger side."""

    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a program needs of one device's main memory, in bytes: see `CompileReport`."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """One run of a compiled program, on one device. All sizes in bytes.

    Args:
        arguments: inputs.
        outputs: results, including those that reuse a donated input.
        aliased: results that reuse a donated input.
        temporaries: everything in between.
        code: the program itself.
        flops: multiplications and additions of matrix products, loops multiplied out.
        traffic: bytes read from and written to main memory, loops multiplied out (an estimate from the text).
        collectives: by kind ("all-gather", ...).
        kernels: calls of Mosaic kernels, by name, loops multiplied out.
        unknown_loops: loops whose trip count is unknown when the program is compiled.
        undeclared: the kernels that declare no cost; `flops` lacks theirs.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    traffic: float
    collectives: dict[str, Collectives]
    kernels: dict[str, float]
    unknown_loops: int
    undeclared: frozenset[str] = frozenset()

    @property
    def peak(self) -> int:
        """Bytes needed at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def compile_with_text(compiles: Callable[..., Compiled]) -> tuple[Compiled, str]:
    """Compiles a program and returns its text as the compiler wrote it.

    `compiled.as_text()` parses the program and prints it again. jaxlib 0.10.2 cannot parse all that the TPU compiler
    writes: on v5p and v6e, SparseCores do embedding lookups and scatters, in instructions that jaxlib does not know.

    Args:
        compiles: `jax.jit(f).lower(...).compile`, or another function that passes `compiler_options` to it.

    Returns:
        The program, and its text for `compile_report`.

    Raises:
        MeshError: a program instead of a function, or one from a compilation cache that jaxlib cannot read.
    """
    if isinstance(compiles, Compiled):
        raise MeshError("compile_with_text compiles itself: pass `lowered.compile`, not what it returns.")
    with tempfile.TemporaryDirectory(prefix="grpo-mesh-") as folder:
        compiled = compiles(compiler_options={"xla_dump_to": folder, **DUMP_AS_TEXT})
        # A program from a compilation cache was written when it was compiled, not now.
        return compiled, read_dump(Path(folder)) or read_back(compiled)


def read_dump(folder: Path) -> str:
    """Returns the text that XLA wrote of the last program it scheduled; empty if there is none."""
    written = sorted(folder.glob("*after_optimizations.txt"))
    return written[-1].read_text() if written else ""


def memory_of(compiled: Compiled) -> Memory:
    """Reads what a compiled program needs.

    Raises:
        MeshError: this backend does not tell.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise MeshError(f"a report needs a program's memory: {jax.default_backend()} does not tell it.")
    return Memory(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )


def compile_report(
    compiled: Compiled,
    *,
    text: str | None = None,
    unknown_trips: float = 1,
    branch_shares: Mapping[str, Sequence[float]] | None = None,
) -> CompileReport:
    """Reads memory, arithmetic and collectives from a compiled program.

    Args:
        compiled: `jax.jit(f).lower(...).compile()`, for devices at hand or for `slice_devices`.
        text: the program's, from `compile_with_text`; None asks `compiled.as_text()`.
        unknown_trips: iterations to assume for loops with a data-dependent end, such as decoding.
        branch_shares: name of a `jax.named_scope` to how often each branch of the conditionals in it is taken, in
            [0, 1]; of every other conditional, the costliest branch counts.

    Returns:
        The figures of one device.

    Raises:
        MeshError: the program is not compiled, this backend reports no memory or no program text, or jaxlib cannot read
            the program.
    """
    if isinstance(compiled, Lowered):
        raise MeshError("compile_report needs a compiled program: got a lowered one. Pass `lowered.compile()`.")
    return report_of(
        read_back(compiled) if text is None else text,
        memory_of(compiled),
        unknown_trips=unknown_trips,
        branch_shares=branch_shares,
    )


def report_of(
    text: str,
    memory: Memory,
    *,
    unknown_trips: float = 1,
    branch_shares: Mapping[str, Sequence[float]] | None = None,
) -> CompileReport:
    """Puts a report together: see `compile_report`.

    Raises:
        MeshError: there is no text.
    """
    if not text:
        raise MeshError(f"a report needs a program's text: {jax.default_backend()} does not tell it.")
    tally = Program(text, unknown_trips, branch_shares).tally()
    return CompileReport(
        **dataclasses.asdict(memory),
        flops=tally.flops,
        traffic=tally.traffic,
        collectives={kind: Collectives(*figures) for kind, figures in sorted(tally.collectives.items())},
        kernels=dict(sorted(tally.kernels.items())),
        unknown_loops=tally.unknown_loops,
        undeclared=frozenset(tally.undeclared),
    )


def read_back(compiled: Compiled) -> str:
    """Returns a compiled program's text as jaxlib prints it; empty if the backend has none.

    Raises:
        MeshError: jaxlib cannot read what the compiler returned.
    """
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise MeshError(
            f"a program's text must be one that jaxlib can read: {str(error).splitlines()[0]}. Compile it with "
            "`compile_with_text`, without a compilation cache, and pass the text to `compile_report`."
        ) from error
