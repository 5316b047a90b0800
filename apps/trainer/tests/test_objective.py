"""Every setting of the loss changes what it says it changes: the loss of one micro-batch, against plain numpy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from toy import load

from grpo_loss import MicroBatch
from grpo_trainer.assemble.objective import make_policy_loss

# Three packed completions in two rows of five: lengths 2, 2 and 4, the rest padding.
SEGMENT = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 0]], np.int32)
SEQUENCES = [(0, [0, 1]), (0, [2, 3]), (1, [0, 1, 2, 3])]
MASK = SEGMENT > 0
ADVANTAGE = np.array([[1, 1, -2, -2, 0], [0.5, -0.5, 0.5, -0.5, 0]], np.float32)
LOGP = np.array([[-1, -2, -1.5, -0.2, 9], [-3, -0.5, -0.7, -1, 9]], np.float32)
OLD = LOGP - np.array([[0.5, -0.4, 1.3, -0.9, 5], [0.1, -0.1, 0.9, -0.8, 5]], np.float32)  # ratios from 0.4 to 3.7
REFERENCE = LOGP + np.array([[0.3, -0.6, 0.2, 0.1, 5], [-0.9, 0.4, -0.2, 0.7, 5]], np.float32)
SAMPLER = OLD - np.array([[0.9, -0.9, 0.1, -0.1, 5], [0.2, 0.3, -1.5, 0.6, 5]], np.float32)
ENTROPY = np.array([[0.5, 1, 1.5, 2, 9], [0.2, 0.4, 0.6, 0.8, 9]], np.float32)
RATIO = np.exp(LOGP - OLD)
KL = ("loss.kl_coefficient=0.5", "loss.reference=initial")


def loss(*sets: str) -> float:
    """Of the micro-batch, by the settings."""
    empty: Any = np.zeros(0, np.int32)
    micro = MicroBatch(
        prompt_tokens_PT=empty,
        prompt_length_P=empty,
        tokens_RT=empty,
        target_RT=empty,
        positions_RT=empty,
        segment_RT=jnp.asarray(SEGMENT),
        prompt_RC=empty,
        source_RT=empty,
        sequence_RT=empty,
        mask_RT=jnp.asarray(MASK),
        advantage_RT=jnp.asarray(ADVANTAGE),
        sampler_logp_RT=jnp.asarray(SAMPLER),
        old_logp_RT=jnp.asarray(OLD),
        reference_logp_RT=jnp.asarray(REFERENCE),
    )
    terms = make_policy_loss(load([], sets))(jnp.asarray(LOGP), jnp.asarray(ENTROPY), micro)
    return float(terms.numerator / terms.denominator)


def token_mean(value: np.ndarray) -> float:
    return float(value[MASK].sum() / 8)


def clipped(ratio: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.minimum(ratio * ADVANTAGE, np.clip(ratio, 1 - low, 1 + high) * ADVANTAGE)


def of_sequence(value: np.ndarray, reduce: Any) -> np.ndarray:
    """The same for every token of a sequence."""
    result = np.zeros_like(value)
    for row, columns in SEQUENCES:
        result[row, columns] = reduce(value[row, columns])
    return result


PPO = clipped(RATIO, 0.2, 0.2)
SEQUENCE_RATIO = np.exp(of_sequence(LOGP - OLD, np.mean))


def gate(positive: float, negative: float) -> np.ndarray:
    temperature = np.where(ADVANTAGE > 0, positive, negative)
    return 4 / temperature / (1 + np.exp(-temperature * (RATIO - 1))) * ADVANTAGE


@pytest.mark.parametrize(
    ("sets", "objective"),
    [
        ((), PPO),
        (("loss.clip_low=0.1", "loss.clip_high=0.5"), clipped(RATIO, 0.1, 0.5)),
        (("loss.dual_clip=2",), np.where(ADVANTAGE < 0, np.maximum(PPO, 2 * ADVANTAGE), PPO)),
        (("loss.kind=gspo",), clipped(SEQUENCE_RATIO, 3e-4, 4e-4)),
        (("loss.kind=gspo", "loss.clip_low=0.2", "loss.clip_high=0.3"), clipped(SEQUENCE_RATIO, 0.2, 0.3)),
        (("loss.kind=gspo-token", "loss.clip_low=0.2", "loss.clip_high=0.3"), clipped(SEQUENCE_RATIO, 0.2, 0.3)),
        (("loss.kind=cispo",), np.clip(RATIO, 0, 5) * ADVANTAGE * LOGP),
        (("loss.kind=cispo", "loss.clip_low=0.5", "loss.clip_high=1"), np.clip(RATIO, 0.5, 2) * ADVANTAGE * LOGP),
        (("loss.kind=sapo",), gate(1, 1.05)),
        (("loss.kind=sapo", "loss.sapo_positive=3"), gate(3, 1.05)),
        (("loss.kind=sapo", "loss.sapo_negative=0.5"), gate(1, 0.5)),
        (("loss.kind=reinforce",), ADVANTAGE * LOGP),
    ],
)
def test_objectives(sets: tuple[str, ...], objective: np.ndarray) -> None:
    assert loss(*sets) == pytest.approx(-token_mean(objective), rel=1e-5)


MEANS = [PPO[row, columns].mean() for row, columns in SEQUENCES]
SUMS = [PPO[row, columns].sum() for row, columns in SEQUENCES]


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (("loss.aggregation=token-mean",), token_mean(PPO)),
        (("loss.aggregation=sequence-mean-token-mean",), np.mean(MEANS)),
        (("loss.aggregation=sequence-mean-token-sum",), np.mean(SUMS)),
        (("loss.aggregation=fixed",), np.mean(SUMS) / 16),  # rollout.max_new_tokens
        (("loss.aggregation=fixed", "loss.horizon=100"), np.mean(SUMS) / 100),
    ],
)
def test_aggregations(sets: tuple[str, ...], expected: float) -> None:
    assert loss(*sets) == pytest.approx(-expected, rel=1e-5)


GAP = LOGP - REFERENCE
K3 = np.exp(-GAP) - 1 + GAP


@pytest.mark.parametrize(
    ("sets", "term"),
    [
        (KL, K3),
        ((*KL, "loss.kl=k2"), GAP**2 / 2),
        ((*KL, "loss.kl=k1-straight-through"), GAP),
        ((*KL, "loss.kl=k3-straight-through"), K3),
        ((*KL, "loss.kl_ratio=true"), K3 * RATIO),
        ((*KL, "loss.kl_in=reward"), 0 * K3),  # it is in the advantage already
    ],
)
def test_the_kl_in_the_loss(sets: tuple[str, ...], term: np.ndarray) -> None:
    assert loss(*sets) == pytest.approx(-token_mean(PPO) + 0.5 * token_mean(term), rel=1e-5)


def test_the_entropy_bonus() -> None:
    assert loss("loss.entropy_coefficient=0.25") == pytest.approx(
        -token_mean(PPO) - 0.25 * token_mean(ENTROPY), rel=1e-5
    )


WEIGHT = np.exp(OLD - SAMPLER)
SEQUENCE_WEIGHT = np.exp(of_sequence(OLD - SAMPLER, np.sum))


def dropped(weight: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.where((weight < low) | (weight > high), 0, weight)


@pytest.mark.parametrize(
    ("sets", "weight"),
    [
        (("truncate",), np.clip(WEIGHT, 0, 2)),
        (("drop",), dropped(WEIGHT, 0, 2)),
        (("truncate", "loss.correction_high=1.2"), np.clip(WEIGHT, 0, 1.2)),
        (("truncate", "loss.correction_low=0.8"), np.clip(WEIGHT, 0.8, 2)),
        (("drop", "loss.correction_low=0.5", "loss.correction_high=1.5"), dropped(WEIGHT, 0.5, 1.5)),
        (("truncate", "loss.correction_level=token"), np.clip(WEIGHT, 0, 2)),
        (("truncate", "loss.correction_level=sequence", "loss.correction_high=1.1"), np.clip(SEQUENCE_WEIGHT, 0, 1.1)),
        (("drop", "loss.correction_level=sequence", "loss.correction_low=0.9"), dropped(SEQUENCE_WEIGHT, 0.9, 2)),
    ],
)
def test_corrections(sets: tuple[str, ...], weight: np.ndarray) -> None:
    kind, *rest = sets
    assert loss(f"loss.correction={kind}", *rest) == pytest.approx(-token_mean(PPO * weight), rel=1e-5)
