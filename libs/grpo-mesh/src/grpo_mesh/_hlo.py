"""Reads the text of a compiled program: computations, their instructions, and the types of their results."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

_FOOTER = re.compile(r'^\}(?:, execution_thread="(\w+)")?$')
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(pred|[suf]\d+\w*|bf16|c64|c128)\[([\d,<=]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type in the text: element bits, dimensions, and whether it lives outside main memory (TPU VMEM)."""

    bits: int
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return (self.elements * self.bits + 7) // 8

    @property
    def traffic(self) -> int:
        return 0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, results, opcode, operand names and the rest of the line."""

    name: str
    results: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass
class Computation:
    """A named list of instructions; `root` gives the result, and `parameters` are keyed by number.

    `thread` is empty if the device's main core runs it; `types` are those of the results, as text.
    """

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    root: str = ""
    thread: str = ""
    parameters: dict[int, str] = dataclasses.field(default_factory=dict)
    users: dict[str, list[Instruction]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

    def arrays(self, name: str) -> tuple[Array, ...]:
        return self.instructions[name].results if name in self.instructions else ()


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current, pending = "", None, None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
            continue
        matched, footer = _INSTRUCTION.match(line), _FOOTER.match(line)
        if pending and (matched or footer):
            _add(current, *pending)
            pending = None
        if matched:
            pending = (matched[2], matched[3], matched[1] is not None)
        elif footer:
            current.thread = footer[1] or ""
            current = None
        elif pending:
            # A kernel's metadata contains line breaks.
            pending = (pending[0], f"{pending[1]}\n{line}", pending[2])
    return computations, entry


def _add(computation: Computation, name: str, body: str, root: bool) -> None:
    it = _instruction(name, body)
    computation.instructions[name] = it
    computation.types[name] = body[: _end_of_type(body)]
    for operand in dict.fromkeys(it.operands):
        _add_element(computation, operand)
        computation.users[operand].append(it)
    if root:
        computation.root = name
    if it.opcode == "parameter" and (number := re.match(r"\d+", it.rest)):
        computation.parameters[int(number[0])] = name


def _add_element(computation: Computation, name: str) -> None:
    """Adds the get-tuple-element that jaxlib 0.12 does not write: it has `%pair#1` as an operand instead."""
    pair, mark, index = name.rpartition("#")
    if not mark or name in computation.instructions:
        return
    _add_element(computation, pair)
    element = _elements(computation.types[pair])[int(index)]
    _add(computation, name, f"{element} get-tuple-element(%{pair}), index={index}", root=False)


def _instruction(name: str, body: str) -> Instruction:
    end = _end_of_type(body)
    results = _arrays(body[:end])
    opcode, _, after = body[end:].strip().partition("(")
    close = _closing("(" + after, 0) - 1
    inside, rest = after[:close], after[close + 1 :]
    if opcode in ("parameter", "constant"):
        return Instruction(name, results, opcode, (), inside)
    operands = re.findall(r"%([\w.\-#]+)", inside) or re.findall(r"(?:^|, )(?:[^,]*\s)?([A-Za-z_][\w.\-#]*)", inside)
    return Instruction(name, results, opcode, tuple(operands), rest)


def _end_of_type(body: str) -> int:
    return _closing(body, 0) + 1 if body.startswith("(") else body.index(" ")


def _elements(type_: str) -> list[str]:
    """The types in a tuple's type, which may hold tuples and comments such as /*index=5*/."""
    elements, depth = [""], 0
    for character in re.sub(r"/\*.*?\*/", "", type_)[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip() for element in elements]


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text) - 1


def _arrays(text: str) -> tuple[Array, ...]:
    found = []
    for dtype, dimensions, layout in _ARRAY.findall(text):
        digits = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(digits[0]) if digits else 32
        shape = tuple(int(size.lstrip("<=")) for size in dimensions.split(",") if size)
        found.append(Array(bits, shape, re.search(r"S\([1-9]\)", layout) is not None))
    return tuple(found)
