"""Which row, micro-batch and shard a completion goes to. A box is one shard of one micro-batch."""

from dataclasses import dataclass, field

import numpy as np

from grpo_loss._errors import LossError
from grpo_loss._layout import MicroSize
from grpo_loss._shape import PackShape

# What a micro-batch costs besides its positions, as a part of the largest one's: reading weights, adding gradients.
_FIXED_COST = 1 / 16
# Beginnings of a plan that a search goes on with; eight instead of four gain a fifth of a percent on lengths of GSM8K.
_BEAM = 4


@dataclass
class Row:
    """A row being filled: where each sequence starts, and the prompt slot of each block that is in use."""

    length: int
    block: int
    used: int = 0
    placed: list[tuple[int, int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def start(self, slot: int) -> int:
        """Where a sequence of this slot's prompt would start: behind the last one, or at the next block."""
        return self.used if self.slots and self.slots[-1] == slot else -(-self.used // self.block) * self.block

    def place(self, sequence: int, length: int, slot: int) -> None:
        start = self.start(slot)
        self.used = start + length
        self.placed.append((sequence, start))
        self.slots += [slot] * (-(-self.used // self.block) - len(self.slots))

    def copy(self) -> "Row":
        return Row(self.length, self.block, self.used, list(self.placed), list(self.slots))


@dataclass
class Box:
    """What one shard of one micro-batch holds: the first sequence of each prompt in use, and rows."""

    prompts: list[int]
    rows: list[Row]

    def room(self) -> tuple[int, int]:
        """Tokens that another group may have at most: of one sequence, and of all."""
        slot = len(self.prompts)
        free = [row.length - row.start(slot) for row in self.rows]
        return max(free), sum(free)


@dataclass(frozen=True)
class Plan:
    """Where everything goes: boxes are (micro-batch, shard) in order."""

    shape: PackShape
    boxes: list[Box]
    chosen: list[int] | None = None  # of each micro-batch, which of the shape's sizes; None: the largest

    @property
    def count(self) -> int:
        return -(-len(self.boxes) // self.shape.shards)

    @property
    def sizes(self) -> list[int]:
        """Of each micro-batch, which of the shape's sizes it has."""
        return [0] * self.count if self.chosen is None else self.chosen

    @property
    def cost(self) -> int:
        """Token positions computed."""
        return sum(self.shape.sizes[size].positions for size in self.sizes)


def make_plan(length_B: np.ndarray, prompt_length_B: np.ndarray, members: list[np.ndarray], shape: PackShape) -> Plan:
    for group in members:
        if (longest := int(length_B[group].max())) > shape.row_length:
            raise LossError(
                f"row_length must be at least the longest completion: got {shape.row_length} for {longest}."
            )
        if (prompt := int(prompt_length_B[group[0]]) - 1) > shape.prompt_length:
            raise LossError(
                f"prompt_length must be at least the longest prompt less one: got {shape.prompt_length} for {prompt}."
            )
    lengths, prompt_lengths = length_B.tolist(), prompt_length_B.tolist()
    # Longest first, among groups and within a group.
    groups = [sorted(group.tolist(), key=lambda b: (-lengths[b], b)) for group in members]
    groups.sort(key=lambda group: (-_tokens(lengths, group), group[0]))
    plain = _plan_largest(lengths, groups, shape)
    if not shape.smaller:
        return plain
    fitted = _plan_sizes(lengths, prompt_lengths, groups, shape)
    fixed = _FIXED_COST * shape.largest.positions
    plans = [fitted, plain] if fitted.count <= shape.micro_batches else [plain]
    return min(plans, key=lambda plan: plan.cost + fixed * plan.count)


def _plan_largest(length_B: list[int], groups: list[list[int]], shape: PackShape) -> Plan:
    """Micro-batches of the largest size, as few as there can be."""
    tokens = sum(_tokens(length_B, group) for group in groups)
    fewest = max(-(-tokens // (shape.rows * shape.row_length)), -(-len(groups) // shape.prompts))
    # First without splitting a group over micro-batches, if that costs no further one. The last plan is the one that
    # `PackShape.for_rollout` bounds: where prompts must start at a block, a row may hold less.
    plans: list[Plan] = []
    for block in dict.fromkeys([shape.row_length // shape.blocks, shape.row_length]):
        for split in (False, True):
            plans.append(Plan(shape, _fill_boxes(length_B, groups, shape, block, split=split)))
            if plans[-1].count <= min(fewest, shape.micro_batches):
                return plans[-1]
    best = min(plans, key=lambda plan: plan.count)
    if best.count > shape.micro_batches:
        raise LossError(
            f"{len(groups)} groups of {tokens} tokens must fit {shape.micro_batches} micro-batches of {shape.rows} "
            f"rows and {shape.prompts} prompts: they need {best.count}. Raise micro_batches; PackShape.for_rollout "
            "computes what is always enough."
        )
    return best


def _fill_boxes(
    length_B: list[int], groups: list[list[int]], shape: PackShape, block: int, *, split: bool
) -> list[Box]:
    """Fill boxes in turn: with the largest group that fits whole, and again; then, if allowed, with a part of one."""
    boxes: list[Box] = []
    left = list(groups)
    while left:
        box = Box([], [Row(shape.row_length, block) for _ in range(shape.rows // shape.shards)])
        while left and len(box.prompts) < shape.prompts // shape.shards:
            tries = ((at, *_with_group(length_B, group, box, whole=True)) for at, group in enumerate(left))
            whole = next((result for result in tries if not result[2]), None)
            at, rows, rest = whole or (0, *_with_group(length_B, left[0], box))
            if len(rest) == len(left[at]) or (rest and box.prompts and not split):
                break
            box = Box([*box.prompts, left[at][0]], rows)
            left[at : at + 1] = [rest] if rest else []
            if rest:
                break
        boxes.append(box)
    return boxes


def _plan_sizes(length_B: list[int], prompt_length_B: list[int], groups: list[list[int]], shape: PackShape) -> Plan:
    """Micro-batches of several sizes, by a beam search: the beginnings that cost least for a token they hold go on."""
    fixed = _FIXED_COST * shape.largest.positions
    beam, whole = [_Beginning(0.0, 0, groups, [], [])], None
    while beam:
        longer: dict[tuple, _Beginning] = {}
        for begun in beam:
            for index, size in enumerate(shape.sizes):
                filled, left = _fill_size(length_B, prompt_length_B, begun.left, size, shape)
                if not any(box.prompts for box in filled):
                    continue
                held = sum(length_B[b] for box in filled for row in box.rows for b, _ in row.placed)
                held += sum(prompt_length_B[b] - 1 for box in filled for b in box.prompts)
                cost, chosen = begun.cost + size.positions + fixed, [*begun.chosen, index]
                after = _Beginning(cost, begun.held + held, left, begun.boxes + filled, chosen)
                if not left:
                    whole = min(whole or after, after, key=_Beginning.rank)
                    continue
                what_is_left = tuple(map(tuple, left))
                longer[what_is_left] = min(longer.get(what_is_left, after), after, key=_Beginning.rank)
        useful = (begun for begun in longer.values() if whole is None or begun.cost < whole.cost)
        beam = sorted(useful, key=lambda begun: (begun.cost / max(1, begun.held), begun.chosen))[:_BEAM]
    return Plan(shape, whole.boxes, whole.chosen) if whole else Plan(shape, [], [])


@dataclass(frozen=True)
class _Beginning:
    """The first micro-batches of a plan.

    Args:
        cost: token positions that they compute, and what each costs besides.
        held: tokens in them.
        left: groups, or what is left of one, for those to come.
        boxes, chosen: as of a `Plan`.
    """

    cost: float
    held: int
    left: list[list[int]]
    boxes: list[Box]
    chosen: list[int]

    def rank(self) -> tuple[float, list[int]]:
        """Which of two that leave the same is better."""
        return self.cost, self.chosen


def _fill_size(
    length_B: list[int], prompt_length_B: list[int], groups: list[list[int]], size: MicroSize, shape: PackShape
) -> tuple[list[Box], list[list[int]]]:
    """The boxes of one micro-batch of this size, with groups that fit whole; and the groups that are left.

    Only the largest size takes a part of a group, the first, where no box would hold all of it.
    """
    tries = []
    # A box at a time packs closest where groups are many; where they all fit just about, they must be spread.
    for spread in (False, True):
        boxes, left = _fill_in_order(length_B, prompt_length_B, groups, size, shape, spread=spread)
        if not left:
            return boxes, left
        tries.append((sum(_tokens(length_B, group) for group in left), spread, boxes, left))
        if shape.shards == 1:
            break
    _, _, boxes, left = min(tries, key=lambda choice: choice[:2])
    return boxes, left


def _fill_in_order(
    length_B: list[int],
    prompt_length_B: list[int],
    groups: list[list[int]],
    size: MicroSize,
    shape: PackShape,
    *,
    spread: bool,
) -> tuple[list[Box], list[list[int]]]:
    """`_fill_size`, with each group in the first box that holds it, or in the emptiest."""
    shards, left = range(shape.shards), []
    block = size.row_length // (shape.blocks if size.prompts > shape.shards else 1)
    rows, slots = size.rows // shape.shards, size.prompts // shape.shards
    boxes = [Box([], [Row(size.row_length, block) for _ in range(rows)]) for _ in shards]
    room = [box.room() for box in boxes]
    for group in groups:
        longest, tokens = length_B[group[0]], _tokens(length_B, group)
        fitting = [
            at
            for at in shards
            if longest <= room[at][0] and tokens <= room[at][1] and len(boxes[at].prompts) < slots
            if prompt_length_B[group[0]] - 1 <= size.prompt_length
        ]
        for at in sorted(fitting, key=lambda shard: -room[shard][1]) if spread else fitting:
            filled, rest = _with_group(length_B, group, boxes[at], whole=True)
            if not rest:
                boxes[at] = Box([*boxes[at].prompts, group[0]], filled)
                room[at] = boxes[at].room()
                break
        else:
            left.append(group)
    for at in shards if size == shape.largest else ():
        if left and not boxes[at].prompts:
            filled, rest = _with_group(length_B, left[0], boxes[at])
            boxes[at] = Box([left[0][0]], filled)
            left[:1] = [rest] if rest else []
    return boxes, left


def _with_group(length_B: list[int], group: list[int], box: Box, *, whole: bool = False) -> tuple[list[Row], list[int]]:
    """The rows with those of a group's sequences that fit, each where it leaves the least room; and the other ones.

    With `whole`, none is placed unless all fit.
    """
    slot, rows, rest = len(box.prompts), list(box.rows), []
    room, changed = [row.length - row.start(slot) for row in rows], set[int]()
    for b in group:
        length = length_B[b]
        _, at = min(((left - length, at) for at, left in enumerate(room) if left >= length), default=(0, -1))
        if at >= 0:
            if at not in changed:
                rows[at] = rows[at].copy()
                changed.add(at)
            rows[at].place(b, length, slot)
            room[at] = rows[at].length - rows[at].start(slot)
        elif whole:
            return box.rows, group
        else:
            rest.append(b)
    return rows, rest


def _tokens(length_B: list[int], sequences: list[int]) -> int:
    return sum(length_B[b] for b in sequences)
