"""What a compiled program does in one step: arithmetic, memory traffic and collectives, its loops multiplied out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from jax.stages import Compiled

from grpo_mesh import CompileReport, compile_report

__all__ = ["Splash", "Work", "head_chunks", "work_of"]

# Products of one splash call: the backward kernels compute the logits again.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_LANES, _TILE = 128, 512


@dataclass(frozen=True)
class Work:
    """What one device does: FLOPs, bytes of main memory, collectives by kind -> (count, bytes), kernels -> calls."""

    flops: float = 0.0
    traffic: float = 0.0
    collectives: dict[str, tuple[float, float]] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        kinds = sorted({*self.collectives, *other.collectives})
        pairs = {kind: (self.collectives.get(kind, (0, 0)), other.collectives.get(kind, (0, 0))) for kind in kinds}
        return Work(
            self.flops + other.flops,
            self.traffic + other.traffic,
            {kind: (mine[0] + theirs[0], mine[1] + theirs[1]) for kind, (mine, theirs) in pairs.items()},
            {
                name: self.kernels.get(name, 0) + other.kernels.get(name, 0)
                for name in sorted({*self.kernels, *other.kernels})
            },
        )

    def times(self, count: float) -> Work:
        """The same, `count` times over."""
        collectives = {kind: (n * count, size * count) for kind, (n, size) in self.collectives.items()}
        kernels = {name: calls * count for name, calls in self.kernels.items()}
        return Work(self.flops * count, self.traffic * count, collectives, kernels)

    @property
    def network(self) -> float:
        """Bytes that all collectives move."""
        return sum(size for _, size in self.collectives.values())


@dataclass(frozen=True)
class Splash:
    """What one call of the splash kernel computes; the compiler does not know, so its FLOPs are counted from this.

    Args:
        rows: of one device.
        heads: of one device.
        head_size: of each.
        length: tokens of a row, before the kernel's padding.
    """

    rows: int
    heads: int
    head_size: int
    length: int

    def flops(self, kernel: str) -> float:
        """Of one call: half of all pairs are causal."""
        tile = min(_TILE, math.ceil(self.length / _LANES) * _LANES)
        length = math.ceil(self.length / tile) * tile
        products = next((count for name, count in _SPLASH_PRODUCTS.items() if name in kernel), 0)
        return products * self.rows * self.heads * self.head_size * length**2


def head_chunks(tokens: int, vocabulary: int) -> int:
    """Parts in which `grpo_loss.token_logp` computes the logits of a shard's tokens; a test compares the two."""
    return math.ceil(tokens / max(512, 2**26 // vocabulary // 128 * 128))


def work_of(
    compiled: Compiled, text: str, trips: tuple[float, float] = (1, 1), splash: Splash | None = None
) -> tuple[CompileReport, Work]:
    """One run's work, with each of two nested loops whose ends depend on the data at its own number of turns.

    With x turns of every such loop a figure is a + b x + c x², b the outer loop's own part and c the inner one's. Three
    readings of the program tell a, b and c; m outer turns with n inner ones each then make it a + m (b + n c).

    Args:
        compiled: the program.
        text: its text.
        trips: turns of the outer and of the inner loop.
        splash: what its splash kernels compute.

    Returns:
        The compiler's report (with such loops left out), and the work.
    """
    report = compile_report(compiled, text=text, unknown_trips=0)
    readings = [report]
    if report.unknown_loops:
        readings += [compile_report(compiled, text=text, unknown_trips=turns) for turns in (1, 2)]
    outer, inner = trips

    def at_trips(figure: Callable[[CompileReport], float]) -> float:
        if len(readings) == 1:
            return figure(report)
        zero, one, two = map(figure, readings)
        square = (two - 2 * one + zero) / 2
        return zero + outer * (one - zero - square + inner * square)

    def moved(kind: str, figure: str) -> float:
        return at_trips(
            lambda reading: getattr(reading.collectives[kind], figure) if kind in reading.collectives else 0
        )

    def in_kernels(reading: CompileReport) -> float:
        return sum(calls * splash.flops(kernel) for kernel, calls in reading.kernels.items()) if splash else 0

    return report, Work(
        at_trips(lambda reading: reading.flops + in_kernels(reading)),
        at_trips(lambda reading: reading.traffic),
        {kind: (moved(kind, "count"), moved(kind, "bytes")) for kind in readings[-1].collectives},
        {name: at_trips(lambda reading, name=name: reading.kernels.get(name, 0)) for name in readings[-1].kernels},
    )
