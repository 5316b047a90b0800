"""Which row a completion goes to, and which micro-batch and shard a row goes to: two bin packings."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from grpo_loss._errors import LossError


@dataclass(frozen=True)
class PackShape:
    """Sizes of a packed batch: what the compiler sees, so keep few of them.

    Args:
        row_length: Token positions of a row; at least the longest completion.
        rows: Rows of a micro-batch, over all shards.
        prompts: Prompt slots of a micro-batch, over all shards. A slot costs its computation whether used or not.
        prompt_length: Token positions of a prompt slot; at least the longest prompt less one.
        micro_batches: Most micro-batches a batch may need.
        shards: Equal blocks that rows and prompts are cut in: the product of the mesh's data axes.
    """

    row_length: int
    rows: int
    prompts: int
    prompt_length: int
    micro_batches: int
    shards: int = 1

    def __post_init__(self) -> None:
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
    ) -> "PackShape":
        """A shape with room for every outcome of a rollout.

        Args:
            sequences: Sequences of the rollout, B.
            groups: Groups of the rollout; each has at most ``ceil(sequences / groups)`` sequences.
            max_prompt_length: Longest prompt, in tokens.
            max_new_tokens: Longest completion, in tokens.
            rows: Rows of a micro-batch.
            row_length: Tokens of a row; ``max_new_tokens`` if None.
            prompts: Prompt slots of a micro-batch; if None half its rows, for groups that need two rows or more.
            shards: Product of the mesh's data axes.

        Returns:
            The shape, with enough micro-batches for all completions at their limit.

        Raises:
            LossError: A size is below 1, does not divide by the shards, or a completion cannot fit a row.
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
        full_bins = -(-groups * group_rows // shard_rows)
        shard_prompts = max(1, prompts // shards)
        # Bins closed for want of a prompt slot: a group sits in one bin, plus one for every bin it filled up.
        slot_bins = 0 if shard_prompts >= shard_rows else -(-(groups + full_bins) // shard_prompts)
        micro_batches = -(-(full_bins + slot_bins) // shards)
        return cls(row_length, rows, prompts, max(1, max_prompt_length - 1), micro_batches, shards)


@dataclass(frozen=True)
class Plan:
    """Where everything goes: bins are (micro-batch, shard) in order; a bin lists (prompt's sequence, its rows)."""

    shape: PackShape
    bins: list[list[tuple[int, list[list[int]]]]]

    @property
    def count(self) -> int:
        return -(-len(self.bins) // self.shape.shards)

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
    rows_of = [_fill_rows(length_B, group, shape.row_length) for group in members]
    total = sum(map(len, rows_of))
    fewest = max(-(-total * shape.shards // shape.rows), -(-len(members) * shape.shards // shape.prompts))
    for micro_batches in range(-(-fewest // shape.shards), shape.micro_batches + 1):
        bins = _assign(members, rows_of, micro_batches * shape.shards, shape)
        if bins is not None:
            return Plan(shape, bins)
    raise LossError(
        f"{total} rows of {len(members)} groups must fit {shape.micro_batches} micro-batches of {shape.rows} rows and "
        f"{shape.prompts} prompts. Raise micro_batches; PackShape.for_rollout computes what is always enough."
    )


def _fill_rows(length_B: np.ndarray, group: np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of sequences: longest first, each into the fullest row that still has room."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for b in sorted(group.tolist(), key=lambda b: (-length_B[b], b)):
        length = int(length_B[b])
        at = bisect_left(free, (length, -1))
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(b)
        insort(free, (room - length, row))
    return rows


def _assign(
    members: list[np.ndarray], rows_of: list[list[list[int]]], count: int, shape: PackShape
) -> list[list[tuple[int, list[list[int]]]]] | None:
    """Groups to bins: whole ones first, largest first, best fit; what is left is split. None if it does not fit."""
    row_room = [shape.rows // shape.shards] * count
    slot_room = [shape.prompts // shape.shards] * count
    bins: list[list[tuple[int, list[list[int]]]]] = [[] for _ in range(count)]

    def place(at: int, group: int, rows: list[list[int]]) -> None:
        bins[at].append((int(members[group][0]), rows))
        row_room[at] -= len(rows)
        slot_room[at] -= 1

    left: list[tuple[int, list[list[int]]]] = []
    for group in sorted(range(len(members)), key=lambda group: (-len(rows_of[group]), group)):
        rows = rows_of[group]
        fitting = [at for at in range(count) if slot_room[at] and row_room[at] >= len(rows)]
        if fitting:
            place(min(fitting, key=lambda at: (row_room[at], at)), group, rows)
        else:
            left.append((group, rows))
    for group, rows in left:
        while rows:
            open_bins = [at for at in range(count) if slot_room[at] and row_room[at]]
            if not open_bins:
                return None
            at = max(open_bins, key=lambda at: (row_room[at], -at))
            room = row_room[at]
            place(at, group, rows[:room])
            rows = rows[room:]
    return bins
