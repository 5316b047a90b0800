"""What a compiled program needs and does on one device: memory, arithmetic, memory traffic, collectives."""

from __future__ import annotations

import dataclasses

import jax
from jax.stages import Compiled

from grpo_mesh._errors import MeshError
from grpo_mesh._tally import Program


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Collectives of one kind in one run: how many, and the bytes of each one's larger side, summed."""

    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """One run of a compiled program, on one device. All sizes in bytes.

    Args:
        arguments: inputs.
        outputs: results, those that reuse a donated input included.
        aliased: results that reuse a donated input.
        temporaries: everything in between.
        code: the program itself.
        flops: multiplications and additions of matrix products, loops multiplied out.
        traffic: bytes read from and written to main memory, loops multiplied out (an estimate from the text).
        collectives: by kind ("all-gather", ...).
        kernels: calls of Mosaic kernels that declare no cost, by name, loops multiplied out; `flops` lacks theirs.
        unknown_loops: loops whose trip count the compiler could not tell.
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

    @property
    def peak(self) -> int:
        """Bytes needed at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def compile_report(compiled: Compiled, *, unknown_trips: float = 1) -> CompileReport:
    """Reads memory, arithmetic and collectives off a compiled program.

    Args:
        compiled: `jax.jit(f).lower(...).compile()`, for devices at hand or for `slice_devices`.
        unknown_trips: iterations to assume for loops with a data-dependent end, such as decoding.

    Returns:
        The figures of one device.

    Raises:
        MeshError: this backend reports no memory or no program text.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or not text:
        raise MeshError(f"compile_report needs a program's memory and text: {jax.default_backend()} reports neither.")
    tally = Program(text, unknown_trips).tally()
    return CompileReport(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=tally.flops,
        traffic=tally.traffic,
        collectives={kind: Collectives(*figures) for kind, figures in sorted(tally.collectives.items())},
        kernels=dict(sorted(tally.kernels.items())),
        unknown_loops=tally.unknown_loops,
    )
