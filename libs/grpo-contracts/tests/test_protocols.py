"""Both protocols implemented in a few lines, and a policy that learns through them."""

from __future__ import annotations

from typing import Any

import numpy as np

from grpo_contracts import (
    PolicyVersion,
    Prompts,
    RewardFunction,
    Rollout,
    RolloutBackend,
    SamplingParams,
    Scored,
    from_completions,
    validate,
)


class Coin:
    """A policy that says heads (2) with probability p, else tails (1)."""

    def start(self) -> None: ...
    def close(self) -> None: ...

    def update_weights(self, params: float, policy: PolicyVersion) -> None:
        self.p, self.policy = params, policy

    def generate(self, prompts: Prompts, *, group_size: int, seed: int, step: int) -> Rollout:
        drawn_B = np.random.default_rng((seed, step)).random(len(prompts.length_P) * group_size)
        tokens = [[2] if u < self.p else [1] for u in drawn_B]
        logp = [[np.log(self.p if u < self.p else 1 - self.p)] for u in drawn_B]
        sampling = SamplingParams()
        return from_completions(prompts, tokens, logp, group_size=group_size, sampling=sampling, policy=self.policy)


def heads(*, prompts: list[str], completions: list[str], answers: list[str], **extra: Any) -> list[float | None]:
    return [None if not answer else float(completion == answer) for completion, answer in zip(completions, answers)]


def test_a_policy_learns_through_the_protocols() -> None:
    backend: RolloutBackend = Coin()
    reward: RewardFunction = heads
    assert isinstance(backend, RolloutBackend)
    assert not isinstance(heads, RolloutBackend)

    prompts = Prompts.from_ids([[3, 4], [5]], vocab_size=6)
    p = 0.5
    backend.start()
    for step in range(20):
        backend.update_weights(p, PolicyVersion(step, ""))
        rollout = backend.generate(prompts, group_size=8, seed=1, step=step)
        texts = ["heads" if 2 in row else "tails" for row in rollout.tokens_BT.tolist()]
        rewards = reward(prompts=["flip"] * 16, completions=texts, answers=["heads"] * 16, problem=[0] * 16)
        scored = Scored.from_rewards(rollout, {"heads": rewards})
        validate(scored, "values")
        p = min(p + float((scored.reward_B * (scored.reward_B - p)).mean()), 0.95)
    backend.close()
    assert p > 0.8
