"""A Rollout from prompts and completions, ragged or padded on whatever side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ._arrays import describe, is_array
from ._errors import broken
from ._reader import Reader, read
from ._stages import FinishReason, PolicyIdentity, Prompts, Rollout, SamplingLaw
from ._validate import fetch, validate


class Sizes(NamedTuple):
    """The fields of a Rollout that a record does not say."""

    group_size: int
    law: SamplingLaw
    policy: PolicyIdentity
    vocab_size: int
    pad_id: int

    def checked(self) -> Sizes:
        if type(self.law) is not SamplingLaw:
            raise broken("argument", "law", "type", "a SamplingLaw", describe(self.law))
        for name, least in (("group_size", 1), ("vocab_size", 1), ("pad_id", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**31:
                came = value if type(value) is int else describe(value)
                raise broken("argument", name, "range", f"an int in [{least}, 2**31)", came)
        return self


def from_completions(
    prompts: Prompts,
    completions: Sequence[Sequence[int] | np.ndarray],
    logp: Sequence[Sequence[float] | np.ndarray],
    *,
    group_size: int,
    law: SamplingLaw,
    policy: PolicyIdentity,
    policy_logp: Sequence[Sequence[float] | np.ndarray] | None = None,
    max_new_tokens: int | None = None,
) -> Rollout:
    """Turn ragged completions, as any engine returns them, into a Rollout.

    Args:
        prompts: P prompts.
        completions: the token ids of each of the P * group_size completions, stop token included; those of prompt 0
            first.
        logp: the log-probability of each of their tokens under the law.
        group_size: completions of each prompt.
        law: the law they were drawn from.
        policy: the parameters that drew them.
        policy_logp: log-probabilities at temperature 1 without filters; needed unless the law is that.
        max_new_tokens: room for completions; that of the longest where None.

    Returns:
        A valid Rollout with T = prompt width + max_new_tokens, every completion in the loss.

    Raises:
        ContractError: lengths or counts disagree, or the result would not be valid.
    """
    if type(prompts) is not Prompts:
        raise broken("argument", "prompts", "type", "a Prompts", describe(prompts))
    validate(prompts, "values")
    sizes = Sizes(group_size, law, policy, prompts.vocab_size, prompts.pad_id).checked()
    rows = len(prompts.length_P) * group_size
    ids_BC, mask_BC = _pad_ragged(completions, "completions", rows, np.int32, max_new_tokens)
    columns = {}
    for name, ragged in (("logp", logp), ("policy_logp", policy_logp)):
        if ragged is not None or name == "logp":
            columns[name], like = _pad_ragged(ragged, name, rows, np.float64, ids_BC.shape[1])
            if (like != mask_BC).any():
                at = np.argwhere((like != mask_BC).any(1))[0]
                raise broken("argument", name, "length", "one number for each token", like[at[0]].sum(), index=at)
    prompts = fetch(prompts)
    row = np.arange(rows) // group_size
    return assemble(
        name="argument",
        prompt=(prompts.tokens_PT[row], np.arange(prompts.tokens_PT.shape[1]) < prompts.length_P[row, None]),
        completion=(ids_BC, mask_BC, mask_BC),
        logp_BC=columns["logp"],
        policy_logp=columns.get("policy_logp"),
        group=None,
        prompt_id=prompts.prompt_id_P[row],
        sizes=sizes,
    )


def _pad_ragged(ragged: Any, name: str, rows: int, dtype: type, width: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows as an array padded on the right with zeros, and the mask of what is no padding."""
    if width is not None and (type(width) is not int or width < 1):
        raise broken("argument", "max_new_tokens", "range", "an int >= 1", describe(width))
    listed = isinstance(ragged, list | tuple) or (is_array(ragged) and ragged.ndim > 0)
    if not listed or len(ragged) != rows:
        came = f"{len(ragged)} rows" if listed else describe(ragged)
        raise broken("argument", name, "rows", f"a list of {rows} rows", came)
    arrays = [_read_row(row, name, b, dtype, width) for b, row in enumerate(ragged)]
    padded = np.zeros((rows, max(map(len, arrays)) if width is None else width), dtype)
    mask = np.zeros(padded.shape, bool)
    for b, array in enumerate(arrays):
        padded[b, : len(array)] = array
        mask[b, : len(array)] = True
    return padded, mask


def _read_row(row: Any, name: str, b: int, dtype: type, width: int | None) -> np.ndarray:
    array = read(row, "argument", name)
    whole = dtype is np.int32
    if array.ndim != 1 or not len(array) or array.dtype.kind not in ("iu" if whole else "iuf"):
        expected = "at least one token id" if whole else "at least one number"
        raise broken("argument", name, "row", expected, f"{array.dtype}{list(array.shape)}", index=(b,))
    if whole and not ((array >= 0) & (array < 2**31)).all():
        came = f"{array.min()}..{array.max()}"
        raise broken("argument", name, "range", "token ids in [0, 2**31)", came, index=(b,))
    if width is not None and len(array) > width:
        raise broken("argument", name, "length", f"at most {width} tokens long", len(array), index=(b,))
    return array


def _live_first(mask: np.ndarray, name: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """The order that moves each row's live positions to its front, and how many there are."""
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    split = starts.sum(1) > 1
    if split.any():
        expected = "1 on one run of positions a row, padding before or after it"
        raise broken(name, field, "contiguous", expected, "several runs", index=np.argwhere(split)[0])
    return np.argsort(~mask, axis=1, kind="stable"), mask.sum(1).astype(np.int32)


def _group(labels: Any, rows: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Group of each row, numbered by first appearance, and its index within; without labels, adjacent rows."""
    if labels is None:
        row = np.arange(rows, dtype=np.int32)
        return row // group_size, row % group_size
    labels = read(labels, "argument", "group")
    if labels.shape != (rows,):
        raise broken("argument", "group", "shape", f"({rows},)", labels.shape, verb="have shape")
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


def assemble(
    *,
    name: str,
    prompt: tuple[np.ndarray, np.ndarray],
    completion: tuple[np.ndarray, np.ndarray, np.ndarray],
    logp_BC: np.ndarray,
    policy_logp: Any,
    group: Any,
    prompt_id: Any,
    sizes: Sizes,
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
    arguments = Reader({"policy_logp": policy_logp, "prompt_id": prompt_id}, "argument")
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
