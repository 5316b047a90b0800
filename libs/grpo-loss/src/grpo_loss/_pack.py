"""From ragged completions to rows of one length: a group's prompt once, its completions side by side.

Runs on the host in numpy and is deterministic: every process that packs the same rollout gets the same arrays, so
that each can place its own shard of them without talking to the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import ArrayLike
from jaxtyping import Bool

from grpo_contracts import TrainBatch
from grpo_loss._errors import LossError, check_boolean, check_shape
from grpo_loss._layout import MicroBatch, PackedBatch, pack_tokens
from grpo_loss._plan import PackShape, Plan, make_plan


def pack(
    batch: TrainBatch,
    *,
    shape: PackShape | Sequence[PackShape],
    keep_B: Bool[ArrayLike, "B"] | None = None,
) -> PackedBatch:
    """Pack completions into rows, the longest first and each where it leaves the least room.

    The completions of a row's block share one prompt. A group stays in one micro-batch where that costs no further
    one, so that its prompt is computed once.

    Args:
        batch: a scored rollout with advantages, one per sequence [B] or per token [B, T]. Its arrays may be numpy's,
            jax's or lists.
        shape: sizes of the result. Of several, the one that computes the fewest positions is used.
        keep_B: sequences to pack; the others take no room and count for nothing. Unscored ones are never packed.

    Returns:
        The packed batch, of numpy arrays.

    Raises:
        LossError: lengths, groups or shapes contradict each other, or the batch does not fit the shape.
    """
    arrays = _Arrays.of(batch, keep_B)
    group_B, length_B = _group_checked(batch, arrays), arrays.total_length_B - arrays.prompt_length_B
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
    return _build(arrays, min(plans, key=lambda plan: plan.cost))


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
    arrays = _Arrays.of(batch, keep_B)
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
        count_sharding: of the count of live micro-batches.
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
    return PackedBatch(micro, jax.ShapeDtypeStruct((), np.int32, sharding=count_sharding))


@dataclass(frozen=True)
class _Arrays:
    """The arrays of a train batch that are packed, in numpy, and which sequences are."""

    tokens_BT: np.ndarray
    prompt_length_B: np.ndarray
    total_length_B: np.ndarray
    loss_mask_BT: np.ndarray
    live_B: np.ndarray
    pad_id: int
    advantage: np.ndarray
    token_logps: dict[str, np.ndarray | None]

    @classmethod
    def of(cls, batch: TrainBatch, keep_B: ArrayLike | None) -> "_Arrays":
        """Refuse what would be packed into nonsense."""
        if not isinstance(batch, TrainBatch):
            raise LossError(
                f"batch must be a grpo_contracts.TrainBatch: got a {type(batch).__name__}. "
                "TrainBatch(scored, advantage) makes one."
            )
        rollout = batch.scored.rollout
        tokens_BT = np.asarray(rollout.tokens_BT)
        if tokens_BT.ndim != 2:
            raise LossError(f"tokens_BT must have two axes, sequences and positions: got shape {tokens_BT.shape}.")
        sequences, length = tokens_BT.shape
        prompt_length_B, total_length_B = np.asarray(rollout.prompt_length_B), np.asarray(rollout.total_length_B)
        loss_mask_BT, scored_B = np.asarray(rollout.loss_mask_BT), np.asarray(batch.scored.scored_B)
        keep_B = np.ones(sequences, bool) if keep_B is None else np.asarray(keep_B)
        for name, array_B in {
            "prompt_length_B": prompt_length_B,
            "total_length_B": total_length_B,
            "scored_B": scored_B,
            "keep_B": keep_B,
        }.items():
            check_shape(name, array_B.shape, (sequences,))
        check_shape("loss_mask_BT", loss_mask_BT.shape, (sequences, length))
        for name, mask in {"scored_B": scored_B, "keep_B": keep_B, "loss_mask_BT": loss_mask_BT}.items():
            check_boolean(name, mask)
        bad = (prompt_length_B < 1) | (total_length_B < prompt_length_B) | (total_length_B > length)
        if bad.any():
            b = int(bad.argmax())
            raise LossError(
                f"1 <= prompt_length_B <= total_length_B <= {length} must hold: sequence {b} has prompt_length "
                f"{int(prompt_length_B[b])} and total_length {int(total_length_B[b])}. A prompt needs at least one "
                "token."
            )
        advantage = _floating(batch.advantage)
        if advantage.shape not in ((sequences,), (sequences, length)):
            raise LossError(
                f"advantage must have shape {(sequences,)} (one per sequence) or {(sequences, length)} (one per "
                f"token): got {advantage.shape}."
            )
        token_logps = {
            "sampler_logp_RT": _token_array("logp_BT", rollout.logp_BT, tokens_BT.shape),
            "old_logp_RT": _token_array("old_logp_BT", batch.old_logp_BT, tokens_BT.shape),
            "reference_logp_RT": _token_array("reference_logp_BT", batch.reference_logp_BT, tokens_BT.shape),
        }
        live_B = (total_length_B > prompt_length_B) & scored_B & keep_B
        total_length_B = total_length_B.astype(np.int64)
        return cls(
            tokens_BT, prompt_length_B, total_length_B, loss_mask_BT, live_B, rollout.pad_id, advantage, token_logps
        )

    def packed(
        self, micro_batches: int, *, source_RT: np.ndarray, sequence_RT: np.ndarray, **layout: Any
    ) -> PackedBatch:
        """A batch with this layout, the advantages and log-probabilities gathered into it."""
        one_per_sequence = self.advantage.ndim == 1
        micro = MicroBatch(
            source_RT=source_RT,
            sequence_RT=sequence_RT,
            advantage_RT=pack_tokens(self.advantage, sequence_RT if one_per_sequence else source_RT),
            **{
                name: None if array_BT is None else pack_tokens(array_BT, source_RT)
                for name, array_BT in self.token_logps.items()
            },
            **layout,
        )
        return PackedBatch(micro, np.asarray(micro_batches, np.int32))


def _group_checked(batch: TrainBatch, arrays: _Arrays) -> np.ndarray:
    """Group of each sequence; a group's prompt is computed once, so all its sequences must have the same."""
    group_B = np.asarray(batch.scored.rollout.group_B)
    tokens_BT, prompt_length_B = arrays.tokens_BT, arrays.prompt_length_B
    check_shape("group_B", group_B.shape, prompt_length_B.shape)
    _, first, group_of_B = np.unique(group_B, return_index=True, return_inverse=True)
    leader_B = first[group_of_B]
    in_prompt_BT = np.arange(tokens_BT.shape[1]) < prompt_length_B[:, None]
    other_token_B = (in_prompt_BT & (tokens_BT != tokens_BT[leader_B])).any(axis=1)
    differs_B = (prompt_length_B != prompt_length_B[leader_B]) | other_token_B
    if differs_B.any():
        b = int(differs_B.argmax())
        raise LossError(
            f"Sequences of a group must have the same prompt: sequence {b} differs from sequence {int(leader_B[b])} of "
            f"group {int(group_B[b])}. Give each prompt its own group."
        )
    return group_B


def _build(arrays: _Arrays, plan: Plan) -> PackedBatch:
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

    flat_tokens = arrays.tokens_BT.reshape(-1)
    return arrays.packed(
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


def _floating(value: ArrayLike) -> np.ndarray:
    """As numpy; float32 where a list does not say."""
    return np.asarray(value, None if hasattr(value, "dtype") else np.float32)


def _token_array(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if value is None:
        return None
    array_BT = _floating(value)
    check_shape(name, array_BT.shape, shape)
    return array_BT
