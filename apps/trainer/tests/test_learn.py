"""From rewards to what the updates learn from: advantages, masks, and the log-probabilities needed on the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy import load

from grpo_contracts import FinishReason, PolicyVersion, Rollout, SamplingParams, Scored, validate
from grpo_loss import PackShape
from grpo_mesh import BATCH_AXES, make_mesh
from grpo_trainer.assemble import Run
from grpo_trainer.learn import make_batch

P, G, PROMPT, NEW = 2, 3, 2, 4
B, T = P * G, PROMPT + NEW
LENGTH = np.array([4, 2, 1, 3, 4, 2], np.int32)  # of the completions
CUT = LENGTH == NEW
COMPLETION = (np.arange(T) >= PROMPT) & (np.arange(T) < PROMPT + LENGTH[:, None])
GROUP = np.repeat(np.arange(P, dtype=np.int32), G)
FIRST = np.array([1, 0, 0.5, 2, 2, 0], np.float32)  # of two reward functions
SECOND = np.array([0, 3, 1, 1, 0, 0], np.float32)
REWARD = FIRST + 0.5 * SECOND
# Log-probabilities and entropies of the tokens: what a network would say.
WAVE = np.sin(np.arange(B * T, dtype=np.float32)).reshape(B, T)
OLD, REFERENCE, ENTROPY = -1.5 + WAVE, -1.2 - 0.5 * WAVE, 1 + 0.9 * WAVE[::-1]
STOP = 6
KL = ("loss.kl_coefficient=0.25", "loss.reference=initial", "loss.kl_in=reward")


@pytest.fixture(scope="module")
def scored() -> Scored:
    zero_BT = np.zeros((B, T), np.float32)
    tokens_BT = np.where(COMPLETION | (np.arange(T) < PROMPT), 5, 0).astype(np.int32)
    ended_B = np.flatnonzero(~CUT)
    tokens_BT[ended_B, PROMPT + LENGTH[ended_B] - 1] = STOP
    rollout = Rollout(
        tokens_BT=tokens_BT,
        prompt_length_B=np.full(B, PROMPT, np.int32),
        total_length_B=PROMPT + LENGTH,
        loss_mask_BT=COMPLETION,
        logp_BT=zero_BT,
        policy_logp_BT=zero_BT,
        finish_B=np.where(CUT, FinishReason.LENGTH, FinishReason.STOP).astype(np.int8),
        prompt_id_B=GROUP,
        sample_B=np.tile(np.arange(G, dtype=np.int32), P),
        group_B=GROUP,
        group_size=G,
        sampling=SamplingParams(stop_ids=(STOP,)),
        policy=PolicyVersion(0, "ab" * 32),
        vocab_size=9,
        pad_id=0,
    )
    return Scored.from_rewards(rollout, {"one": FIRST.tolist(), "two": SECOND.tolist()}, {"one": 1.0, "two": 0.5})


def run(*sets: str) -> Run:
    """As much of a run as a batch is made with: its network says OLD, its reference REFERENCE."""
    given = load([], ["rollout.prompts=2", "rollout.group_size=3", "rollout.max_new_tokens=4", "loss.rows=2", *sets])

    def score(params: np.ndarray, packed: Any) -> tuple[np.ndarray, np.ndarray]:
        source_MRT = np.asarray(packed.micro.source_RT)
        return params.reshape(-1)[source_MRT], ENTROPY.reshape(-1)[source_MRT]

    shape = PackShape.for_rollout(
        sequences=B, groups=P, max_prompt_length=PROMPT, max_new_tokens=NEW, rows=2, row_length=8, blocks=1
    )
    mesh = make_mesh("dp:1", jax.devices()[:1])
    rows_sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    plan = SimpleNamespace(pack_shapes=[shape], score=score, rows_sharding=rows_sharding)
    reference = REFERENCE if given.loss.reference != "none" else None
    return cast(Run, SimpleNamespace(settings=given, plan=plan, reference=reference, frozen=()))


def advantage(scored: Scored, *sets: str) -> np.ndarray:
    batch = make_batch(run(*sets), OLD, scored)
    validate(batch, level="values")
    return np.asarray(batch.advantage)


def by_group(value_B: np.ndarray) -> np.ndarray:
    return value_B.reshape(P, G)


def grpo(reward_B: np.ndarray) -> np.ndarray:
    """Rewards minus their group's mean, over its standard deviation (n - 1)."""
    groups = by_group(reward_B)
    mean, std = groups.mean(1, keepdims=True), groups.std(1, ddof=1, keepdims=True)
    return ((groups - mean) / (std + 1e-6)).reshape(-1)


def gdpo(first_B: np.ndarray, second_B: np.ndarray) -> np.ndarray:
    total = grpo(first_B) + 0.5 * grpo(second_B)
    return (total - total.mean()) / total.std()


