"""The rules on values, as a table: `validate` runs it, `schema` lists it, and the tests break each entry.

A rule may rely on the ones above it: lengths are known to be in range before they are used as indices.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._provenance import FinishReason
from ._stages import Prompts, Rollout, Scored, Stage, TrainBatch

LOGP_SLACK = 1e-4
"""How far above 0 rounding may lift a log-probability, in nats: a float32 log-sum-exp of logits in the hundreds."""
SAME_LOGP = 1e-3
"""How far apart two float32 computations of one log-probability may be, in nats."""
_INT32_END = 2**31


class Rule(NamedTuple):
    """One rule on the values of one field.

    `field` may be a path (`sampling.stop_ids`). `check` takes the stage in numpy and returns one or more bools, True
    where the rule holds; or a pair of them and the expected values.
    """

    stage: type[Stage]
    field: str
    name: str
    expected: str
    check: Callable[[Any], Any]
    hint: str


RULES: list[Rule] = []


def _rule(stage: type[Stage], field: str, name: str, expected: str, hint: str = "") -> Callable[..., Any]:
    def add(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
        RULES.append(Rule(stage, field, name, expected, check, hint))
        return check

    return add


def _for_vocabulary(stage: type[Stage], tokens: str) -> None:
    _rule(stage, "vocab_size", "range", "in [1, 2**31)")(lambda s: 1 <= s.vocab_size < _INT32_END)
    _rule(stage, "pad_id", "vocabulary", "a token id in [0, vocab_size)")(lambda s: 0 <= s.pad_id < s.vocab_size)

    @_rule(stage, tokens, "vocabulary", "in [0, vocab_size)")
    def _(s: Any) -> Any:
        return (getattr(s, tokens) >= 0) & (getattr(s, tokens) < s.vocab_size)


def _padding(tokens: np.ndarray, length: np.ndarray, pad_id: int) -> np.ndarray:
    return (tokens == pad_id) | (np.arange(tokens.shape[1]) < length[:, None])


# Prompts
_for_vocabulary(Prompts, "tokens_PT")


@_rule(Prompts, "length_P", "range", "in [1, T]", "An empty prompt has no position that predicts the first token.")
def _(p: Any) -> Any:
    return (p.length_P >= 1) & (p.length_P <= p.tokens_PT.shape[1])


@_rule(Prompts, "tokens_PT", "padding", "pad_id from length_P on", "Pad on the right.")
def _(p: Any) -> Any:
    return _padding(p.tokens_PT, p.length_P, p.pad_id)


# Rollout
_for_vocabulary(Rollout, "tokens_BT")


@_rule(Rollout, "prompt_length_B", "range", "in [1, T)")
def _(r: Any) -> Any:
    return (r.prompt_length_B >= 1) & (r.prompt_length_B < r.tokens_BT.shape[1])


@_rule(Rollout, "total_length_B", "range", "in (prompt_length_B, T]", "A completion holds at least one token.")
def _(r: Any) -> Any:
    return (r.total_length_B > r.prompt_length_B) & (r.total_length_B <= r.tokens_BT.shape[1])


@_rule(Rollout, "tokens_BT", "padding", "pad_id from total_length_B on", "Pad on the right, prompts included.")
def _(r: Any) -> Any:
    return _padding(r.tokens_BT, r.total_length_B, r.pad_id)


@_rule(Rollout, "loss_mask_BT", "binary", "stored as 0 or 1", "Rebuild it with a comparison, not with `.view(bool)`.")
def _(r: Any) -> Any:
    return r.loss_mask_BT.view(np.uint8) <= 1


@_rule(
    Rollout,
    "loss_mask_BT",
    "completion",
    "True on exactly the row's completion, stop token included, or False on the whole row",
    "Token t of the row is completion where prompt_length_B <= t < total_length_B.",
)
def _(r: Any) -> Any:
    wanted = r.completion_BT & r.loss_mask_BT.any(1, keepdims=True)
    return r.loss_mask_BT == wanted, wanted


def _logp_rules(stage: type[Stage], field: str, rollout: Callable[[Any], Rollout]) -> None:
    @_rule(stage, field, "finite", "finite")
    def _(s: Any) -> Any:
        return np.isfinite(getattr(s, field))

    @_rule(stage, field, "nonpositive", "<= 0", "Give log-probabilities, not losses or ratios.")
    def _(s: Any) -> Any:
        return getattr(s, field) <= LOGP_SLACK

    @_rule(stage, field, "outside", "0 outside completions", "Align with tokens: x[b, t] describes token t, not t + 1.")
    def _(s: Any) -> Any:
        return (getattr(s, field) == 0) | rollout(s).completion_BT


_logp_rules(Rollout, "logp_BT", lambda r: r)
_logp_rules(Rollout, "policy_logp_BT", lambda r: r)


@_rule(
    Rollout,
    "policy_logp_BT",
    "plain_sampling",
    "at most logp_BT if sampling is plain (temperature 1, no filter)",
    "Record the sampling parameters that were really used.",
)
def _(r: Any) -> Any:
    # Not equal: a minimum length forbids stop ids at first, which leaves more probability to the other tokens.
    return (not r.sampling.plain) | (r.policy_logp_BT <= r.logp_BT + SAME_LOGP), r.logp_BT


@_rule(Rollout, "sampling.stop_ids", "vocabulary", "in [0, vocab_size)")
def _(r: Any) -> Any:
    return all(i < r.vocab_size for i in r.sampling.stop_ids)


@_rule(Rollout, "finish_B", "known", f"one of {[f'{f.value} ({f.name})' for f in FinishReason]}")
def _(r: Any) -> Any:
    return np.isin(r.finish_B, list(FinishReason))


@_rule(
    Rollout,
    "finish_B",
    "last_token",
    "STOP where the completion's last token is one of sampling.stop_ids, LENGTH or STOP_STRING elsewhere",
    "The stop token is part of the completion: do not cut it off.",
)
def _(r: Any) -> Any:
    last = r.tokens_BT[np.arange(len(r.tokens_BT)), r.total_length_B - 1]
    other = np.where(r.finish_B == FinishReason.STOP_STRING, FinishReason.STOP_STRING, FinishReason.LENGTH)
    wanted = np.where(np.isin(last, r.sampling.stop_ids), FinishReason.STOP, other)
    return r.finish_B == wanted, wanted


@_rule(Rollout, "tokens_BT", "ends_at_stop", "no stop id before the completion's last token", "Check total_length_B.")
def _(r: Any) -> Any:
    inner = r.completion_BT & (np.arange(r.tokens_BT.shape[1]) < r.total_length_B[:, None] - 1)
    return ~(inner & np.isin(r.tokens_BT, r.sampling.stop_ids))


@_rule(Rollout, "group_size", "divides", "a divisor, >= 1, of the number of rows")
def _(r: Any) -> Any:
    return r.group_size >= 1 and len(r.tokens_BT) % r.group_size == 0


@_rule(Rollout, "group_B", "range", "in [0, B / group_size)")
def _(r: Any) -> Any:
    return (r.group_B >= 0) & (r.group_B < len(r.group_B) // r.group_size)


@_rule(Rollout, "group_B", "complete", "a group that has group_size rows")
def _(r: Any) -> Any:
    return np.bincount(r.group_B)[r.group_B] == r.group_size


@_rule(Rollout, "sample_B", "range", "in [0, group_size)")
def _(r: Any) -> Any:
    return (r.sample_B >= 0) & (r.sample_B < r.group_size)


@_rule(Rollout, "sample_B", "unique", "different from those of the group's other rows")
def _(r: Any) -> Any:
    _, which, count = np.unique(np.stack([r.group_B, r.sample_B]), axis=1, return_inverse=True, return_counts=True)
    return count[which.ravel()] == 1


def _of_first(r: Any, values: np.ndarray) -> np.ndarray:
    """For each row, the value of its group's first row."""
    _, first, which = np.unique(r.group_B, return_index=True, return_inverse=True)
    return values[first[which.ravel()]]


