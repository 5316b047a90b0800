"""What a compiled program does in one run: arithmetic, memory traffic and collectives, its loops multiplied out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from grpo_mesh._report import CompileReport, Memory, report_of


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does.

    Args:
        flops: multiplications and additions of matrix products and kernels.
        traffic: bytes read from and written to main memory.
        collectives: kind to (count, bytes).
        kernels: name to calls.
    """

    flops: float = 0.0
    traffic: float = 0.0
    collectives: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        collectives = {}
        for kind in sorted({*self.collectives, *other.collectives}):
            left, right = self.collectives.get(kind, (0, 0)), other.collectives.get(kind, (0, 0))
            collectives[kind] = left[0] + right[0], left[1] + right[1]
        kernels = {
            name: self.kernels.get(name, 0) + other.kernels.get(name, 0)
            for name in sorted({*self.kernels, *other.kernels})
        }
        return Work(self.flops + other.flops, self.traffic + other.traffic, collectives, kernels)

    def times(self, count: float) -> Work:
        """Returns the work of `count` runs."""
        collectives = {kind: (n * count, size * count) for kind, (n, size) in self.collectives.items()}
        kernels = {name: calls * count for name, calls in self.kernels.items()}
        return Work(self.flops * count, self.traffic * count, collectives, kernels)

    @property
    def network(self) -> float:
        """Bytes that all collectives move."""
        return sum(size for _, size in self.collectives.values())


def read_work(
    text: str,
    memory: Memory,
    trips: tuple[float, float] = (1, 1),
    kernel_flops: Callable[[str], float] | None = None,
    branch_shares: Mapping[str, Sequence[float]] | None = None,
) -> tuple[CompileReport, Work]:
    """Reads the work of one run, with its own trip count for each of two nested loops whose ends depend on the data.

    With x iterations of every such loop, a figure is a + b x + c x²: b is the outer loop's own part, c the inner one's.
    Three readings of the program give a, b and c; m outer iterations with n inner ones each then make a + m (b + n c).

    Args:
        text: of the program.
        memory: that it needs.
        trips: iterations of the outer loop, and of the inner loop in each of them.
        kernel_flops: FLOPs of one call of a kernel that declares no cost, by its name; None: 0.
        branch_shares: as of `compile_report`.

    Returns:
        The compiler's report, without these loops, and the work.
    """
    read = functools.partial(report_of, text, memory, branch_shares=branch_shares)
    report = read(unknown_trips=0)
    readings = [report]
    if report.unknown_loops:
        readings += [read(unknown_trips=count) for count in (1, 2)]
    outer, inner = trips

    def at_trips(figure: Callable[[CompileReport], float]) -> float:
        if len(readings) == 1:
            return figure(report)
        zero, one, two = map(figure, readings)
        square = (two - 2 * one + zero) / 2
        return zero + outer * (one - zero - square + inner * square)

    def collective(kind: str, figure: str) -> float:
        return at_trips(
            lambda reading: getattr(reading.collectives[kind], figure) if kind in reading.collectives else 0
        )

    def flops(reading: CompileReport) -> float:
        if kernel_flops is None:
            return reading.flops
        return reading.flops + sum(reading.kernels[name] * kernel_flops(name) for name in reading.undeclared)

    return report, Work(
        at_trips(flops),
        at_trips(lambda reading: reading.traffic),
        {kind: (collective(kind, "count"), collective(kind, "bytes")) for kind in readings[-1].collectives},
        {name: at_trips(lambda reading, name=name: reading.kernels.get(name, 0)) for name in readings[-1].kernels},
    )
