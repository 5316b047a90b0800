"""From ragged completions to rows of one length: a group's prompt once, its completions side by side.

Runs on the host in numpy and is deterministic: every process that packs the same rollout gets the same arrays, so
that each can place its own shard of them without talking to the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import ArrayLike
from jaxtyping import Bool

from grpo_contracts import TrainBatch
from grpo_loss._aggregate import Aggregation, token_weights
from grpo_loss._batch_arrays import BatchArrays, check_groups
from grpo_loss._errors import LossError
from grpo_loss._layout import MicroBatch, PackedBatch
from grpo_loss._plan import Plan, make_plan
from grpo_loss._shape import PackShape


def pack(
    batch: TrainBatch,
    *,
    shape: PackShape | Sequence[PackShape],
    keep_B: Bool[ArrayLike, "B"] | None = None,
    idle: Aggregation | None = None,
) -> PackedBatch:
    """Pack completions into rows, the longest first and each where it leaves the least room.

    The completions of a row's block share one prompt. A group stays in one micro-batch where that costs no further
    one, so that its prompt is computed once.

    Args:
        batch: a scored rollout with advantages, one per sequence [B] or per token [B, T]. Its arrays may be numpy's,
            jax's or lists.
        shape: sizes of the result. Of several, the one that computes the fewest positions is used.
        keep_B: sequences to pack; the others take no room and count for nothing. Unscored ones are never packed.
        idle: leave out sequences whose advantages are all 0, and count them in the denominator as this aggregation of
            the loss does. The gradient is the same, unless the loss has a KL or entropy term: then leave it None.

    Returns:
        The packed batch, of numpy arrays.

    Raises:
        LossError: lengths, groups or shapes contradict each other, or the batch does not fit the shape.
    """
    arrays = BatchArrays.of(batch, keep_B, without_idle=idle is not None)
    group_B, length_B = check_groups(batch, arrays), arrays.total_length_B - arrays.prompt_length_B
    live_B = arrays.live_B
    members = [np.flatnonzero(live_B & (group_B == group)) for group in np.unique(group_B[live_B])]
    problems, plans = [], []
    for candidate in [shape] if isinstance(shape, PackShape) else shape:
        try:
            plans.append(make_plan(length_B, arrays.prompt_length_B, members, candidate))
        except LossError as misfit:
            problems.append(str(misfit))
    if not plans:
        raise LossError(" ".join(problems) or "shape must name at least one PackShape: got an empty sequence.")
    packed = _build(arrays, min(plans, key=lambda plan: plan.cost))
    if idle is None:
        return packed
    # All rows, so that jax sees one shape whatever was left out: a row without a token that counts weighs nothing.
    _, denominator = token_weights(jnp.asarray(arrays.loss_mask_BT & arrays.idle_B[:, None]), idle, None, jnp.float32)
    return replace(packed, idle=np.asarray(denominator, np.float32))


def pad(batch: TrainBatch, *, rows: int, keep_B: Bool[ArrayLike, "B"] | None = None) -> PackedBatch:
    """The plain layout in the same structure: a row is one whole sequence, nothing is shared.

    Args:
        batch: as for `pack`.
        rows: sequences of a micro-batch.
        keep_B: sequences to lay out. Unscored ones never are.

    Returns:
        The batch, with one empty prompt slot per row and as many micro-batches as all B sequences need.

    Raises:
        LossError: lengths or shapes contradict each other, or `rows` is below 1.
    """
    if rows < 1:
        raise LossError(f"rows must be at least 1: got {rows}.")
    arrays = BatchArrays.of(batch, keep_B)
    tokens_BT, pad_id = arrays.tokens_BT, arrays.pad_id
    sequences, length = tokens_BT.shape
    live = np.flatnonzero(arrays.live_B)
    micro_batches = max(1, -(-sequences // rows))
    target_in_row = np.arange(1, length + 1)
    inside_RT = target_in_row < arrays.total_length_B[live, None]
    shape_RT = (micro_batches * rows, length)

    def laid_out(value_RT: np.ndarray, pad: int, dtype: type = np.int32) -> np.ndarray:
        out_RT = np.full(shape_RT, pad, dtype)
        out_RT[: len(live)] = np.where(inside_RT, value_RT, pad)
        return out_RT.reshape(micro_batches, rows, length)

    source_RT = live[:, None] * length + np.minimum(target_in_row, length - 1)
    counts_RT = target_in_row >= arrays.prompt_length_B[live, None]
    return arrays.packed(
        micro_batches=-(-len(live) // rows),
        prompt_tokens_PT=np.full((micro_batches, rows, 1), pad_id, np.int32),
        prompt_length_P=np.zeros((micro_batches, rows), np.int32),
        tokens_RT=laid_out(tokens_BT[live], pad_id),
        target_RT=laid_out(tokens_BT.reshape(-1)[source_RT], pad_id),
        positions_RT=laid_out(target_in_row - 1, 0),
        segment_RT=laid_out(np.ones_like(source_RT), 0),
        prompt_RC=np.tile(np.arange(rows, dtype=np.int32)[:, None], (micro_batches, 1, 1)),
        source_RT=laid_out(np.where(counts_RT, source_RT, -1), -1),
        sequence_RT=laid_out(live[:, None], -1),
        mask_RT=laid_out(counts_RT & arrays.loss_mask_BT.reshape(-1)[source_RT], 0, np.bool_),
    )


def abstract_batch(
    shape: PackShape,
    *,
    rows_sharding: Sharding | None = None,
    count_sharding: Sharding | None = None,
    old: bool = False,
    reference: bool = False,
) -> PackedBatch:
    """What `pack` returns, as shapes: to compile an update or a scoring pass before there is a rollout.

    Args:
        shape: sizes of the batch.
        rows_sharding: of every array [M, R, ...] and [M, P, ...]; for example
            `NamedSharding(mesh, PartitionSpec(None, ("dp", "fsdp")))`.
        count_sharding: of the two scalars.
        old: whether the batch carries old log-probabilities.
        reference: whether it carries those of a reference.

    Returns:
        A batch of `jax.ShapeDtypeStruct`.
    """

    def array(*sizes: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((shape.micro_batches, *sizes), dtype, sharding=rows_sharding)

    tokens = partial(array, shape.rows, shape.row_length)
    micro = MicroBatch(
        prompt_tokens_PT=array(shape.prompts, shape.prompt_length),
        prompt_length_P=array(shape.prompts),
        tokens_RT=tokens(),
        target_RT=tokens(),
        positions_RT=tokens(),
        segment_RT=tokens(),
        prompt_RC=array(shape.rows, shape.blocks),
        source_RT=tokens(),
        sequence_RT=tokens(),
        mask_RT=tokens(dtype=np.bool_),
        advantage_RT=tokens(dtype=np.float32),
        sampler_logp_RT=tokens(dtype=np.float32),
        old_logp_RT=tokens(dtype=np.float32) if old else None,
        reference_logp_RT=tokens(dtype=np.float32) if reference else None,
    )
    count, idle = (jax.ShapeDtypeStruct((), dtype, sharding=count_sharding) for dtype in (np.int32, np.float32))
    if not shape.smaller:
        return PackedBatch(micro, count, idle, shards=shape.shards)
    size_M = jax.ShapeDtypeStruct((shape.micro_batches,), np.int32, sharding=count_sharding)
    return PackedBatch(micro, count, idle, size_M, shape.sizes, shape.shards)


def _build(arrays: BatchArrays, plan: Plan) -> PackedBatch:
    shape, length = plan.shape, arrays.tokens_BT.shape[1]
    prompt_length_B, length_B = arrays.prompt_length_B, arrays.total_length_B - arrays.prompt_length_B
    rows, slots = shape.rows // shape.shards, shape.prompts // shape.shards
    prompt_tokens = np.full((shape.micro_batches * shape.prompts, shape.prompt_length), arrays.pad_id, np.int32)
    prompt_length = np.zeros(shape.micro_batches * shape.prompts, np.int32)
    first_slot = np.arange(shape.micro_batches * shape.shards) % shape.shards * slots
    prompt_RC = np.repeat(first_slot, rows)[:, None].repeat(shape.blocks, axis=1).astype(np.int32)
    placed: list[tuple[int, int, int]] = []  # sequence, flat position of its first token, segment
    for at, box in enumerate(plan.boxes):
        for slot, first in enumerate(box.prompts):
            shared = int(prompt_length_B[first]) - 1
            prompt_tokens[at * slots + slot, :shared] = arrays.tokens_BT[first, :shared]
            prompt_length[at * slots + slot] = shared
        for r, row in enumerate(box.rows, at * rows):
            # A row that was filled as one block has the one slot in every block.
            used = np.asarray(row.slots, np.int32).repeat(row.block * shape.blocks // row.length)
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

    flat_tokens = arrays.tokens_BT.reshape(-1)
    packed = arrays.packed(
        micro_batches=plan.count,
        prompt_tokens_PT=prompt_tokens.reshape(shape.micro_batches, shape.prompts, shape.prompt_length),
        prompt_length_P=prompt_length.reshape(shape.micro_batches, shape.prompts),
        tokens_RT=scattered(flat_tokens[source_N - 1], arrays.pad_id),
        target_RT=scattered(flat_tokens[source_N], arrays.pad_id),
        positions_RT=scattered(input_N, 0),
        segment_RT=scattered(np.repeat(segment_S, length_S), 0),
        prompt_RC=prompt_RC.reshape(shape.micro_batches, shape.rows, shape.blocks),
        source_RT=scattered(source_N, -1),
        sequence_RT=scattered(b_N, -1),
        mask_RT=scattered(arrays.loss_mask_BT.reshape(-1)[source_N], 0, np.bool_),
    )
    if not shape.smaller:
        return replace(packed, shards=shape.shards)
    size_M = np.zeros(shape.micro_batches, np.int32)
    size_M[: plan.count] = plan.sizes
    return replace(packed, size_M=size_M, sizes=shape.sizes, shards=shape.shards)