@_rule(Rollout, "prompt_id_B", "same_prompt", "that of the group's first row")
def _(r: Any) -> Any:
    wanted = _of_first(r, r.prompt_id_B)
    return r.prompt_id_B == wanted, wanted


@_rule(Rollout, "prompt_length_B", "same_prompt", "that of the group's first row")
def _(r: Any) -> Any:
    wanted = _of_first(r, r.prompt_length_B)
    return r.prompt_length_B == wanted, wanted


@_rule(
    Rollout, "tokens_BT", "same_prompt", "the prompt of the group's first row", "All rows of a group share one prompt."
)
def _(r: Any) -> Any:
    wanted = _of_first(r, r.tokens_BT)
    return (r.tokens_BT == wanted) | (np.arange(wanted.shape[1]) >= r.prompt_length_B[:, None]), wanted


@_rule(Rollout, "policy.step", "range", "in [0, 2**31)")
def _(r: Any) -> Any:
    return 0 <= r.policy.step < _INT32_END


@_rule(Rollout, "policy.digest", "hexadecimal", "lower-case hexadecimal, or empty where it was not recorded")
def _(r: Any) -> Any:
    return re.fullmatch("[0-9a-f]*", r.policy.digest) is not None


# Scored
@_rule(Scored, "scored_BN", "binary", "stored as 0 or 1")
def _(s: Any) -> Any:
    return s.scored_BN.view(np.uint8) <= 1


