"""Each protocol in ten lines, and one step of all four together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_contracts import (
    AdvantageEstimator,
    PolicyIdentity,
    PolicyUpdate,
    Prompts,
    RewardFunction,
    Rollout,
    RolloutBackend,
    SamplingLaw,
    Scored,
    TrainBatch,
    from_completions,
    validate,
)


class Coin:
    """A policy that says heads (2) with probability p, else tails (1)."""

    def start(self) -> None: ...
    def close(self) -> None: ...

    def update_weights(self, params: float, policy: PolicyIdentity) -> None:
        self.p, self.policy = params, policy

    def generate(self, prompts: Prompts, *, group_size: int, seed: int, step: int) -> Rollout:
        drawn_B = np.random.default_rng((seed, step)).random(len(prompts.length_P) * group_size)
        tokens = [[2] if u < self.p else [1] for u in drawn_B]
        logp = [[np.log(self.p if u < self.p else 1 - self.p)] for u in drawn_B]
        return from_completions(prompts, tokens, logp, group_size=group_size, law=SamplingLaw(), policy=self.policy)


def heads(*, prompts: list[str], completions: list[str], answers: list[str], **extra: Any) -> list[float | None]:
    return [None if not answer else float(completion == answer) for completion, answer in zip(completions, answers)]


def centred(scored: Scored) -> np.ndarray:
    reward_PG = scored.reward_B.reshape(-1, scored.rollout.group_size)
    return (reward_PG - reward_PG.mean(1, keepdims=True)).reshape(-1)


def nudge(state: float, batch: TrainBatch) -> tuple[float, Mapping[str, Any]]:
    gradient = float((batch.advantage * (batch.scored.reward_B - state)).mean())
    return min(max(state + gradient, 0.05), 0.95), {"reward": float(batch.scored.reward_B.mean())}


def test_four_phases_make_a_step() -> None:
    backend: RolloutBackend = Coin()
    reward: RewardFunction = heads
    advantages: AdvantageEstimator = centred
    update: PolicyUpdate = nudge
    assert isinstance(backend, RolloutBackend)
    assert not isinstance(heads, RolloutBackend)

    prompts = Prompts(
        np.array([[3, 4], [5, 0]], np.int32), np.array([2, 1], np.int32), np.arange(2, dtype=np.int32), 6, 0
    )
    validate(prompts, "values")
    state = 0.5
    backend.start()
    for step in range(20):
        backend.update_weights(state, PolicyIdentity(step, f"{step:08x}"))
        rollout = backend.generate(prompts, group_size=8, seed=1, step=step)
        texts = ["heads" if 2 in row else "tails" for row in rollout.tokens_BT.tolist()]
        scores = reward(prompts=["flip"] * 16, completions=texts, answers=["heads"] * 16, problem=[0] * 16)
        scored = Scored.from_rewards(rollout, {"heads": scores})
        batch = TrainBatch(scored, advantages(scored))
        validate(batch, "values")
        state, metrics = update(state, batch)
        assert 0 <= metrics["reward"] <= 1
    backend.close()
    assert state > 0.8


def test_each_fits_in_a_few_lines() -> None:
    for implementation in (Coin, heads, centred, nudge):
        lines = inspect.getsource(implementation).splitlines()[1:]
        assert len([line for line in lines if line.strip(' "')]) <= 10
