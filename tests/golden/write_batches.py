"""Writes `batches/*.npz`. They were written once, with grpo-contracts 0.2.0: a file that exists is never replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from golden_numbers import integers, wave

from grpo_contracts import PolicyVersion, Prompts, Rollout, SamplingParams, Scored, TrainBatch, save_batch

FOLDER = Path(__file__).parent / "batches"
VOCAB, PAD, STOP, GROUP = 31, 0, 30, 3


def make() -> dict[str, object]:
    """One batch of each stage: two prompts, three samples of each, every optional field there once and absent once."""
    length_P = np.array([3, 2], np.int32)
    tokens_PT = np.array([[5, 9, 2], [7, 4, PAD]], np.int32)
    prompts = Prompts(tokens_PT, length_P, np.array([11, 8], np.int32), VOCAB, PAD)
    prompt_B = np.repeat(length_P, GROUP)
    total_B = prompt_B + np.array([1, 4, 2, 5, 3, 1], np.int32)
    t = np.arange(8)
    completion_BT = (t >= prompt_B[:, None]) & (t < total_B[:, None])
    prompt_BT = np.pad(np.repeat(tokens_PT, GROUP, 0), ((0, 0), (0, 5)))
    tokens_BT = np.where(completion_BT, 1 + integers(6, 8, below=29), np.where(t < prompt_B[:, None], prompt_BT, PAD))
    finish_B = np.array([0, 1, 0, 1, 0, 0], np.int8)
    tokens_BT[finish_B == 0, total_B[finish_B == 0] - 1] = STOP
    logp_BT = np.where(completion_BT, -1.5 + wave(6, 8), 0).astype(np.float32)
    policy_logp_BT = np.where(completion_BT, -1.75 + wave(6, 8, phase=1.0), 0).astype(np.float32)
    mask_BT = completion_BT & (np.arange(6) != 4)[:, None]
    rollout = Rollout(
        tokens_BT=tokens_BT.astype(np.int32),
        prompt_length_B=prompt_B.astype(np.int32),
        total_length_B=total_B.astype(np.int32),
        loss_mask_BT=mask_BT,
        logp_BT=logp_BT,
        policy_logp_BT=policy_logp_BT,
        finish_B=finish_B,
        prompt_id_B=np.repeat(np.array([11, 8], np.int32), GROUP),
        sample_B=np.tile(np.arange(GROUP, dtype=np.int32), 2),
        group_B=np.repeat(np.arange(2, dtype=np.int32), GROUP),
        group_size=GROUP,
        sampling=SamplingParams(temperature=0.75, top_k=20, top_p=0.9, min_p=0.01, stop_ids=(STOP,)),
        policy=PolicyVersion(41, "c0ffee"),
        vocab_size=VOCAB,
        pad_id=PAD,
    )
    rewards = {"answer": [1.0, 0.0, None, 1.0, 0.0, 0.0], "format": [0.5, 0.5, 1.0, 0.0, None, 0.25]}
    scored = Scored.from_rewards(rollout, rewards, {"answer": 1.0, "format": 0.5})
    advantage_B = np.where(scored.scored_B, wave(6, phase=2.0), 0).astype(np.float32)
    full = TrainBatch(
        scored,
        np.where(mask_BT, advantage_B[:, None], 0).astype(np.float32),
        np.where(completion_BT, logp_BT - 0.125, 0).astype(np.float32),
        np.where(completion_BT, logp_BT - 0.25, 0).astype(np.float32),
    )
    return {
        "prompts": prompts,
        "rollout": rollout,
        "scored": scored,
        "train": TrainBatch(scored, advantage_B),
        "train-per-token": full,
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, batch in make().items():
        if not (FOLDER / f"{name}.npz").exists():
            save_batch(batch, FOLDER / f"{name}.npz")  # pyright: ignore[reportArgumentType]
