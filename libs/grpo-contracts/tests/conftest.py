"""Valid batches of every kind, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from grpo_contracts import PolicyVersion, Prompts, Rollout, SamplingParams, Scored, TrainBatch

VOCAB, PAD = 20, 0
SAMPLINGS = (
    SamplingParams(stop_ids=(18, 19)),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, stop_ids=(19,)),
    SamplingParams(temperature=0.0, stop_ids=(19,)),
)


def _prompts(rng: np.random.Generator, count: int, width: int) -> Prompts:
    length_P = rng.integers(1, width + 1, count).astype(np.int32)
    tokens_PT = rng.integers(0, VOCAB, (count, width), dtype=np.int32)
    tokens_PT[np.arange(width) >= length_P[:, None]] = PAD
    return Prompts(tokens_PT, length_P, rng.integers(0, 99, count).astype(np.int32), VOCAB, PAD)


def _rollout(
    rng: np.random.Generator, prompts: Prompts, group_size: int, new: int, sampling: SamplingParams
) -> Rollout:
    group_B = np.repeat(np.arange(len(prompts.length_P), dtype=np.int32), group_size)
    sample_B = np.tile(np.arange(group_size, dtype=np.int32), len(prompts.length_P))
    if rng.integers(2):  # rows need not come in the order of their groups
        order = rng.permutation(len(group_B))
        group_B, sample_B = group_B[order], sample_B[order]
    rows, width = len(group_B), prompts.tokens_PT.shape[1]
    tokens_BT = np.full((rows, width + new), PAD, np.int32)
    tokens_BT[:, :width] = prompts.tokens_PT[group_B]
    start_B = prompts.length_P[group_B]
    total_B = (start_B + rng.integers(1, new + 1, rows)).astype(np.int32)
    finish_B = np.zeros(rows, np.int8)
    for b in range(rows):
        tokens_BT[b, start_B[b] : total_B[b]] = rng.integers(0, 18, total_B[b] - start_B[b])
        stops = bool(sampling.stop_ids) and rng.integers(2)
        finish_B[b] = 0 if stops else 1
        if stops:
            tokens_BT[b, total_B[b] - 1] = rng.choice(sampling.stop_ids)
    t = np.arange(width + new)
    completion_BT = (t >= start_B[:, None]) & (t < total_B[:, None])
    logp_BT = np.where(completion_BT, -rng.exponential(1, completion_BT.shape), 0).astype(np.float32)
    plain_BT = logp_BT if sampling.plain else np.where(completion_BT, -rng.exponential(1, completion_BT.shape), 0)
    return Rollout(
        tokens_BT=tokens_BT,
        prompt_length_B=start_B,
        total_length_B=total_B,
        loss_mask_BT=completion_BT & (rng.random((rows, 1)) < 0.8),  # some rows stay out of the loss
        logp_BT=logp_BT,
        policy_logp_BT=plain_BT.astype(np.float32),
        finish_B=finish_B,
        prompt_id_B=prompts.prompt_id_P[group_B],
        sample_B=sample_B,
        group_B=group_B,
        group_size=group_size,
        sampling=sampling,
        policy=PolicyVersion(int(rng.integers(2**31)), rng.bytes(8).hex()),
        vocab_size=VOCAB,
        pad_id=PAD,
    )


def _scored(rng: np.random.Generator, rollout: Rollout, functions: int) -> Scored:
    rows = len(rollout.tokens_BT)
    rewards = {
        f"reward{n}": [None if rng.random() < 0.2 else float(rng.normal(0, 5)) for _ in range(rows)]
        for n in range(functions)
    }
    return Scored.from_rewards(rollout, rewards, {name: float(rng.normal()) for name in rewards})


def _train(rng: np.random.Generator, scored: Scored) -> TrainBatch:
    rollout = scored.rollout
    advantage = rng.normal(size=len(rollout.tokens_BT)) * scored.scored_B
    if rng.integers(2):
        advantage = advantage[:, None] * rollout.completion_BT
    old, reference = (
        np.where(rollout.completion_BT, -rng.exponential(1, rollout.tokens_BT.shape), 0).astype(np.float32)
        if rng.integers(2)
        else None
        for _ in range(2)
    )
    return TrainBatch(scored, advantage.astype(np.float32), old, reference)


@pytest.fixture(scope="session")
def make_prompts() -> Callable[[int], Prompts]:
    """Valid prompts for a seed."""

    def make(seed: int) -> Prompts:
        rng = np.random.default_rng(seed)
        return _prompts(rng, int(rng.integers(1, 5)), int(rng.integers(1, 7)))

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[[int], TrainBatch]:
    """A valid training batch for a seed, of any size, sampling parameters and mixture of optional parts."""

    def make(seed: int) -> TrainBatch:
        rng = np.random.default_rng(seed)
        prompts = _prompts(rng, int(rng.integers(1, 5)), int(rng.integers(1, 7)))
        sampling = SAMPLINGS[rng.integers(len(SAMPLINGS))]
        rollout = _rollout(rng, prompts, int(rng.integers(1, 5)), int(rng.integers(1, 9)), sampling)
        return _train(rng, _scored(rng, rollout, int(rng.integers(1, 4))))

    return make


@pytest.fixture
def batch() -> TrainBatch:
    """One small batch, known to the last token: two prompts of two samples; one row is unscored."""
    T = 6
    prompt = {0: [3, 4], 1: [5, 6]}
    completion = [[7, 19], [8, 9, 10], [11, 19], [12, 13]]
    rows = [prompt[b // 2] + completion[b] for b in range(4)]
    tokens_BT = np.array([row + [PAD] * (T - len(row)) for row in rows], np.int32)
    total_B = np.array([len(row) for row in rows], np.int32)
    mask_BT = (np.arange(T) >= 2) & (np.arange(T) < total_B[:, None])
    logp_BT = np.where(mask_BT, np.float32(-1.5), np.float32(0))
    rollout = Rollout(
        tokens_BT=tokens_BT,
        prompt_length_B=np.full(4, 2, np.int32),
        total_length_B=total_B,
        loss_mask_BT=mask_BT,
        logp_BT=logp_BT,
        policy_logp_BT=logp_BT.copy(),
        finish_B=np.array([0, 1, 0, 1], np.int8),
        prompt_id_B=np.array([40, 40, 41, 41], np.int32),
        sample_B=np.array([0, 1, 0, 1], np.int32),
        group_B=np.array([0, 0, 1, 1], np.int32),
        group_size=2,
        sampling=SamplingParams(stop_ids=(19,)),
        policy=PolicyVersion(7, "0a1b2c3d"),
        vocab_size=VOCAB,
        pad_id=PAD,
    )
    rewards = {"answer": [1.0, 0.0, 0.0, None], "format": [0.5, 0.5, 1.0, 1.0]}
    scored = Scored.from_rewards(rollout, rewards, {"answer": 1.0, "format": 0.2})
    advantage_B = np.array([1, -1, 0, 0], np.float32)
    return TrainBatch(scored, advantage_B, logp_BT - mask_BT * np.float32(0.1), logp_BT - mask_BT * np.float32(0.2))