@_rule(Scored, "scored_B", "binary", "stored as 0 or 1")
def _(s: Any) -> Any:
    return s.scored_B.view(np.uint8) <= 1


@_rule(Scored, "reward_BN", "finite", "finite", "A reward that could not be computed is unscored: scored_BN False.")
def _(s: Any) -> Any:
    return np.isfinite(s.reward_BN)


@_rule(Scored, "reward_BN", "unscored", "0 where scored_BN is False")
def _(s: Any) -> Any:
    return s.scored_BN | (s.reward_BN == 0)


@_rule(Scored, "weight_N", "finite", "finite")
def _(s: Any) -> Any:
    return np.isfinite(s.weight_N)


@_rule(Scored, "scored_B", "scored", "False where no function scored the row")
def _(s: Any) -> Any:
    return ~s.scored_B | s.scored_BN.any(1)


@_rule(Scored, "reward_B", "finite", "finite")
def _(s: Any) -> Any:
    return np.isfinite(s.reward_B)


@_rule(Scored, "reward_B", "unscored", "0 where scored_B is False")
def _(s: Any) -> Any:
    return s.scored_B | (s.reward_B == 0)


@_rule(
    Scored,
    "reward_B",
    "weighted_sum",
    "the sum of weight_N * reward_BN over the functions that scored",
    "A penalty or bonus is one more column of reward_BN.",
)
def _(s: Any) -> Any:
    terms = s.weight_N.astype(np.float64) * s.reward_BN * s.scored_BN
    wanted = np.where(s.scored_B, terms.sum(1), 0.0)
    return np.abs(s.reward_B - wanted) <= 1e-5 * np.abs(terms).sum(1) + 1e-6, wanted


# TrainBatch
def _rows(flags_B: np.ndarray, like: np.ndarray) -> np.ndarray:
    return flags_B.reshape(-1, *[1] * (like.ndim - 1))


@_rule(TrainBatch, "advantage", "finite", "finite")
def _(b: Any) -> Any:
    return np.isfinite(b.advantage)


@_rule(TrainBatch, "advantage", "unscored", "0 on unscored rows", "Leave unscored rows out of the group's statistics.")
def _(b: Any) -> Any:
    return (b.advantage == 0) | _rows(b.scored.scored_B, b.advantage)


@_rule(TrainBatch, "advantage", "outside", "0 outside completions")
def _(b: Any) -> Any:
    return (b.advantage == 0) | (b.scored.rollout.completion_BT if b.advantage.ndim == 2 else True)


_logp_rules(TrainBatch, "old_logp_BT", lambda b: b.scored.rollout)
_logp_rules(TrainBatch, "reference_logp_BT", lambda b: b.scored.rollout)
