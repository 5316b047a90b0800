"""The arrays of a train batch that are packed, in numpy, checked, and gathered into a layout."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from grpo_contracts import TrainBatch
from grpo_loss._errors import LossError, check_boolean, check_shape
from grpo_loss._layout import MicroBatch, PackedBatch, pack_tokens


@dataclass(frozen=True)
class BatchArrays:
    """The arrays of a train batch that are packed, in numpy, and which sequences are.

    Live sequences have a completion and a score. Idle ones are left out because all their advantages are 0.
    """

    tokens_BT: np.ndarray
    prompt_length_B: np.ndarray
    total_length_B: np.ndarray
    loss_mask_BT: np.ndarray
    live_B: np.ndarray
    idle_B: np.ndarray
    pad_id: int
    advantage: np.ndarray
    token_logps: dict[str, np.ndarray | None]

    @classmethod
    def of(cls, batch: TrainBatch, keep_B: ArrayLike | None, *, without_idle: bool = False) -> "BatchArrays":
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
        moves_B = advantage != 0 if advantage.ndim == 1 else ((advantage != 0) & loss_mask_BT).any(axis=1)
        idle_B = live_B & ~moves_B & without_idle
        return cls(
            tokens_BT,
            prompt_length_B,
            total_length_B.astype(np.int64),
            loss_mask_BT,
            live_B & ~idle_B,
            idle_B,
            rollout.pad_id,
            advantage,
            token_logps,
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


def check_groups(batch: TrainBatch, arrays: BatchArrays) -> np.ndarray:
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


def _floating(value: ArrayLike) -> np.ndarray:
    """As numpy; float32 where a list does not say."""
    return np.asarray(value, None if hasattr(value, "dtype") else np.float32)


def _token_array(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if value is None:
        return None
    array_BT = _floating(value)
    check_shape(name, array_BT.shape, shape)
    return array_BT
