"""Sizes of a packed batch: the few that its micro-batches may have, with room for every outcome of a rollout."""

import math
from dataclasses import dataclass, replace

from grpo_loss._errors import LossError
from grpo_loss._layout import MicroSize

# Smaller sizes of a micro-batch, the most useful first, as parts of the largest one's rows, row length, prompts and
# prompt length. Found by a greedy search over lengths of GSM8K; tools/bench_padding.py measures what they leave.
_PARTS = (
    (0.75, 0.9, 0.5, 0.75),
    (0.5, 0.9, 0.5, 0.65),
    (1, 1, 1, 0.5),
    (0.5, 0.8, 0.5, 0.75),
    (0.75, 0.8, 0.5, 0.75),
    (0.5, 0.65, 0.5, 0.5),
)
# Where a shard's part of a micro-batch has room for so many rows, it may hold a whole step of short completions: sizes
# for those of a fifth of their limit, then for longer ones.
_MANY_ROWS = 16
_PARTS_OF_MANY = (
    (0.3125, 0.75, 1, 0.8),
    (0.4375, 1, 1, 0.8),
    (0.5, 1, 1, 0.8),
    (0.625, 1, 1, 0.8),
    (0.25, 0.85, 1, 0.8),
    (0.375, 1, 1, 0.8),
)


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
        smaller: further sizes, one of which a micro-batch has instead where a batch computes fewer positions so. Each
            is a branch of the same program, compiled with it.

    Raises:
        LossError: a size is below 1, does not divide as it must, or is larger than the largest.
    """

    row_length: int
    rows: int
    prompts: int
    prompt_length: int
    micro_batches: int
    shards: int = 1
    blocks: int = 1
    smaller: tuple[MicroSize, ...] = ()

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
        for size in self.smaller:
            divides = not (size.row_length % self.blocks or size.rows % self.shards or size.prompts % self.shards)
            if not divides or min(size) < 1 or any(part > whole for part, whole in zip(size, self.largest)):
                raise LossError(
                    f"PackShape.smaller must hold sizes of at most {self.largest}, whose row_length divides by "
                    f"blocks={self.blocks}, and rows and prompts by shards={self.shards}: got {size}."
                )

    @property
    def largest(self) -> MicroSize:
        """The largest size of a micro-batch."""
        return MicroSize(self.rows, self.row_length, self.prompts, self.prompt_length)

    @property
    def sizes(self) -> tuple[MicroSize, ...]:
        """The sizes that a micro-batch may have, the largest first."""
        return (self.largest, *self.smaller)

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
        sizes: int = 1,
    ) -> "PackShape":
        """A shape with room for every outcome of a rollout.

        Args:
            sequences: sequences of the rollout, B.
            groups: groups of the rollout; each has at most `ceil(sequences / groups)` sequences.
            max_prompt_length: longest prompt, in tokens.
            max_new_tokens: longest completion, in tokens.
            rows: rows of a micro-batch.
            row_length: tokens of a row; None: `max_new_tokens`.
            prompts: prompt slots of a micro-batch; None: half its rows, for groups that need two rows or more, and no
                more than the rollout's prompts take.
            shards: product of the mesh's data axes.
            blocks: parts of a row that may each continue another prompt; must divide `row_length`.
            sizes: sizes that a micro-batch may have, the largest included: `smaller` gets up to one less. More of them
                leave less padding and take longer to compile.

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
        if not 1 <= sizes <= 1 + len(_PARTS):
            raise LossError(f"sizes must be between 1 and {1 + len(_PARTS)}: got {sizes}.")
        shard_rows = rows // shards
        prompts = shards * max(1, min(-(-shard_rows // 2), -(-groups // shards))) if prompts is None else prompts
        # A row is opened only when no other has room, so at most one row of a group holds fewer completions than this.
        completions_per_row = row_length // max_new_tokens
        group_size = -(-sequences // groups)
        group_rows = -(-group_size // completions_per_row)
        full_boxes = -(-groups * group_rows // shard_rows)
        shard_prompts = max(1, prompts // shards)
        # Boxes closed for want of a prompt slot: a group takes one box, plus one for every box it filled up.
        slot_boxes = 0 if shard_prompts >= shard_rows else -(-(groups + full_boxes) // shard_prompts)
        micro_batches = -(-(full_boxes + slot_boxes) // shards)
        shape = cls(row_length, rows, prompts, max(1, max_prompt_length - 1), micro_batches, shards, blocks)
        if sizes == 1:
            return shape
        parts = _PARTS if shard_rows < _MANY_ROWS else _PARTS_OF_MANY
        smaller = dict.fromkeys(_part(shape, *part) for part in parts[: sizes - 1])
        smaller.pop(shape.largest, None)
        if not smaller:
            return shape
        # Smaller micro-batches may be more of them; a batch that would need too many gets the largest size throughout.
        return replace(shape, micro_batches=2 * micro_batches, smaller=tuple(smaller))


def _part(shape: PackShape, *parts: float) -> MicroSize:
    """A part of each size, rounded up to what divides as it must; row and prompt lengths to multiples of eight."""
    steps = shape.shards, math.lcm(8, shape.blocks), shape.shards, 8
    return MicroSize(
        *(
            min(whole, math.ceil(whole * part / step) * step)
            for whole, part, step in zip(shape.largest, parts, steps, strict=True)
        )
    )
