"""Records of TRL and verl as a Rollout, without importing them or torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._completions import Sizes, assemble
from ._errors import broken
from ._provenance import PolicyVersion, SamplingParams
from ._reader import Reader
from ._stages import Rollout


def from_trl(
    record: Mapping[str, Any],
    *,
    sampling: SamplingParams,
    policy: PolicyVersion,
    vocab_size: int,
    pad_id: int,
    group_size: int,
    group: Sequence[Any] | None = None,
    prompt_id: Sequence[int] | None = None,
    policy_logp: Any = None,
) -> Rollout:
    """Turn a record of TRL's GRPOTrainer (returned by `_generate_and_score_completions`) into a Rollout.

    Args:
        record: `prompt_ids` and `prompt_mask` [B, any], `completion_ids` and `completion_mask` [B, C], padded on either
            side; `sampling_per_token_logps` or, if nothing was filtered, `old_per_token_logps` [B, C]; optionally
            `tool_mask`. Numpy arrays, jax arrays, lists or torch tensors.
        sampling: how the completions were drawn, including stop ids; the record does not contain it.
        policy: version of the parameters that drew them; not in the record either.
        vocab_size: size of the vocabulary.
        pad_id: token id of the padding.
        group_size: completions of each prompt (`num_generations`).
        group: a label per row, equal for rows of one group; if None, adjacent rows form groups. TRL shuffles its
            buffer, so pass labels there.
        prompt_id: which problem each row answers; the group's number if None.
        policy_logp: [B, C] log-probabilities at temperature 1 without filters; needed unless sampling was plain.

    Returns:
        A valid Rollout with T = prompt width + C. A row whose completion mask is all 0 (a masked truncated completion)
        keeps its tokens, without trailing padding, and stays out of the loss. TRL records 0 as the log-probability of
        each of its tokens, so average log-probabilities over `loss_mask_BT`, not over `completion_BT`.

    Raises:
        ContractError: the record lacks a key, its arrays disagree, or the result would not be valid.
    """
    sizes = Sizes(group_size, sampling, policy, vocab_size, pad_id).checked()
    reader = Reader(record, "TRL record")
    mask_BC = reader.mask("completion_mask")
    ids_BC = reader.integers("completion_ids", mask_BC.shape)
    live_BC = np.where(mask_BC.any(1, keepdims=True), mask_BC, _until_padding(ids_BC, pad_id))
    loss_BC = mask_BC & reader.mask("tool_mask", mask_BC.shape) if "tool_mask" in reader else mask_BC
    prompt_mask = reader.mask("prompt_mask")
    return assemble(
        name=reader.name,
        prompt=(reader.integers("prompt_ids", prompt_mask.shape), prompt_mask),
        completion=(ids_BC, live_BC, loss_BC),
        logp_BC=reader.logp("sampling_per_token_logps", "old_per_token_logps", sampling, mask_BC.shape),
        policy_logp=policy_logp,
        group=group,
        prompt_id=prompt_id,
        sizes=sizes,
    )


def from_verl(
    record: Mapping[str, Any],
    *,
    sampling: SamplingParams,
    policy: PolicyVersion,
    vocab_size: int,
    pad_id: int,
    group_size: int,
    group: Sequence[Any] | None = None,
    prompt_id: Sequence[int] | None = None,
    policy_logp: Any = None,
) -> Rollout:
    """Turn a record of verl (a DataProto's `batch`, optionally with `non_tensor_batch["uid"]`) into a Rollout.

    Args:
        record: `prompts` [B, any], `responses` [B, C] and `attention_mask` [B, any + C], padded on either side;
            `rollout_log_probs` or, if nothing was filtered, `old_log_probs` [B, C]; optionally `response_mask` [B, C]
            and `uid` [B]. Numpy arrays, jax arrays, lists or torch tensors.
        sampling: how the responses were drawn, including stop ids; the record does not contain it.
        policy: version of the parameters that drew them; not in the record either.
        vocab_size: size of the vocabulary.
        pad_id: token id of the padding.
        group_size: responses of each prompt (`rollout.n`).
        group: a label per row, equal for rows of one group; if None, `uid`, or adjacent rows without it.
        prompt_id: which problem each row answers; the group's number if None.
        policy_logp: [B, C] log-probabilities at temperature 1 without filters; needed unless sampling was plain.

    Returns:
        A valid Rollout with T = prompt width + C.

    Raises:
        ContractError: the record lacks a key, its arrays disagree, or the result would not be valid.
    """
    sizes = Sizes(group_size, sampling, policy, vocab_size, pad_id).checked()
    reader = Reader(record, "verl record")
    attention = reader.mask("attention_mask")
    ids_BC = reader.integers("responses")
    width = ids_BC.shape[1]
    if width >= attention.shape[1]:
        expected = f"wider than the responses ({width})"
        raise broken(reader.name, "attention_mask", "shape", expected, attention.shape)
    live_BC = attention[:, -width:]
    loss_BC = reader.mask("response_mask", ids_BC.shape) if "response_mask" in reader else live_BC
    prompt_mask = attention[:, :-width]
    return assemble(
        name=reader.name,
        prompt=(reader.integers("prompts", prompt_mask.shape), prompt_mask),
        completion=(ids_BC, live_BC, loss_BC),
        logp_BC=reader.logp("rollout_log_probs", "old_log_probs", sampling, ids_BC.shape),
        policy_logp=policy_logp,
        group=record["uid"] if group is None and "uid" in reader else group,
        prompt_id=prompt_id,
        sizes=sizes,
    )


def _until_padding(ids_BC: np.ndarray, pad_id: int) -> np.ndarray:
    """Positions up to the last token of each row that is not padding."""
    return np.flip(np.logical_or.accumulate(np.flip(ids_BC != pad_id, 1), axis=1), 1)
