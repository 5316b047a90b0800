"""The library satisfies the laws, and says what is wrong when asked for something it cannot do."""

from typing import Any

import grpo_loss_laws as laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo_loss_plain import packed, padded, random_sequences

import grpo_loss
from grpo_loss import KL, LossError, Surrogate, drop_outside, fixed, gspo, ppo, sapo, truncate


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "case", laws.CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()) or "default"
)
def test_policy_loss_equals_the_loops(case):
    laws.check_policy_loss(grpo_loss, case)


@pytest.mark.parametrize("check", laws.CHECKS, ids=lambda check: check.__name__)
def test_law(check):
    check(grpo_loss)


@pytest.mark.parametrize("kind", ["ppo", "gspo", "gspo-token", "cispo", "sapo", "reinforce"])
def test_float32_and_any_split_agree_to_1e_6(kind):
    sequences = random_sequences(np.random.default_rng(1), 12, 12)
    arguments = {"kind": kind, "kl_coefficient": 0.1, "dtype": np.float32}
    whole, whole_gradient, _ = laws.evaluate(grpo_loss, sequences, padded, **arguments)
    for rows in (1, 3, 4):
        parts = [
            laws.evaluate(grpo_loss, sequences[i : i + rows], packed, width=96, **arguments) for i in range(0, 12, rows)
        ]
        numerator = sum(float(part[0].numerator) for part in parts)
        denominator = sum(float(part[0].denominator) for part in parts)
        gradient = np.concatenate([g for part in parts for g in part[1]])
        expected = np.concatenate(whole_gradient)
        assert numerator / denominator == pytest.approx(float(whole.loss()), rel=1e-6)
        assert np.abs(gradient - expected).max() <= 1e-6 * np.abs(expected).max()


def test_accepts_bfloat16_and_computes_in_float32():
    logp = jnp.full((2, 3), -1.0, jnp.bfloat16)
    terms = grpo_loss.policy_loss(logp, advantage_RT=jnp.ones((2, 1)), mask_RT=jnp.ones((2, 3), bool))
    assert terms.numerator.dtype == jnp.float32


def test_a_batch_without_tokens_has_loss_and_metrics_zero():
    terms = grpo_loss.policy_loss(
        jnp.full((2, 3), jnp.nan),
        advantage_RT=jnp.full((2, 1), jnp.nan),
        mask_RT=jnp.zeros((2, 3), bool),
    )
    assert float(terms.loss()) == 0
    assert all(float(value) == 0 for value in terms.means().values())


def test_terms_add_over_a_mapped_axis():
    sequences = random_sequences(np.random.default_rng(2), 4, 6)
    arrays, mask, _, _ = padded(sequences, 6)

    def terms(logp, old, advantage, mask):
        return grpo_loss.policy_loss(logp, old_logp_RT=old, advantage_RT=advantage, mask_RT=mask)

    columns = [arrays["logp"], arrays["old"], arrays["advantage"], mask]
    whole = terms(*map(jnp.asarray, columns))
    shards = [jnp.asarray(column).reshape(2, 2, 6) for column in columns]
    mapped = jax.vmap(lambda *shard: terms(*shard).over("rows"), axis_name="rows")(*shards)
    laws.close(mapped.numerator, np.full(2, whole.numerator))
    for name, value in whole.means().items():
        laws.close(mapped.means()[name], np.full(2, value))


def test_moments_add_over_a_mapped_axis():
    values = np.arange(6.0).reshape(2, 3)
    sums = jax.vmap(lambda v: grpo_loss.moments(v, jnp.ones(3, bool), axis_name="hosts"), axis_name="hosts")(values)
    laws.close(sums.mean, [2.5, 2.5])
    laws.close(sums.deviation, [17.5, 17.5])
    laws.close(sums.lowest, [0, 0])
    laws.close(sums.highest, [5, 5])


def test_group_advantages_compile():
    fixed = jax.jit(lambda r, g: grpo_loss.group_advantage(r, group_B=g))
    laws.close(
        fixed(np.array([1.0, 2, 3, 5]), np.array([9, 2, 9, 2])), np.array([-1, -1, 1, 1]) / np.sqrt(2), rtol=1e-5
    )


