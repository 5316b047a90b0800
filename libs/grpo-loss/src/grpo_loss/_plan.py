"""Which row, micro-batch and shard a completion goes to. A box is one shard of one micro-batch."""

from dataclasses import dataclass, field

import numpy as np

from grpo_loss._errors import LossError


@dataclass(frozen=True)
class PackShape:
    """Sizes of a packed batch. The compiler sees them, so use few different ones.

    Args:
        row_length: token positions of a row; at least the longest completion.
        rows: rows of a micro-batch, over all shards.
        prompts: prompt slots of a micro-batch, over all shards. A slot is computed whether used or not.
        prompt_length: token positions of a prompt slot; at least the longest prompt less one.
        micro_batches: most micro-batches a batch may need.
        shards: equal blocks that rows and prompts are cut into: the product of the mesh's data axes.
        blocks: equal parts of a row that may each continue another prompt. More of them fill rows better, and let
            attention leave out what lies behind a part; each costs the network a copy of a prompt's keys and values.

    Raises:
        LossError: a size is below 1, or does not divide as it must.
    """

    row_length: int
    rows: int
    prompts: int
    prompt_length: int
    micro_batches: int
    shards: int = 1
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.row_length % self.blocks:
            raise LossError(
                f"PackShape.blocks must divide row_length={self.row_length}: got {self.blocks}. Use 1 for one prompt "
                "per row."
            )
        for name in ("row_length", "rows", "prompts", "prompt_length", "micro_batches", "shards"):
            if (value := getattr(self, name)) < 1:
                raise LossError(f"PackShape.{name} must be at least 1: got {value}.")
        for name in ("rows", "prompts"):
            if (value := getattr(self, name)) % self.shards:
                raise LossError(
                    f"PackShape.{name} must be a multiple of shards={self.shards}: got {value}. "
                    f"Use {-(-value // self.shards) * self.shards}."
                )

    @classmethod
    def for_rollout(
        cls,
        *,
        sequences: int,
        groups: int,
        max_prompt_length: int,
        max_new_tokens: int,
        rows: int,
        row_length: int | None = None,
        prompts: int | None = None,
        shards: int = 1,
        blocks: int = 1,
    ) -> "PackShape":
        """A shape with room for every outcome of a rollout.

        Args:
            sequences: sequences of the rollout, B.
            groups: groups of the rollout; each has at most `ceil(sequences / groups)` sequences.
            max_prompt_length: longest prompt, in tokens.
            max_new_tokens: longest completion, in tokens.
            rows: rows of a micro-batch.
            row_length: tokens of a row; None: `max_new_tokens`.
            prompts: prompt slots of a micro-batch; None: half its rows, for groups that need two rows or more.
            shards: product of the mesh's data axes.
            blocks: parts of a row that may each continue another prompt; must divide `row_length`.

        Returns:
            The shape, with enough micro-batches for all completions at their limit.

        Raises:
            LossError: a size is below 1, does not divide by the shards, or a completion cannot fit a row.
        """
        row_length = max_new_tokens if row_length is None else row_length
        if row_length < max_new_tokens:
            raise LossError(f"row_length must be at least max_new_tokens={max_new_tokens}: got {row_length}.")
        if rows % shards:
            raise LossError(f"rows must be a multiple of shards={shards}: got {rows}.")
        shard_rows = rows // shards
        prompts = shards * max(1, -(-shard_rows // 2)) if prompts is None else prompts
        # A row is opened only when no other has room, so at most one row of a group holds fewer completions than this.
        completions_per_row = row_length // max_new_tokens
        group_size = -(-sequences // groups)
        group_rows = -(-group_size // completions_per_row)
        full_boxes = -(-groups * group_rows // shard_rows)
        shard_prompts = max(1, prompts // shards)
        # Boxes closed for want of a prompt slot: a group takes one box, plus one for every box it filled up.
        slot_boxes = 0 if shard_prompts >= shard_rows else -(-(groups + full_boxes) // shard_prompts)
        micro_batches = -(-(full_boxes + slot_boxes) // shards)
        return cls(row_length, rows, prompts, max(1, max_prompt_length - 1), micro_batches, shards, blocks)


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


@dataclass(frozen=True)
class Plan:
    """Where everything goes: boxes are (micro-batch, shard) in order."""

    shape: PackShape
    boxes: list[Box]

    @property
    def count(self) -> int:
        return -(-len(self.boxes) // self.shape.shards)

    @property
    def cost(self) -> int:
        """Token positions computed."""
        return self.count * (self.shape.rows * self.shape.row_length + self.shape.prompts * self.shape.prompt_length)


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
    # Longest first, among groups and within a group.
    groups = [sorted(group.tolist(), key=lambda b: (-length_B[b], b)) for group in members]
    groups.sort(key=lambda group: (-int(length_B[group].sum()), group[0]))
    tokens = sum(int(length_B[group].sum()) for group in groups)
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
    length_B: np.ndarray, groups: list[list[int]], shape: PackShape, block: int, *, split: bool
) -> list[Box]:
    """Fill boxes in turn: with the largest group that fits whole, and again; then, if allowed, with a part of one."""
    boxes: list[Box] = []
    left = list(groups)
    while left:
        box = Box([], [Row(shape.row_length, block) for _ in range(shape.rows // shape.shards)])
        while left and len(box.prompts) < shape.prompts // shape.shards:
            tries = ((at, *_with_group(length_B, group, box)) for at, group in enumerate(left))
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


def _with_group(length_B: np.ndarray, group: list[int], box: Box) -> tuple[list[Row], list[int]]:
    """The rows with those of a group's sequences that fit, each where it leaves the least room; and the other ones."""
    rows, slot = [row.copy() for row in box.rows], len(box.prompts)
    rest = []
    for b in group:
        length = int(length_B[b])
        fitting = [(row.length - row.start(slot) - length, at) for at, row in enumerate(rows)]
        fitting = [choice for choice in fitting if choice[0] >= 0]
        if fitting:
            rows[min(fitting)[1]].place(b, length, slot)
        else:
            rest.append(b)
    return rows, rest
