"""Rollout records of other trainers, as a Rollout. Neither trainer nor torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._arrays import describe, to_numpy
from ._errors import broken
from ._stages import FinishReason, PolicyIdentity, Rollout, SamplingLaw
from ._validate import validate


def from_trl(
    record: Mapping[str, Any],
    *,
    law: SamplingLaw,
    policy: PolicyIdentity,
    vocab_size: int,
    pad_id: int,
    group_size: int,
    group: Sequence[Any] | None = None,
    prompt_id: Sequence[int] | None = None,
    policy_logp: Any = None,
) -> Rollout:
    """Turn a record of TRL's GRPOTrainer (what `_generate_and_score_completions` returns) into a Rollout.

    Args:
        record: `prompt_ids` and `prompt_mask` [B, any], `completion_ids` and `completion_mask` [B, C], padded on either
            side; `sampling_per_token_logps` or, under a law without filters, `old_per_token_logps` [B, C]; a
            `tool_mask` where there is one. Numpy arrays, jax arrays, lists or torch tensors.
        law: the law the completions were drawn from, its stop ids included; the record does not say.
        policy: the parameters that drew them; nor does it say that.
        vocab_size: size of the vocabulary.
        pad_id: token id of the padding.
        group_size: completions of each prompt (`num_generations`).
        group: a label a row, equal where rows share a group; adjacent rows where None. TRL shuffles its buffer.
        prompt_id: which problem each row answers; the group's number where None.
        policy_logp: [B, C] log-probabilities at temperature 1 without filters; needed unless the law is that.

    Returns:
        A valid Rollout with T = prompt width + C. A row whose completion mask is all 0 (a truncated completion masked)
        keeps its tokens, up to its trailing padding, and stays out of the loss.

    Raises:
        ContractError: the record lacks a key, its arrays disagree, or the result would not be valid.
    """
    sizes = _Sizes(group_size, law, policy, vocab_size, pad_id).checked()
    reader = _Reader(record, "TRL record")
    mask_BC = reader.mask("completion_mask")
    ids_BC = reader.integers("completion_ids", mask_BC.shape)
    live_BC = np.where(mask_BC.any(1, keepdims=True), mask_BC, _until_padding(ids_BC, pad_id))
    loss_BC = mask_BC & reader.mask("tool_mask", mask_BC.shape) if "tool_mask" in reader else mask_BC
    prompt_mask = reader.mask("prompt_mask")
    return _assemble(
        name=reader.name,
        prompt=(reader.integers("prompt_ids", prompt_mask.shape), prompt_mask),
        completion=(ids_BC, live_BC, loss_BC),
        logp_BC=reader.logp("sampling_per_token_logps", "old_per_token_logps", law, mask_BC.shape),
        policy_logp=policy_logp,
        group=group,
        prompt_id=prompt_id,
        sizes=sizes,
    )


def from_verl(
    record: Mapping[str, Any],
    *,
    law: SamplingLaw,
    policy: PolicyIdentity,
    vocab_size: int,
    pad_id: int,
    group_size: int,
    group: Sequence[Any] | None = None,
    prompt_id: Sequence[int] | None = None,
    policy_logp: Any = None,
) -> Rollout:
    """Turn a record of verl (a DataProto's `batch`, with `non_tensor_batch["uid"]` beside it if wanted) into a Rollout.

    Args:
        record: `prompts` [B, any], `responses` [B, C] and `attention_mask` [B, any + C], padded on either side;
            `rollout_log_probs` or, under a law without filters, `old_log_probs` [B, C]; `response_mask` [B, C] and
            `uid` [B] where there are any. Numpy arrays, jax arrays, lists or torch tensors.
        law: the law the responses were drawn from, its stop ids included; the record does not say.
        policy: the parameters that drew them; nor does it say that.
        vocab_size: size of the vocabulary.
        pad_id: token id of the padding.
        group_size: responses of each prompt (`rollout.n`).
        group: a label a row, equal where rows share a group; `uid` where None, adjacent rows where there is none.
        prompt_id: which problem each row answers; the group's number where None.
        policy_logp: [B, C] log-probabilities at temperature 1 without filters; needed unless the law is that.

    Returns:
        A valid Rollout with T = prompt width + C.

    Raises:
        ContractError: the record lacks a key, its arrays disagree, or the result would not be valid.
    """
    sizes = _Sizes(group_size, law, policy, vocab_size, pad_id).checked()
    reader = _Reader(record, "verl record")
    attention = reader.mask("attention_mask")
    ids_BC = reader.integers("responses")
    width = ids_BC.shape[1]
    if width >= attention.shape[1]:
        expected = f"wider than the responses ({width})"
        raise broken(reader.name, "attention_mask", "shape", expected, attention.shape)
    live_BC = attention[:, -width:]
    loss_BC = reader.mask("response_mask", ids_BC.shape) if "response_mask" in reader else live_BC
    prompt_mask = attention[:, :-width]
    return _assemble(
        name=reader.name,
        prompt=(reader.integers("prompts", prompt_mask.shape), prompt_mask),
        completion=(ids_BC, live_BC, loss_BC),
        logp_BC=reader.logp("rollout_log_probs", "old_log_probs", law, ids_BC.shape),
        policy_logp=policy_logp,
        group=record["uid"] if group is None and "uid" in reader else group,
        prompt_id=prompt_id,
        sizes=sizes,
    )


class _Sizes(NamedTuple):
    """The fields of a Rollout that a record does not say."""

    group_size: int
    law: SamplingLaw
    policy: PolicyIdentity
    vocab_size: int
    pad_id: int

    def checked(self) -> _Sizes:
        if type(self.law) is not SamplingLaw:
            raise broken("argument", "law", "type", "a SamplingLaw", describe(self.law))
        for name, least in (("group_size", 1), ("vocab_size", 1), ("pad_id", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**31:
                came = value if type(value) is int else describe(value)
                raise broken("argument", name, "range", f"an int in [{least}, 2**31)", came)
        return self


class _Reader:
    """Reads named arrays of a record, each checked for rank, kind and shape."""

    def __init__(self, record: Any, name: str) -> None:
        if not isinstance(record, Mapping):
            raise broken(name, None, "type", "a mapping of names to arrays", describe(record))
        self._record = record
        self.name = name

    def __contains__(self, key: str) -> bool:
        return self._record.get(key) is not None

    def array(self, key: str, kinds: str, shape: tuple[int, ...] | None = None, *, rank: int = 2) -> np.ndarray:
        if key not in self:
            raise broken(self.name, key, "present", "in the record", "nothing")
        array = _read(self._record[key], self.name, key)
        if array.ndim != rank or 0 in array.shape or (shape is not None and array.shape != shape):
            wanted = "(rows, positions)" if shape is None else shape
            raise broken(self.name, key, "shape", wanted, array.shape, verb="have shape")
        if array.dtype.kind not in kinds:
            raise broken(self.name, key, "dtype", f"of a dtype of kind {' or '.join(kinds)}", array.dtype)
        return array

    def integers(self, key: str, shape: tuple[int, ...] | None = None, *, rank: int = 2) -> np.ndarray:
        array = self.array(key, "iu", shape, rank=rank)
        bad = (array < -(2**31)) | (array >= 2**31)
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            raise broken(self.name, key, "range", "within int32", array[at], index=at)
        return array.astype(np.int32)

    def mask(self, key: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        array = self.array(key, "biuf", shape)
        bad = (array != 0) & (array != 1)
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            raise broken(self.name, key, "binary", "0 or 1", array[at], index=at)
        return array != 0

    def logp(self, drawn: str, scored: str, law: SamplingLaw, shape: tuple[int, ...]) -> np.ndarray:
        """The log-probabilities under the law: those of the sampler, or the trainer's, which know no filter."""
        if drawn in self:
            return self.array(drawn, "f", shape)
        if (law.top_k, law.top_p, law.min_p) != (0, 1.0, 0.0):
            hint = f"{scored!r} knows no filters: record the sampler's own log-probabilities."
            raise broken(self.name, drawn, "present", "in the record, the law having filters", "nothing", hint=hint)
        if scored not in self:
            raise broken(self.name, drawn, "present", f"in the record, or {scored!r}", "neither")
        return self.array(scored, "f", shape)


def _read(value: Any, name: str, key: str) -> np.ndarray:
    # torch tensors that track gradients or live on an accelerator do not convert by themselves
    for step in ("detach", "cpu"):
        method = getattr(value, step, None)
        value = method() if callable(method) else value
    return to_numpy(value, name, key)


def _until_padding(ids_BC: np.ndarray, pad_id: int) -> np.ndarray:
    """Positions up to each row's last token that is no padding."""
    return np.flip(np.logical_or.accumulate(np.flip(ids_BC != pad_id, 1), axis=1), 1)


def _live_first(mask: np.ndarray, name: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """The order that moves each row's live positions to its front, and how many there are."""
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    split = starts.sum(1) > 1
    if split.any():
        expected = "1 on one run of positions a row, padding before or after it"
        raise broken(name, field, "contiguous", expected, "several runs", index=np.argwhere(split)[0])
    return np.argsort(~mask, axis=1, kind="stable"), mask.sum(1).astype(np.int32)


def _group(labels: Any, rows: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Group of each row, numbered by first appearance, and its index within; adjacent rows where there are no labels."""
    if labels is None:
        row = np.arange(rows, dtype=np.int32)
        return row // group_size, row % group_size
    labels = _read(labels, "argument", "group")
    if labels.shape != (rows,):
        raise broken("argument", "group", "shape", (rows,), labels.shape, verb="have shape")
    seen: dict[str, int] = {}
    members: list[int] = []
    groups = np.zeros(rows, np.int32)
    samples = np.zeros(rows, np.int32)
    for b, label in enumerate(labels.tolist()):
        groups[b] = seen.setdefault(f"{type(label).__name__}:{label}", len(seen))
        members += [0] * (len(seen) - len(members))
        samples[b] = members[groups[b]]
        members[groups[b]] += 1
    return groups, samples


def _assemble(
    *,
    name: str,
    prompt: tuple[np.ndarray, np.ndarray],
    completion: tuple[np.ndarray, np.ndarray, np.ndarray],
    logp_BC: np.ndarray,
    policy_logp: Any,
    group: Any,
    prompt_id: Any,
    sizes: _Sizes,
) -> Rollout:
    """One right-padded row from each padded prompt (ids, mask) and completion (ids, mask, loss mask)."""
    prompt_ids, prompt_mask = prompt
    ids_BC, live_BC, loss_BC = completion
    rows, width = ids_BC.shape
    if len(prompt_ids) != rows:
        raise broken(name, "prompts", "rows", f"of as many rows as the completions ({rows})", len(prompt_ids))
    stray = loss_BC & ~live_BC
    if stray.any():
        raise broken(name, "loss mask", "subset", "0 on padding", 1, index=np.argwhere(stray)[0])
    prompt_order, prompt_length_B = _live_first(prompt_mask, name, "prompt mask")
    order, length_B = _live_first(live_BC, name, "completion mask")

    t = np.arange(prompt_ids.shape[1] + width)
    from_start = t - prompt_length_B[:, None]  # position within the completion
    in_prompt = from_start < 0
    in_completion = (from_start >= 0) & (from_start < length_B[:, None])

    def place(values_BC: np.ndarray, empty: Any, dtype: type) -> np.ndarray:
        front = np.take_along_axis(values_BC, order, 1)
        spread = np.take_along_axis(front, np.clip(from_start, 0, width - 1), 1)
        with np.errstate(over="ignore"):  # what float32 cannot hold turns infinite, and validation names it
            return np.where(in_completion, spread, empty).astype(dtype)

    prompt_front = np.take_along_axis(prompt_ids, prompt_order, 1)
    prompt_spread = prompt_front[:, np.minimum(t, prompt_ids.shape[1] - 1)]
    tokens_BT = np.where(in_prompt, prompt_spread, place(ids_BC, sizes.pad_id, np.int32))

    group_B, sample_B = _group(group, rows, sizes.group_size)
    arguments = _Reader({"policy_logp": policy_logp, "prompt_id": prompt_id}, "argument")
    if "policy_logp" in arguments:
        policy_logp_BC = arguments.array("policy_logp", "f", ids_BC.shape)
    elif sizes.law.plain:
        policy_logp_BC = logp_BC
    else:
        hint = "Score the completions once at temperature 1."
        raise broken("argument", "policy_logp", "present", "given where the law is not plain", "nothing", hint=hint)
    prompt_id_B = arguments.integers("prompt_id", (rows,), rank=1) if "prompt_id" in arguments else group_B
    last_B = ids_BC[np.arange(rows), order[np.arange(rows), np.maximum(length_B - 1, 0)]]
    rollout = Rollout(
        tokens_BT=tokens_BT,
        prompt_length_B=prompt_length_B,
        total_length_B=prompt_length_B + length_B,
        loss_mask_BT=place(loss_BC, False, np.bool_),
        logp_BT=place(logp_BC, 0, np.float32),
        policy_logp_BT=place(policy_logp_BC, 0, np.float32),
        finish_B=np.where(np.isin(last_B, sizes.law.stop_ids), FinishReason.STOP, FinishReason.LENGTH).astype(np.int8),
        prompt_id_B=prompt_id_B,
        sample_B=sample_B,
        group_B=group_B,
        **sizes._asdict(),
    )
    validate(rollout, "values")
    return rollout