BASE = {"advantage_RT": jnp.ones((2, 1)), "mask_RT": jnp.ones((2, 3), bool)}
ARRAY_RT = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl": KL("k3", 0.1)}, "kl needs reference_logp_RT"),
        ({"entropy_coefficient": 0.1}, "entropy_coefficient needs entropy_RT"),
        ({"entropy_coefficient": -0.1, "entropy_RT": ARRAY_RT}, "entropy_coefficient must be .* at least 0"),
        ({"correction": drop_outside()}, "correction needs sampler_logp_RT"),
        ({"mask_RT": jnp.ones((3, 2), bool)}, "mask_RT must have shape"),
        ({"mask_RT": jnp.full((2, 3), 0.5)}, "mask_RT must be boolean: got float"),
        ({"advantage_RT": jnp.ones(2)}, "advantage_B"),
        ({"segment_RT": jnp.ones((2, 3), int)}, "advantage_RT"),
        ({"objective": "gspo"}, r"such as ppo\(\).*got 'gspo'"),
        ({"objective": gspo}, r"Call it: objective=gspo\(...\)"),
        ({"objective": lambda tokens: tokens.logp_RT}, "must return a Surrogate"),
        ({"aggregation": "token-mean"}, "such as token_mean"),
        ({"aggregation": fixed}, r"Call it: aggregation=fixed\(...\)"),
        ({"correction": truncate, "sampler_logp_RT": ARRAY_RT}, r"Call it: correction=truncate\(...\)"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_policy_loss_refuses(arguments, message):
    with pytest.raises(LossError, match=message):
        grpo_loss.policy_loss(ARRAY_RT, **BASE | arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ppo(1.2, 0.2), "clip_low"),
        (lambda: ppo(0.2, float("nan")), "clip_high"),
        (lambda: ppo(dual_clip=0.5), "greater than 1"),
        (lambda: gspo(clip_low=-0.1), "clip_low"),
        (lambda: sapo(0.0, 1.0), "positive"),
        (lambda: fixed(0), "positive number of tokens"),
        (lambda: KL("k4", 0.1), "k3"),  # pyright: ignore[reportArgumentType]
        (lambda: KL("k1", 0.1), "does not see the reference"),
        (lambda: KL("k3", -0.1), "coefficient must be .* at least 0"),
        (lambda: truncate(low=1.5), "low <= 1 <= high"),
        (lambda: drop_outside(level="word"), "Did you mean"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_no_value_is_nonsense(make, message):
    with pytest.raises(LossError, match=message):
        make()


def test_an_objective_of_your_own():
    def doubled(tokens):
        return Surrogate(2 * tokens.advantage_RT * tokens.logp_RT, tokens.ratio_RT)

    sequences = random_sequences(np.random.default_rng(4), 5, 8)
    arrays, mask, segment, _ = packed(sequences, 16)
    logp, advantage = jnp.asarray(arrays["logp"]), jnp.asarray(arrays["advantage"])
    gradient = jax.grad(
        lambda x: (
            grpo_loss.policy_loss(
                x, advantage_RT=advantage, mask_RT=jnp.asarray(mask), segment_RT=jnp.asarray(segment), objective=doubled
            ).numerator
        )
    )(logp)
    laws.close(gradient, np.where(mask, -2 * arrays["advantage"], 0))


def test_a_kl_of_coefficient_zero_is_only_a_metric():
    sequences = random_sequences(np.random.default_rng(6), 3, 5)
    arrays, mask, _, _ = padded(sequences, 5)
    given: dict[str, Any] = {"advantage_RT": jnp.asarray(arrays["advantage"]), "mask_RT": jnp.asarray(mask)}
    logp, reference = jnp.asarray(arrays["logp"]), jnp.asarray(arrays["reference"])
    plain = grpo_loss.policy_loss(logp, **given)
    shown = grpo_loss.policy_loss(logp, **given, reference_logp_RT=reference, kl=KL("k2", 0.0))
    assert float(shown.loss()) == float(plain.loss())
    laws.close(shown.means()["kl"], ((arrays["logp"] - arrays["reference"])[mask] ** 2 / 2).mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grpo_loss.group_advantage(np.ones((2, 2)), group_size=2), "Flatten groups"),
        (lambda: grpo_loss.group_advantage(np.ones(4)), "one of group_B"),
        (lambda: grpo_loss.group_advantage(np.ones(4), group_size=3), "divide"),
        (lambda: grpo_loss.group_advantage(np.ones(4), group_size=2, scale="std"), "sample"),  # pyright: ignore[reportArgumentType]
        (lambda: grpo_loss.group_advantage(np.ones(4), group_size=2, scored_B=np.ones(3, bool)), "scored_B"),
        (lambda: grpo_loss.group_advantage(np.array([1, np.nan, 0, 1]), group_size=2), r"got nan at \[1\]"),
        (lambda: grpo_loss.rloo_advantage(np.array([1, 2, np.inf, 1]), group_size=2), r"got inf at \[2\]"),
        (lambda: grpo_loss.overlong_penalty(np.ones(4, int), max_tokens=10, buffer_tokens=0), "buffer"),
        (lambda: grpo_loss.token_reward(np.ones(2), np.ones((2, 3), bool), kl_coefficient=0.1), "go together"),
        (lambda: grpo_loss.gae(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3), bool), discount=1.5), "discount"),
        (lambda: grpo_loss.top_entropy_mask(np.ones((2, 3)), np.ones((2, 3), bool), fraction=0.0), "fraction"),
    ],
)
def test_advantages_refuse(call, message):
    with pytest.raises(LossError, match=message):
        call()


def test_a_reward_that_could_not_be_computed_may_be_anything():
    scored = np.array([True, False, True, True])
    reward, group = np.array([1, np.nan, 0, 1]), np.array([0, 0, 0, 1])
    advantage = grpo_loss.group_advantage(reward, scored_B=scored, group_B=group, scale="none")
    laws.close(advantage, [0.5, 0, -0.5, 0])
