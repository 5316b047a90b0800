"""A Rollout from prompts and completions, ragged or padded on either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ._arrays import check_int, describe
from ._errors import broken
from ._provenance import FinishReason, PolicyVersion, SamplingParams
from ._ragged import pad_ragged
from ._reader import Reader, read
from ._stages import Prompts, Rollout
from ._validate import fetch, validate


class Sizes(NamedTuple):
    """The fields of a Rollout that a record does not contain."""

    group_size: int
    sampling: SamplingParams
    policy: PolicyVersion
    vocab_size: int
    pad_id: int

    def checked(self) -> Sizes:
        if type(self.sampling) is not SamplingParams:
            raise broken("argument", "sampling", "type", "a SamplingParams", describe(self.sampling))
        for name, least in (("group_size", 1), ("vocab_size", 1), ("pad_id", 0)):
            check_int(getattr(self, name), name, least)
        return self


def from_completions(
    prompts: Prompts,
    completions: Sequence[Sequence[int] | np.ndarray],
    logp: Sequence[Sequence[float] | np.ndarray],
    *,
    group_size: int,
    sampling: SamplingParams,
    policy: PolicyVersion,
    policy_logp: Sequence[Sequence[float] | np.ndarray] | None = None,
    max_new_tokens: int | None = None,
) -> Rollout:
    """Turn ragged completions, as any engine returns them, into a Rollout.

    Args:
        prompts: P prompts.
        completions: token ids of the P * group_size completions, stop tokens included, those of prompt 0 first.
        logp: log-probability of each of their tokens under the sampling parameters.
        group_size: completions of each prompt.
        sampling: how they were drawn.
        policy: version of the parameters that drew them.
        policy_logp: log-probabilities at temperature 1 without filters; needed unless sampling was plain.
        max_new_tokens: room for completions, in tokens; the length of the longest if None.

    Returns:
        A valid Rollout with T = prompt width + max_new_tokens and every completion in the loss.

    Raises:
        ContractError: lengths or counts disagree, or the result would not be valid.
    """
    if type(prompts) is not Prompts:
        raise broken("argument", "prompts", "type", "a Prompts", describe(prompts))
    validate(prompts, "values")
    sizes = Sizes(group_size, sampling, policy, prompts.vocab_size, prompts.pad_id).checked()
    rows = len(prompts.length_P) * group_size
    if max_new_tokens is not None:
        check_int(max_new_tokens, "max_new_tokens", 1)
    ids_BC, mask_BC = pad_ragged(completions, "completions", np.int32, rows=rows, width=max_new_tokens)
    columns = {}
    for name, ragged in (("logp", logp), ("policy_logp", policy_logp)):
        if ragged is not None or name == "logp":
            columns[name], like = pad_ragged(ragged, name, np.float64, rows=rows, width=ids_BC.shape[1])
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


def _live_first(mask: np.ndarray, name: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """The order that moves the live positions of each row to its front, and how many there are."""
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    split = starts.sum(1) > 1
    if split.any():
        expected = "1 on one run of positions per row, with padding before or after it"
        raise broken(name, field, "contiguous", expected, "several runs", index=np.argwhere(split)[0])
    return np.argsort(~mask, axis=1, kind="stable"), mask.sum(1).astype(np.int32)


def _group(labels: Any, rows: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Group of each row, numbered by first appearance, and its index in the group; adjacent rows without labels."""
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
    """Right-padded rows from padded prompts (ids, mask) and completions (ids, mask, loss mask)."""
    prompt_ids, prompt_mask = prompt
    ids_BC, live_BC, loss_BC = completion
    rows, width = ids_BC.shape
    if len(prompt_ids) != rows:
        raise broken(name, "prompts", "rows", f"as many as the completions ({rows})", len(prompt_ids))
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
        with np.errstate(over="ignore"):  # overflow gives infinity, which validation reports
            return np.where(in_completion, spread, empty).astype(dtype)

    prompt_front = np.take_along_axis(prompt_ids, prompt_order, 1)
    prompt_spread = prompt_front[:, np.minimum(t, prompt_ids.shape[1] - 1)]
    tokens_BT = np.where(in_prompt, prompt_spread, place(ids_BC, sizes.pad_id, np.int32))

    group_B, sample_B = _group(group, rows, sizes.group_size)
    arguments = Reader({"policy_logp": policy_logp, "prompt_id": prompt_id}, "argument")
    if "policy_logp" in arguments:
        policy_logp_BC = arguments.array("policy_logp", "f", ids_BC.shape)
    elif sizes.sampling.plain:
        policy_logp_BC = logp_BC
    else:
        hint = "Score the completions once at temperature 1."
        raise broken("argument", "policy_logp", "present", "given unless sampling is plain", "nothing", hint=hint)
    prompt_id_B = arguments.integers("prompt_id", (rows,), rank=1) if "prompt_id" in arguments else group_B
    last_B = ids_BC[np.arange(rows), order[np.arange(rows), np.maximum(length_B - 1, 0)]]
    rollout = Rollout(
        tokens_BT=tokens_BT,
        prompt_length_B=prompt_length_B,
        total_length_B=prompt_length_B + length_B,
        loss_mask_BT=place(loss_BC, False, np.bool_),
        logp_BT=place(logp_BC, 0, np.float32),
        policy_logp_BT=place(policy_logp_BC, 0, np.float32),
        finish_B=np.where(np.isin(last_B, sizes.sampling.stop_ids), FinishReason.STOP, FinishReason.LENGTH).astype(
            np.int8
        ),
        prompt_id_B=prompt_id_B,
        sample_B=sample_B,
        group_B=group_B,
        **sizes._asdict(),
    )
    validate(rollout, "values")
    return rollout
