"""From ragged completions to rows of one length: a group's prompt once, its completions side by side.

Runs on the host in numpy and is deterministic: every process that packs the same rollout gets the same arrays, so
that each can place its own shard of them without talking to the others.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from ._errors import LossError, check_shape
from ._layout import MicroBatch, PackedBatch


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


def pack(
    tokens_BT: Int[np.ndarray, "B T"],
    prompt_length_B: Int[np.ndarray, "B"],
    total_length_B: Int[np.ndarray, "B"],
    group_B: Int[np.ndarray, "B"],
    loss_mask_BT: Bool[np.ndarray, "B T"] | None = None,
    *,
    shape: PackShape | Sequence[PackShape],
    keep_B: Bool[np.ndarray, "B"] | None = None,
    pad_id: int = 0,
) -> PackedBatch:
    """Packs completions into rows by best fit of the longest first; the completions of a row share one prompt.

    Rows of a group stay in one micro-batch where they fit, so that its prompt is computed once.

    Args:
        tokens_BT: Prompt, completion, padding.
        prompt_length_B: Tokens of the prompt.
        total_length_B: Tokens of prompt and completion.
        group_B: Group of each sequence; all sequences of a group have the same prompt.
        loss_mask_BT: Tokens that count in the loss; all completion tokens if None.
        shape: Sizes of the result. Of several, the one that computes the fewest positions is used.
        keep_B: Sequences to pack; the others take no room and count for nothing. All if None.
        pad_id: Token at pads.

    Returns:
        The packed batch, of numpy arrays.

    Raises:
        LossError: Lengths or groups contradict each other, or the batch does not fit the shape.
    """
    length_B = _check(tokens_BT, prompt_length_B, total_length_B, group_B, loss_mask_BT, keep_B)
    live_B = (length_B > 0) if keep_B is None else (length_B > 0) & keep_B
    members = [np.flatnonzero(live_B & (group_B == group)) for group in np.unique(group_B[live_B])]
    problems, plans = [], []
    for candidate in [shape] if isinstance(shape, PackShape) else shape:
        try:
            plans.append(_plan(length_B, prompt_length_B, members, candidate))
        except LossError as misfit:
            problems.append(str(misfit))
    if not plans:
        raise LossError(" ".join(problems) or "shape must name at least one PackShape: got an empty sequence.")
    plan = min(plans, key=lambda plan: plan.cost)
    if loss_mask_BT is None:
        loss_mask_BT = np.ones(tokens_BT.shape, bool)
    return _build(tokens_BT, prompt_length_B, length_B, loss_mask_BT, plan, pad_id)


def pad(
    tokens_BT: Int[np.ndarray, "B T"],
    prompt_length_B: Int[np.ndarray, "B"],
    total_length_B: Int[np.ndarray, "B"],
    loss_mask_BT: Bool[np.ndarray, "B T"] | None = None,
    *,
    rows: int,
    keep_B: Bool[np.ndarray, "B"] | None = None,
    pad_id: int = 0,
) -> PackedBatch:
    """The plain layout in the same structure: a row is one whole sequence, nothing is shared.

    Args:
        tokens_BT: Prompt, completion, padding.
        prompt_length_B: Tokens of the prompt.
        total_length_B: Tokens of prompt and completion.
        loss_mask_BT: Tokens that count in the loss; all completion tokens if None.
        rows: Sequences of a micro-batch.
        keep_B: Sequences to lay out; all if None.
        pad_id: Token at pads.

    Returns:
        The batch, with one empty prompt slot a row and as many micro-batches as all B sequences need.

    Raises:
        LossError: Lengths contradict each other or the arrays' shapes.
    """
    sequences, length = tokens_BT.shape
    length_B = _check(tokens_BT, prompt_length_B, total_length_B, np.arange(sequences), loss_mask_BT, keep_B)
    live = np.flatnonzero(length_B > 0 if keep_B is None else (length_B > 0) & keep_B)
    micro_batches = max(1, -(-sequences // rows))
    target_in_row = np.arange(1, length + 1)
    inside_RT = target_in_row < total_length_B[live, None]
    shape_RT = (micro_batches * rows, length)

    def laid_out(value_RT: np.ndarray, pad: int, dtype: type = np.int32) -> np.ndarray:
        out_RT = np.full(shape_RT, pad, dtype)
        out_RT[: len(live)] = np.where(inside_RT, value_RT, pad)
        return out_RT.reshape(micro_batches, rows, length)

    source_RT = live[:, None] * length + np.minimum(target_in_row, length - 1)
    counts_RT = target_in_row >= prompt_length_B[live, None]
    mask_RT = counts_RT if loss_mask_BT is None else counts_RT & loss_mask_BT.reshape(-1)[source_RT]
    micro = MicroBatch(
        prompt_tokens_PT=np.full((micro_batches, rows, 1), pad_id, np.int32),
        prompt_length_P=np.zeros((micro_batches, rows), np.int32),
        tokens_RT=laid_out(tokens_BT[live], pad_id),
        target_RT=laid_out(tokens_BT.reshape(-1)[source_RT], pad_id),
        positions_RT=laid_out(target_in_row - 1, 0),
        segment_RT=laid_out(np.int32(1), 0),
        prompt_R=np.tile(np.arange(rows, dtype=np.int32), (micro_batches, 1)),
        source_RT=laid_out(np.where(counts_RT, source_RT, -1), -1),
        sequence_RT=laid_out(live[:, None], -1),
        mask_RT=laid_out(mask_RT, 0, np.bool_),
    )
    return PackedBatch(micro, np.asarray(-(-len(live) // rows), np.int32))


def split_minibatches(
    group_B: Int[np.ndarray, "B"], count: int, *, seed: int, step: int, epoch: int, whole_groups: bool = True
) -> list[Bool[np.ndarray, "B"]]:
    """Parts of a rollout for several optimizer steps, drawn anew in every epoch: ``keep_B`` masks for `pack`.

    Args:
        group_B: Group of each sequence.
        count: Minibatches, whose sizes differ by at most one group (or sequence).
        seed: Of the run.
        step: Rollouts so far.
        epoch: Passes over this rollout so far.
        whole_groups: Keep groups together, so that prompts are shared; otherwise deal out single sequences.

    Returns:
        One mask a minibatch. They are disjoint, cover all sequences, and depend on the arguments alone.

    Raises:
        LossError: Fewer groups (or sequences) than minibatches.
    """
    _, unit_B = np.unique(group_B, return_inverse=True)
    if not whole_groups:
        unit_B = np.arange(len(group_B))
    units = int(unit_B.max(initial=-1)) + 1
    if not 1 <= count <= units:
        what = "groups" if whole_groups else "sequences"
        raise LossError(f"count must be between 1 and the {units} {what} of the rollout: got {count}.")
    order = np.random.default_rng([seed, step, epoch]).permutation(units)
    return [np.isin(unit_B, part) for part in np.array_split(order, count)]


@dataclass(frozen=True)
class _Plan:
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


def _plan(length_B: np.ndarray, prompt_length_B: np.ndarray, members: list[np.ndarray], shape: PackShape) -> _Plan:
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
            return _Plan(shape, bins)
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


def _build(
    tokens_BT: np.ndarray,
    prompt_length_B: np.ndarray,
    length_B: np.ndarray,
    loss_mask_BT: np.ndarray,
    plan: _Plan,
    pad_id: int,
) -> PackedBatch:
    shape, length = plan.shape, tokens_BT.shape[1]
    rows, slots = shape.rows // shape.shards, shape.prompts // shape.shards
    prompt_tokens = np.full((shape.micro_batches * shape.prompts, shape.prompt_length), pad_id, np.int32)
    prompt_length = np.zeros(shape.micro_batches * shape.prompts, np.int32)
    prompt_R = np.repeat(np.arange(shape.micro_batches * shape.shards) % shape.shards * slots, rows).astype(np.int32)
    placed: list[tuple[int, int, int]] = []  # sequence, flat position of its first token, segment
    for at, contents in enumerate(plan.bins):
        row = at * rows
        for slot, (first, prompt_rows) in enumerate(contents):
            shared = int(prompt_length_B[first]) - 1
            prompt_tokens[at * slots + slot, :shared] = tokens_BT[first, :shared]
            prompt_length[at * slots + slot] = shared
            for sequences in prompt_rows:
                prompt_R[row] = at % shape.shards * slots + slot
                starts = row * shape.row_length + np.cumsum([0, *length_B[sequences]])
                placed.extend((b, int(start), segment) for segment, (b, start) in enumerate(zip(sequences, starts), 1))
                row += 1
    b_S, start_S, segment_S = np.asarray(placed, np.int64).reshape(-1, 3).T
    length_S = length_B[b_S]
    step_N = np.arange(length_S.sum()) - np.repeat(np.cumsum(length_S) - length_S, length_S)
    at_N = np.repeat(start_S, length_S) + step_N
    input_N = np.repeat(prompt_length_B[b_S] - 1, length_S) + step_N
    b_N = np.repeat(b_S, length_S)
    source_N = b_N * length + input_N + 1

    def scattered(value_N: np.ndarray, pad: int, dtype: type = np.int32) -> np.ndarray:
        out = np.full(shape.micro_batches * shape.rows * shape.row_length, pad, dtype)
        out[at_N] = value_N
        return out.reshape(shape.micro_batches, shape.rows, shape.row_length)

    flat_tokens = tokens_BT.reshape(-1)
    micro = MicroBatch(
        prompt_tokens_PT=prompt_tokens.reshape(shape.micro_batches, shape.prompts, shape.prompt_length),
        prompt_length_P=prompt_length.reshape(shape.micro_batches, shape.prompts),
        tokens_RT=scattered(flat_tokens[source_N - 1], pad_id),
        target_RT=scattered(flat_tokens[source_N], pad_id),
        positions_RT=scattered(input_N, 0),
        segment_RT=scattered(np.repeat(segment_S, length_S), 0),
        prompt_R=prompt_R.reshape(shape.micro_batches, shape.rows),
        source_RT=scattered(source_N, -1),
        sequence_RT=scattered(b_N, -1),
        mask_RT=scattered(loss_mask_BT.reshape(-1)[source_N], 0, np.bool_),
    )
    return PackedBatch(micro, np.asarray(plan.count, np.int32))


def _check(
    tokens_BT: np.ndarray,
    prompt_length_B: np.ndarray,
    total_length_B: np.ndarray,
    group_B: np.ndarray,
    loss_mask_BT: np.ndarray | None,
    keep_B: np.ndarray | None,
) -> np.ndarray:
    """Refuses what would be packed into nonsense; returns completion lengths."""
    if tokens_BT.ndim != 2:
        raise LossError(f"tokens_BT must have two axes, sequences and positions: got shape {tokens_BT.shape}.")
    sequences, length = tokens_BT.shape
    check_shape("prompt_length_B", prompt_length_B.shape, (sequences,))
    check_shape("total_length_B", total_length_B.shape, (sequences,))
    check_shape("group_B", group_B.shape, (sequences,))
    if loss_mask_BT is not None:
        check_shape("loss_mask_BT", loss_mask_BT.shape, (sequences, length))
    if keep_B is not None:
        check_shape("keep_B", keep_B.shape, (sequences,))
    bad = (prompt_length_B < 1) | (total_length_B < prompt_length_B) | (total_length_B > length)
    if bad.any():
        b = int(bad.argmax())
        raise LossError(
            f"1 <= prompt_length_B <= total_length_B <= {length} must hold: sequence {b} has prompt_length "
            f"{int(prompt_length_B[b])} and total_length {int(total_length_B[b])}. A prompt needs at least one token."
        )
    _, first, group_of_B = np.unique(group_B, return_index=True, return_inverse=True)
    leader_B = first[group_of_B]
    in_prompt_BT = np.arange(length) < prompt_length_B[:, None]
    differs = (prompt_length_B != prompt_length_B[leader_B]) | (in_prompt_BT & (tokens_BT != tokens_BT[leader_B])).any(
        axis=1
    )
    if differs.any():
        b = int(differs.argmax())
        raise LossError(
            f"Sequences of a group must have the same prompt: sequence {b} differs from sequence {int(leader_B[b])} of "
            f"group {int(group_B[b])}. Give each prompt its own group."
        )
    return total_length_B.astype(np.int64) - prompt_length_B
