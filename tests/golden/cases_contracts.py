"""What grpo-contracts says of stored batches: every field of every file, what it builds itself, what it refuses."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_contracts import (
    ContractError,
    FinishReason,
    PolicyVersion,
    SamplingParams,
    Scored,
    from_completions,
    from_trl,
    load_batch,
    validate,
)

BATCHES = Path(__file__).parent / "batches"


def _files() -> dict[str, Any]:
    """Every field of every stored file."""
    files = sorted(BATCHES.glob("*.npz"))
    return {name: case for path in files for name, case in _fields(path.stem, load_batch(path)).items()}


def _stages() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    rollout = load_batch(BATCHES / "rollout.npz")
    cases["completion_length_B"] = rollout.completion_length_B
    cases["completion_BT"] = rollout.completion_BT
    cases["plain sampling"] = np.array(
        [SamplingParams().plain, SamplingParams(temperature=0.5).plain, rollout.sampling.plain]
    )
    cases["finish reasons"] = np.array([FinishReason.STOP, FinishReason.LENGTH])
    cases["default sampling"] = repr(SamplingParams())
    rewards = {"a": [1.0, None, 0.5, 2.0, None, -1.0], "b": [None, None, 0.25, 1.0, 3.0, 0.0]}
    cases |= _fields("from_rewards", replace(Scored.from_rewards(rollout, rewards, {"a": 2.0, "b": 0.0}), rollout=0))
    return cases


def _fields(prefix: str, value: Any) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        nested = (_fields(f"{prefix}.{field.name}", getattr(value, field.name)) for field in fields(value))
        return {name: case for one in nested for name, case in one.items()}
    return {prefix: value if isinstance(value, np.ndarray) else np.asarray(repr(value))}


def _refusals() -> dict[str, Any]:
    """Which rule each damaged batch breaks."""
    rollout, scored, train = (load_batch(BATCHES / f"{name}.npz") for name in ("rollout", "scored", "train"))
    completion_BT = rollout.completion_BT
    damaged = {
        "positive log-probability": replace(rollout, logp_BT=np.where(completion_BT, 0.5, 0).astype(np.float32)),
        "log-probability in the padding": replace(rollout, logp_BT=np.full_like(rollout.logp_BT, -1)),
        "mask on a prompt": replace(rollout, loss_mask_BT=np.ones_like(rollout.loss_mask_BT)),
        "left-padded": replace(rollout, tokens_BT=rollout.tokens_BT[:, ::-1].copy()),
        "mask shifted by one": replace(rollout, loss_mask_BT=np.roll(rollout.loss_mask_BT, 1, 1)),
        "incomplete group": replace(rollout, group_B=np.zeros_like(rollout.group_B)),
        "reward on an unscored row": replace(scored, reward_B=np.ones_like(scored.reward_B)),
        "advantage on an unscored row": replace(train, advantage=np.ones_like(train.advantage)),
        "float64 rewards": replace(scored, reward_B=scored.reward_B.astype(np.float64)),
        "one row short": replace(rollout, finish_B=rollout.finish_B[:-1]),
    }
    return {name: np.asarray(_refusal(batch)) for name, batch in damaged.items()}


def _refusal(batch: Any) -> str:
    try:
        validate(batch, level="values")
    except ContractError as error:
        return f"{error.stage}.{error.field}: {error.rule}"
    return "accepted"


_POLICY = PolicyVersion(7, "ab12")


def _completions() -> Any:
    prompts = load_batch(BATCHES / "prompts.npz")
    completions = [[4, 30], [8, 8, 8], [30], [1, 2, 3, 30]]
    logp = [[-0.5, -1.0], [-0.25] * 3, [-2.0], [-0.125, -0.5, -0.75, -1.5]]
    sampling = SamplingParams(stop_ids=(30,))
    return from_completions(
        prompts, completions, logp, group_size=2, sampling=sampling, policy=_POLICY, max_new_tokens=5
    )


def _trl() -> Any:
    """A left-padded record of TRL, the padding side that goes wrong most often."""
    record = {
        "prompt_ids": np.array([[0, 5, 9], [0, 5, 9], [7, 4, 2], [7, 4, 2]]),
        "prompt_mask": np.array([[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]),
        "completion_ids": np.array([[4, 30, 0], [8, 8, 8], [30, 0, 0], [1, 2, 30]]),
        "completion_mask": np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]),
        "sampling_per_token_logps": -np.array([[0.5, 1, 0], [0.25, 0.25, 0.25], [2, 0, 0], [0.125, 0.5, 0.75]]),
    }
    sampling = SamplingParams(stop_ids=(30,))
    return from_trl(record, sampling=sampling, policy=_POLICY, vocab_size=31, pad_id=0, group_size=2)


def _builders() -> dict[str, Any]:
    return _fields("from_completions", _completions()) | _fields("from_trl", _trl())


PARTS = {"files": _files, "stages": _stages, "refusals": _refusals, "builders": _builders}
