"""From ragged completions to rows of one length: a group's prompt once, its completions side by side.

Runs on the host in numpy and is deterministic: every process that packs the same rollout gets the same arrays, so
that each can place its own shard of them without talking to the others.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from grpo_loss._plan import PackShape, Plan, make_plan

from ._errors import LossError, check_shape
from ._layout import MicroBatch, PackedBatch


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
    """Packs completions into rows by best fit of the longest first; the completions of a row's block share one prompt.

    A group stays in one micro-batch where that costs no further one, so that its prompt is computed once.

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
            plans.append(make_plan(length_B, prompt_length_B, members, candidate))
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
        segment_RT=laid_out(np.ones_like(source_RT), 0),
        prompt_RC=np.tile(np.arange(rows, dtype=np.int32)[:, None], (micro_batches, 1, 1)),
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


def _build(
    tokens_BT: np.ndarray,
    prompt_length_B: np.ndarray,
    length_B: np.ndarray,
    loss_mask_BT: np.ndarray,
    plan: Plan,
    pad_id: int,
) -> PackedBatch:
    shape, length = plan.shape, tokens_BT.shape[1]
    rows, slots = shape.rows // shape.shards, shape.prompts // shape.shards
    prompt_tokens = np.full((shape.micro_batches * shape.prompts, shape.prompt_length), pad_id, np.int32)
    prompt_length = np.zeros(shape.micro_batches * shape.prompts, np.int32)
    first_slot = np.arange(shape.micro_batches * shape.shards) % shape.shards * slots
    prompt_RC = np.repeat(first_slot, rows)[:, None].repeat(shape.blocks, axis=1).astype(np.int32)
    placed: list[tuple[int, int, int]] = []  # sequence, flat position of its first token, segment
    for at, box in enumerate(plan.boxes):
        for slot, first in enumerate(box.prompts):
            shared = int(prompt_length_B[first]) - 1
            prompt_tokens[at * slots + slot, :shared] = tokens_BT[first, :shared]
            prompt_length[at * slots + slot] = shared
        for r, row in enumerate(box.rows, at * rows):
            # A row that was filled as one block has the one slot in every block.
            used = np.asarray(row.slots, np.int32).repeat(row.block * shape.blocks // shape.row_length)
            prompt_RC[r, : len(used)] += used
            placed.extend(
                (b, r * shape.row_length + start, segment) for segment, (b, start) in enumerate(row.placed, 1)
            )
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
        prompt_RC=prompt_RC.reshape(shape.micro_batches, shape.rows, shape.blocks),
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
