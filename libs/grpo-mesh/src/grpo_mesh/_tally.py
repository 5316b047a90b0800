"""Adds up what one device does in one run of a compiled program, loops included.

XLA's own cost analysis counts a loop's body once, whatever its trip count, and a model scanned over its layers is
mostly loop. Here every body is multiplied by its trip count.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from grpo_mesh._hlo import Array, Computation, Instruction, parse_program

_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_WRAPPED = re.compile(r"called_computations=\{%?([\w.\-]+)\}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SCOPES = re.compile(r'op_name="([^"]*)"')
_ESTIMATE = re.compile(r'"cost_estimate":\{([^}]*)\}')

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_OVERLAPPED = "async_collective_fusion"  # computations in which a collective goes on beside arithmetic
_KERNEL, _BITCAST = 'custom_call_target="tpu_custom_call"', 'custom_call_target="ConcatBitcast"'
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota",
}  # fmt: skip


@dataclasses.dataclass
class Tally:
    """What one run of a computation does on one device."""

    flops: float = 0
    traffic: float = 0
    collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    undeclared: set[str] = dataclasses.field(default_factory=set)
    unknown_loops: int = 0

    def add(self, other: Tally, times: float = 1) -> None:
        self.flops += times * other.flops
        self.traffic += times * other.traffic
        self.unknown_loops += other.unknown_loops
        self.undeclared |= other.undeclared
        for name, count in other.kernels.items():
            self.kernels[name] = self.kernels.get(name, 0) + times * count
        for kind, (count, size) in other.collectives.items():
            total = self.collectives.setdefault(kind, [0, 0])
            total[0] += times * count
            total[1] += times * size


class Program:
    """A parsed program.

    Args:
        text: `compiled.as_text()`.
        unknown_trips: iterations to assume for a loop whose trip count is unknown.
        branch_shares: of the conditionals in a `jax.named_scope`, how often each branch is taken.
    """

    def __init__(self, text: str, unknown_trips: float = 1, branch_shares: Mapping[str, Sequence[float]] | None = None):
        self.computations, self.entry = parse_program(text)
        self.unknown_trips, self.branch_shares = unknown_trips, branch_shares or {}
        self._tallies: dict[tuple[str, bool], Tally] = {}
        self._started = {
            key
            for name, computation in self.computations.items()
            if not name.startswith(_OVERLAPPED)
            for it in computation.instructions.values()
            if (key := _channel(it))
        }

    def tally(self) -> Tally:
        """Adds up the whole program."""
        return self._tally(self.entry, fused=False)

    def _tally(self, name: str, fused: bool) -> Tally:
        """Adds up a computation; inside a fusion nothing is written to memory, so only arithmetic counts."""
        if (name, fused) not in self._tallies:
            total, channels = Tally(), set()
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                self._count(computation, instruction, fused, total, channels)
            self._tallies[name, fused] = total
        return self._tallies[name, fused]

    def _count(self, owner: Computation, it: Instruction, fused: bool, total: Tally, channels: set[str]) -> None:
        called = [name for name in _CALLED.findall(it.rest) if name in self.computations]
        opcode = it.opcode.removesuffix("-start")
        if it.opcode == "while":
            known = self._trips(owner, it)
            total.unknown_loops += known is None
            for name in called:
                total.add(self._tally(name, fused), self.unknown_trips if known is None else known)
        elif it.opcode == "conditional":
            listed = _BRANCHES.search(it.rest)
            names = re.findall(r"[\w.\-]+", listed[1].replace("%", "")) if listed else called
            tallies = [self._tally(name, fused) for name in names]
            if shares := self._shares(it, len(tallies)):
                for tally, share in zip(tallies, shares):
                    total.add(tally, share)
            else:
                total.add(max(tallies, key=lambda t: (t.flops, t.traffic)))
        elif it.opcode == "fusion":
            self._add_fusion(it, called[0], total, channels)
            total.traffic += 0 if fused else self._fusion_traffic(owner, it, self.computations[called[0]])
        elif opcode in ("call", "async"):
            for name in called:
                total.add(self._tally(name, fused))
        elif (wrapped := self._on_another_core(it)) is not None:
            total.add(self._tally(wrapped, fused))
        elif opcode in COLLECTIVES:
            self._add_collective(owner, it, opcode, total, channels)
        elif not it.opcode.endswith(("-done", "-update")) and it.opcode not in _FREE and _BITCAST not in it.rest:
            if _KERNEL in it.rest:
                name = re.sub(r"\.\d+$", "", it.name)
                total.add(Tally(kernels={name: 1}, undeclared=set() if _ESTIMATE.search(it.rest) else {name}))
            total.flops += _flops(owner, it)
            total.traffic += 0 if fused else _traffic(owner, it)

    def _shares(self, it: Instruction, branches: int) -> Sequence[float]:
        """How often each branch is taken, where that is known."""
        scopes = found[1].split("/") if (found := _SCOPES.search(it.rest)) else []
        known = (shares for scope, shares in self.branch_shares.items() if scope in scopes and len(shares) == branches)
        return next(known, ())

    def _on_another_core(self, it: Instruction) -> str | None:
        """The computation that a TPU's SparseCore runs for this instruction, such as an embedding lookup."""
        found = _WRAPPED.search(it.rest) if it.opcode == "custom-call" else None
        inner = self.computations.get(found[1]) if found else None
        return inner.name if inner and inner.thread else None

    def _trips(self, owner: Computation, it: Instruction) -> int | None:
        """Finds a loop's trip count: as the compiler notes it (CPU, GPU), or from 'i < constant' (TPU)."""
        if noted := _TRIPS.search(it.rest):
            return int(noted[1])
        condition, body = (
            self.computations[found[1]] if (found := re.search(rf"{key}=%?([\w.\-]+)", it.rest)) else None
            for key in ("condition", "body")
        )
        initial = owner.instructions.get(it.operands[0])
        if condition is None or body is None or initial is None or initial.opcode != "tuple":
            return None
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        slots = [_slot(condition, name) for name in test.operands]
        if slots[0] is None:
            return None
        start = _constant(owner, initial.operands[slots[0]])
        stop = _constant(condition, test.operands[1])
        if stop is None and slots[1] is not None:
            stop = _constant(owner, initial.operands[slots[1]])
        step = body.instructions.get(body.instructions[body.root].operands[slots[0]])
        if start is None or stop is None or step is None or step.opcode != "add":
            return None
        stride = next((value for name in step.operands if (value := _constant(body, name)) is not None), None)
        return max(0, -(-(stop - start) // stride)) if stride else None

    def _add_fusion(self, it: Instruction, name: str, total: Tally, channels: set[str]) -> None:
        inner = self.computations[name]
        nested = Tally()
        for instruction in inner.instructions.values():
            self._count(inner, instruction, True, nested, channels)
        if name.startswith("all-reduce-scatter") and "all-reduce" in nested.collectives:
            # The TPU compiler writes a reduce-scatter as an all-reduce fused with the slice that is kept.
            nested.collectives["reduce-scatter"] = nested.collectives.pop("all-reduce")
        total.add(nested)

    def _add_collective(self, owner: Computation, it: Instruction, kind: str, total: Tally, channels: set[str]) -> None:
        if key := _channel(it):
            # A collective overlapped with arithmetic appears in the fusions of its start, middle and end. A middle in
            # the body of a loop goes on with what started outside.
            if key in channels or (owner.name.startswith(_OVERLAPPED) and key in self._started):
                return
            channels.add(key)
        given = sum(array.bytes for name in it.operands for array in owner.arrays(name))
        taken = sum(array.bytes for array in it.results)
        if it.opcode.endswith("-start") and kind != "all-reduce":
            taken -= given  # the result of a start holds its operands as well
        total.add(Tally(collectives={kind: [1, max(given, taken)]}))

    def _fusion_traffic(self, owner: Computation, it: Instruction, inner: Computation) -> float:
        read = 0.0
        for number, name in enumerate(it.operands):
            arrays = owner.arrays(name)
            if number in inner.parameters and not any(array.on_chip for array in arrays):
                read += min(sum(array.bytes for array in arrays), self._read(inner, inner.parameters[number]))
        return read + self._written(inner, inner.root, it.results)

    def _read(self, inner: Computation, name: str) -> float:
        """Bytes that a fusion reads of one operand: of stacked weights, only the slice that it takes."""
        whole = sum(array.bytes for array in inner.arrays(name))
        if name == inner.root:
            return whole  # a nested fusion that only renames: its result is read outside
        read = 0.0
        for user in inner.users[name]:
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                read += sum(array.bytes for array in user.results)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # updated in place
            elif user.opcode in ("bitcast", "reshape"):
                read += self._read(inner, user.name)
            elif user.opcode == "fusion" and (called := _CALLED.search(user.rest)):
                nested = self.computations[called[1]]
                read += sum(
                    self._read(nested, nested.parameters[number])
                    for number, operand in enumerate(user.operands)
                    if operand == name and number in nested.parameters
                )
            else:
                return whole
        return min(whole, read)

    def _written(self, inner: Computation, root: str, results: Sequence[Array]) -> float:
        """Bytes that a fusion writes: of an array updated in place, only the update."""
        it = inner.instructions[root]
        if it.opcode == "tuple":
            return sum(
                self._written(inner, name, (result,))
                for name, result in zip(it.operands, results)
                if name in inner.instructions
            )
        if any(array.on_chip for array in results):
            return 0
        if it.opcode in ("bitcast", "reshape") and it.operands[0] in inner.instructions:
            return self._written(inner, it.operands[0], results)
        if it.opcode == "dynamic-update-slice":
            return sum(array.bytes for array in inner.arrays(it.operands[1]))
        return sum(array.bytes for array in results)


def _channel(it: Instruction) -> str:
    """What tells the parts of one collective: its kind and channel; empty if it has none."""
    kind, channel = it.opcode.removesuffix("-start"), _CHANNEL.search(it.rest)
    return f"{kind} {channel[1]}" if kind in COLLECTIVES and channel else ""


def _slot(owner: Computation, name: str) -> int | None:
    """Index of a value in the loop's state, looking through copies."""
    it = owner.instructions[name]
    if it.opcode in ("copy", "bitcast", "convert"):
        return _slot(owner, it.operands[0])
    found = re.search(r"index=(\d+)", it.rest)
    return int(found[1]) if it.opcode == "get-tuple-element" and found else None


def _constant(owner: Computation, name: str) -> int | None:
    """The value of an integer constant, looking through copies."""
    it = owner.instructions[name]
    if it.opcode in ("copy", "bitcast", "convert") and it.operands:
        return _constant(owner, it.operands[0])
    return int(it.rest) if it.opcode == "constant" and re.fullmatch(r"-?\d+", it.rest) else None


def _traffic(owner: Computation, it: Instruction) -> float:
    written = sum(array.traffic for array in it.results)
    if it.opcode in ("dynamic-slice", "slice", "gather", "broadcast"):
        return 2 * written if it.opcode != "broadcast" else written
    if it.opcode == "dynamic-update-slice":
        return 2 * sum(array.traffic for array in owner.arrays(it.operands[1]))
    if it.opcode.endswith("-start"):
        # Its results are the copy or slice, the original, and a semaphore.
        moved = min((array.bytes for array in it.results if array.shape), default=0)
        stays = any(array.on_chip for array in it.results)
        return moved if stays else 2 * moved
    return written + sum(array.traffic for name in it.operands for array in owner.arrays(name))


def _flops(owner: Computation, it: Instruction) -> float:
    """Multiplications and additions of matrix products; element-wise work alone never limits a program."""
    if it.opcode == "dot":
        left = owner.arrays(it.operands[0])[0].shape
        return 2 * it.results[0].elements * _contracted(left, r"lhs_contracting_dims=\{([\d,]*)\}", it.rest)
    if it.opcode == "convolution":
        return _convolution_flops(owner, it)
    if it.opcode == "custom-call":
        if estimate := _ESTIMATE.search(it.rest):
            flops = re.search(r'"flops":"?(\d+)', estimate[1])
            return float(flops[1]) if flops else 0
        if "__cublas$" in it.rest:
            left = owner.arrays(it.operands[0])[0].shape
            return (
                2 * it.results[0].elements * _contracted(left, r'"lhs_contracting_dimensions":\[([\d,"]*)\]', it.rest)
            )
    return 0


def _contracted(shape: tuple[int, ...], pattern: str, rest: str) -> int:
    found = re.search(pattern, rest)
    return math.prod(shape[int(axis)] for axis in re.findall(r"\d+", found[1])) if found else 1


def _convolution_flops(owner: Computation, it: Instruction) -> float:
    """Counts the products outside the padding: the TPU compiler writes batched matrix products as convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.rest)
    if not labels:
        return 0
    left, right = (owner.arrays(name)[0].shape for name in it.operands[:2])
    size = lambda labels, shape, axis: shape[labels.index(axis)]  # noqa: E731
    pairs = 1
    spatial = [axis for axis in labels[3] if axis.isdecimal()]
    window = re.search(r"window=\{([^}]*)\}", it.rest)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    for number, axis in enumerate(sorted(spatial)):
        one = lambda key, default: fields[key].split("x")[number] if key in fields else default  # noqa: B023, E731
        low = int(one("pad", "0_0").split("_")[0])
        stride, spread, gap = (int(one(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        given, taken, kernel = (
            size(labels[1], left, axis), size(labels[3], it.results[0].shape, axis), size(labels[2], right, axis)
        )  # fmt: skip
        reach = (given - 1) * spread
        pairs *= sum(
            0 <= (place := out * stride + tap * gap - low) <= reach and place % spread == 0
            for out in range(taken)
            for tap in range(kernel)
        )
    batch, features = size(labels[3], it.results[0].shape, "b"), size(labels[3], it.results[0].shape, "f")
    return 2 * pairs * batch * features * size(labels[2], right, "i")
