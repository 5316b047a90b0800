"""Sampling against its definition, written out with numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from grpo_contracts import SamplingParams
from grpo_sampler import SamplerError, log_probabilities
from grpo_sampler._sampling import draw, is_filtered, sampling_arrays

DRAWS = 40_000
SAMPLINGS = {
    "plain": SamplingParams(),
    "temperature 0.6": SamplingParams(temperature=0.6),
    "temperature 1.7": SamplingParams(temperature=1.7),
    "top_k": SamplingParams(top_k=5),
    "top_k 1": SamplingParams(top_k=1),
    "top_k beyond the vocabulary": SamplingParams(top_k=99),
    "top_p": SamplingParams(top_p=0.7),
    "top_p tiny": SamplingParams(top_p=1e-6),
    "min_p": SamplingParams(min_p=0.15),
    "temperature, top_k": SamplingParams(temperature=0.8, top_k=7),
    "temperature, top_p": SamplingParams(temperature=1.4, top_p=0.8),
    "temperature, min_p": SamplingParams(temperature=1.4, min_p=0.1),
    "top_k, top_p": SamplingParams(top_k=6, top_p=0.8),
    "top_k, min_p": SamplingParams(top_k=6, min_p=0.2),
    "top_p, min_p": SamplingParams(top_p=0.9, min_p=0.2),
    "all": SamplingParams(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
}


def exact(logits_V: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """The probabilities, by sorting and applying one filter after another as transformers does."""
    scaled = np.asarray(logits_V, np.float64) / sampling.temperature
    kept = np.ones(len(scaled), bool)

    def probabilities() -> np.ndarray:
        weight = np.where(kept, np.exp(scaled - scaled[kept].max()), 0)
        return weight / weight.sum()

    if sampling.top_k:
        kept &= scaled >= np.sort(scaled)[::-1][min(sampling.top_k, len(scaled)) - 1]
    if sampling.top_p < 1:
        p = probabilities()
        above = np.array([p[p > value].sum() for value in p])
        kept &= above < sampling.top_p
    if sampling.min_p:
        p = probabilities()
        kept &= p >= sampling.min_p * p.max()
    return probabilities()


def bits(count: int, seed: int) -> jax.Array:
    return jax.random.bits(jax.random.key(seed), (count, 2), jnp.uint32)


compiled_draw = jax.jit(draw, static_argnames="filtered")


def draw_many(logits_V: np.ndarray, sampling: SamplingParams, seed: int, count: int = DRAWS):
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (count, len(logits_V)))
    return jax.device_get(
        compiled_draw(
            logits_BV, bits(count, seed), sampling_arrays(sampling, len(logits_V)), filtered=is_filtered(sampling)
        )
    )


@pytest.mark.parametrize("vocabulary", [12, 13])  # in even blocks, and padded
@pytest.mark.parametrize("name", SAMPLINGS)
def test_draws_follow_the_exact_distribution(name, vocabulary, record_property):
    sampling = SAMPLINGS[name]
    logits_V = np.random.default_rng(3).normal(0, 1.5, vocabulary).astype(np.float32)
    expected_V = exact(logits_V, sampling)
    result = draw_many(logits_V, sampling, seed=vocabulary)
    counts_V = np.bincount(result.token_B, minlength=vocabulary)
    assert counts_V[expected_V == 0].sum() == 0
    alive = expected_V > 0
    p = 1.0 if alive.sum() == 1 else stats.chisquare(counts_V[alive], DRAWS * expected_V[alive]).pvalue
    record_property("p_value", float(p))
    print(f"chi-square, {name}, vocabulary {vocabulary}: p = {p:.3f}")
    assert p > 1e-3
    np.testing.assert_allclose(result.logp_B, np.log(expected_V[result.token_B]), atol=2e-6)
    policy_V = exact(logits_V, SamplingParams())
    np.testing.assert_allclose(result.policy_logp_B, np.log(policy_V[result.token_B]), atol=2e-6)


@pytest.mark.parametrize("seed", range(5))
def test_whole_distribution_under_random_parameters(seed):
    rng = np.random.default_rng(seed)
    logits_BV = rng.normal(0, 3, (40, 97)).astype(np.float32)
    sampling = SamplingParams(
        temperature=float(rng.uniform(0.3, 2)),
        top_k=int(rng.integers(0, 60)),
        top_p=float(rng.uniform(0.2, 1)),
        min_p=float(rng.choice([0, 0.01, 0.1])),
    )
    found_BV = np.exp(log_probabilities(jnp.asarray(logits_BV), sampling))
    for logits_V, found_V in zip(logits_BV, found_BV):
        np.testing.assert_allclose(found_V, exact(logits_V, sampling), rtol=3e-6, atol=1e-9)


def test_ties_at_a_boundary_all_stay():
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    for sampling in (SamplingParams(top_k=2), SamplingParams(top_p=0.6), SamplingParams(min_p=0.3)):
        found = np.isfinite(log_probabilities(jnp.asarray(logits), sampling))
        assert found.tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("vocabulary", [512, 32_000, 151_936, 7919])
def test_log_probabilities_of_large_vocabularies(vocabulary):
    logits_BV = np.random.default_rng(0).normal(0, 2, (6, vocabulary)).astype(np.float32)
    result = jax.device_get(
        draw(jnp.asarray(logits_BV), bits(6, 1), sampling_arrays(SamplingParams(), vocabulary), filtered=False)
    )
    wide = logits_BV.astype(np.float64)
    logp_BV = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    assert (result.token_B < vocabulary).all()
    np.testing.assert_allclose(result.logp_B, np.take_along_axis(logp_BV, result.token_B[:, None], 1)[:, 0], atol=3e-6)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("word", [0, 2**31, 2**32 - 1])
def test_extreme_uniforms_never_draw_the_impossible(word, filtered):
    logits_BV = np.full((9, 300), -np.inf, np.float32)
    allowed = np.random.default_rng(word % 7).choice(300, (9, 3))
    np.put_along_axis(logits_BV, allowed, np.array([0, -3, -80], np.float32), 1)
    extreme = jnp.full((9, 2), word, jnp.uint32)
    result = jax.device_get(
        draw(jnp.asarray(logits_BV), extreme, sampling_arrays(SamplingParams(), 300), filtered=filtered)
    )
    assert np.isfinite(np.take_along_axis(logits_BV, result.token_B[:, None], 1)).all()
    assert np.isfinite(result.logp_B).all()


@pytest.mark.parametrize("filtered", [False, True])
def test_greedy_takes_the_first_maximum(filtered):
    logits_BV = np.random.default_rng(0).integers(0, 9, (50, 301)).astype(np.float32)
    sampling = sampling_arrays(SamplingParams(temperature=0.0), 301)
    result = jax.device_get(draw(jnp.asarray(logits_BV), bits(50, 0), sampling, filtered=filtered))
    np.testing.assert_array_equal(result.token_B, logits_BV.argmax(1))
    assert (result.logp_B == 0).all()
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits_BV)), result.token_B[:, None], 1)[:, 0]
    np.testing.assert_allclose(result.policy_logp_B, expected, atol=2e-6)


def test_greedy_and_forbidden_rows_have_whole_distributions_too():
    logits_BV = jnp.array([[1.0, 3.0, 3.0, 0.0]] * 2)
    forbid_B = jnp.array([False, True])
    found_BV = np.exp(log_probabilities(logits_BV, SamplingParams(temperature=0.0, stop_ids=(1,)), forbid_B))
    assert found_BV.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    found_BV = np.exp(log_probabilities(logits_BV, SamplingParams(stop_ids=(1,)), forbid_B))
    weight_BV = np.exp(np.asarray(logits_BV, np.float64)) * [[1, 1, 1, 1], [1, 0, 1, 1]]
    np.testing.assert_allclose(found_BV, weight_BV / weight_BV.sum(1, keepdims=True), rtol=1e-6)


def test_forbidden_stop_ids_leave_a_renormalized_distribution(record_property):
    logits_V = np.random.default_rng(5).normal(0, 1, 12).astype(np.float32)
    sampling = SamplingParams(stop_ids=(0, 11))
    logits_BV = jnp.broadcast_to(logits_V, (DRAWS, 12))
    forbid_B = jnp.arange(DRAWS) % 2 == 0
    result = jax.device_get(draw(logits_BV, bits(DRAWS, 2), sampling_arrays(sampling, 12), forbid_B, filtered=True))
    expected_V = np.exp(np.where(np.isin(np.arange(12), sampling.stop_ids), -np.inf, logits_V.astype(np.float64)))
    expected_V /= expected_V.sum()
    counts_V = np.bincount(result.token_B[::2], minlength=12)
    assert counts_V[[0, 11]].sum() == 0
    p = stats.chisquare(counts_V[1:11], counts_V.sum() * expected_V[1:11]).pvalue
    record_property("p_value", float(p))
    print(f"chi-square, forbidden stop ids: p = {p:.3f}")
    assert p > 1e-3
    np.testing.assert_allclose(result.logp_B[::2], np.log(expected_V[result.token_B[::2]]), atol=2e-6)
    assert np.isin(result.token_B[1::2], sampling.stop_ids).any()


def test_values_of_sampling_parameters_compile_nothing():
    traced = []

    def traced_draw(logits_BV, bits_B2, sampling, filtered):
        traced.append(filtered)
        return draw(logits_BV, bits_B2, sampling, filtered=filtered)

    compiled = jax.jit(traced_draw, static_argnames="filtered")
    logits_BV = jnp.zeros((4, 20))
    for name, sampling in SAMPLINGS.items():
        compiled(logits_BV, bits(4, len(name)), sampling_arrays(sampling, 20), filtered=is_filtered(sampling))
    assert sorted(traced) == [False, True]


@pytest.mark.parametrize(
    ("sampling", "min_new", "message"),
    [
        (SamplingParams(stop_ids=(3, 20)), 0, r"stop_ids must lie in \[0, 20\): got \[20\]"),
        (SamplingParams(stop_ids=tuple(range(20))), 1, "no token is left to sample"),
        (SamplingParams(stop_ids=tuple(range(18))), 0, "at most 16"),
    ],
)
def test_sampling_parameters_that_do_not_fit_are_refused(sampling, min_new, message):
    with pytest.raises(SamplerError, match=message):
        sampling_arrays(sampling, 20, min_new)