GROUPS = by_group(REWARD)
ESTIMATES = {
    "grpo": grpo(REWARD),
    "dr-grpo": (GROUPS - GROUPS.mean(1, keepdims=True)).reshape(-1),
    "rloo": (GROUPS - (GROUPS.sum(1, keepdims=True) - GROUPS) / (G - 1)).reshape(-1),
    "batch-std": (GROUPS - GROUPS.mean(1, keepdims=True)).reshape(-1) / REWARD.std(),
    "gdpo": gdpo(FIRST, SECOND),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimators(scored: Scored, name: str) -> None:
    np.testing.assert_allclose(advantage(scored, f"loss.advantage={name}"), ESTIMATES[name], rtol=1e-4, atol=1e-5)


def test_gdpo_is_not_grpo_of_the_sum(scored: Scored) -> None:
    """In the first group both functions order the samples the other way round: the sum hides what each one says."""
    assert np.abs(ESTIMATES["gdpo"] - ESTIMATES["grpo"]).max() > 0.1


def test_advantages_are_clipped(scored: Scored) -> None:
    free = advantage(scored)
    assert np.abs(free).max() > 0.9
    np.testing.assert_allclose(advantage(scored, "loss.clip_advantage=0.9"), np.clip(free, -0.9, 0.9))


def test_truncated_completions_are_left_out_of_the_loss_alone(scored: Scored) -> None:
    batch = make_batch(run("loss.drop_truncated=true"), OLD, scored)
    mask_BT = np.asarray(batch.scored.rollout.loss_mask_BT)
    np.testing.assert_array_equal(mask_BT, COMPLETION & ~CUT[:, None])
    # Their rewards still say how good the others are.
    np.testing.assert_allclose(np.asarray(batch.advantage), ESTIMATES["grpo"], rtol=1e-4)
    assert make_batch(run(), OLD, scored).scored.rollout.loss_mask_BT is scored.rollout.loss_mask_BT


@pytest.mark.parametrize(
    ("estimator", "kl_BT"),
    [
        ("k1", OLD - REFERENCE),
        ("k2", (OLD - REFERENCE) ** 2 / 2),
        ("k3", np.exp(REFERENCE - OLD) - 1 + OLD - REFERENCE),
    ],
)
def test_a_kl_in_the_reward_is_taken_from_it(scored: Scored, estimator: str, kl_BT: np.ndarray) -> None:
    given = run(*KL, f"loss.kl={estimator}")
    batch = make_batch(given, OLD, scored)
    validate(batch, level="values")
    penalty_B = 0.25 * (kl_BT * COMPLETION).sum(1)
    np.testing.assert_allclose(np.asarray(batch.advantage), grpo(REWARD - penalty_B), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(batch.scored.reward_B, scored.reward_B)  # metrics show rewards as they were
    # What was computed on the way is not computed again by the update.
    np.testing.assert_allclose(np.asarray(batch.old_logp_BT)[COMPLETION], OLD[COMPLETION], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(batch.reference_logp_BT)[COMPLETION], REFERENCE[COMPLETION], rtol=1e-6)


def test_unscored_completions_have_no_kl_either(scored: Scored) -> None:
    keep_B = np.arange(B) != 4
    one = [None if b == 4 else float(value) for b, value in enumerate(FIRST)]
    some = Scored.from_rewards(scored.rollout, {"one": one}, {"one": 1.0})
    result = advantage(some, *KL, "loss.kl=k1", "loss.advantage=dr-grpo")
    reward_B = FIRST - 0.25 * ((OLD - REFERENCE) * COMPLETION).sum(1)
    expected = np.zeros(B)
    for group in range(P):
        rows = keep_B & (group == GROUP)
        expected[rows] = reward_B[rows] - reward_B[rows].mean()
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_only_the_tokens_of_highest_entropy_learn(scored: Scored) -> None:
    """A quarter of 16 completion tokens is 4, over the whole batch."""
    assert COMPLETION.sum() == 16
    kept_BT = COMPLETION & (np.sort(ENTROPY[COMPLETION])[-4] <= ENTROPY)
    result = advantage(scored, "loss.top_entropy=0.25")
    np.testing.assert_allclose(result, grpo(REWARD)[:, None] * kept_BT, rtol=1e-4, atol=1e-6)
    both = advantage(scored, "loss.top_entropy=0.25", "loss.clip_advantage=0.5")
    np.testing.assert_allclose(both, np.clip(grpo(REWARD), -0.5, 0.5)[:, None] * kept_BT, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["reinforce++", "reinforce++-baseline"])
def test_advantages_of_tokens_are_whitened_over_the_batch(scored: Scored, name: str) -> None:
    result_BT = advantage(scored, f"loss.advantage={name}")
    assert not result_BT[~COMPLETION].any()
    assert result_BT[COMPLETION].mean() == pytest.approx(0, abs=1e-5)
    assert result_BT[COMPLETION].std() == pytest.approx(1, abs=0.05)


def test_what_is_not_needed_is_not_computed(scored: Scored) -> None:
    batch = make_batch(run(), OLD, scored)
    assert batch.scored is scored
    assert (batch.old_logp_BT, batch.reference_logp_BT) == (None, None)
