"""Chunked log-probabilities against the plain computation."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_loss import LossError, logit_chunks, token_logp
from grpo_loss._token_logp import default_chunk


def plain(hidden_RTD, unembed_VD, target_RT, temperature):
    logits = jnp.einsum("rtd,vd->rtv", hidden_RTD, unembed_VD, preferred_element_type=jnp.float32) / temperature
    logp_RTV = jax.nn.log_softmax(logits)
    logp_RT = jnp.take_along_axis(logp_RTV, target_RT[..., None], axis=-1)[..., 0]
    return logp_RT, -(jnp.exp(logp_RTV) * logp_RTV).sum(axis=-1)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(4, 10, 16)), jnp.float32)
    unembed = jnp.asarray(rng.normal(size=(50, 16)) * 0.3, jnp.float32)
    target = jnp.asarray(rng.integers(0, 50, (4, 10)))
    mask = jnp.asarray(rng.random((4, 10)) < 0.6)
    weights = jnp.asarray(rng.normal(size=(2, 4, 10)), jnp.float32)
    return hidden, unembed, target, mask, weights


def objective(function, mask_RT, weights):
    def value(hidden, unembed, *arguments):
        logp_RT, entropy_RT = function(hidden, unembed, *arguments)
        return (jnp.where(mask_RT, weights[0] * logp_RT + weights[1] * entropy_RT, 0)).sum()

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


@pytest.mark.parametrize(
    ("chunk", "shards", "masked", "temperature"),
    [(7, 1, False, 1.0), (None, 1, True, 0.6), (7, 2, True, 1.3), (None, 2, True, 1.3), (64, 4, False, 0.6)],
)
def test_values_and_gradients_are_those_of_the_plain_computation(problem, chunk, shards, masked, temperature):
    hidden, unembed, target, mask, weights = problem
    counted = mask if masked else jnp.ones_like(mask)

    def fused(hidden, unembed, temperature):
        return token_logp(
            hidden,
            unembed,
            target,
            temperature=temperature,
            mask_RT=mask if masked else None,
            chunk=chunk,
            shards=shards,
        )

    def reference(hidden, unembed, temperature):
        return plain(hidden, unembed, target, temperature)

    _, gradient = objective(fused, counted, weights)(hidden, unembed, jnp.float32(temperature))
    _, expected_gradient = objective(reference, counted, weights)(hidden, unembed, jnp.float32(temperature))
    for actual, wanted in zip(gradient, expected_gradient, strict=True):
        assert jnp.abs(actual - wanted).max() <= 1e-5 * jnp.abs(wanted).max()
    for actual, wanted in zip(
        fused(hidden, unembed, temperature), reference(hidden, unembed, temperature), strict=True
    ):
        np.testing.assert_allclose(actual, jnp.where(counted, wanted, 0), atol=1e-5)


def test_the_temperature_divides_the_logits_before_the_softmax(problem):
    hidden, unembed, target, *_ = problem
    logp_RT, _ = token_logp(hidden, unembed, target, temperature=0.5)
    np.testing.assert_allclose(logp_RT, token_logp(hidden, unembed * 2, target)[0], atol=1e-5)


@pytest.mark.parametrize("chunk", [7, None])
def test_float64_is_exact(problem, chunk):
    with jax.enable_x64(True):
        hidden, unembed, target, mask, weights = (jnp.asarray(np.asarray(x), x.dtype) for x in problem)
        hidden, unembed, weights = (x.astype(jnp.float64) for x in (hidden, unembed, weights))

        def reference(hidden, unembed):
            logp_RTV = jax.nn.log_softmax(jnp.einsum("rtd,vd->rtv", hidden, unembed) / 0.7)
            chosen = jnp.take_along_axis(logp_RTV, target[..., None], axis=-1)[..., 0]
            return chosen, -(jnp.exp(logp_RTV) * logp_RTV).sum(axis=-1)

        def fused(hidden, unembed):
            return token_logp(hidden, unembed, target, temperature=0.7, mask_RT=mask, chunk=chunk)

        value, gradient = objective(fused, mask, weights)(hidden, unembed)
        expected, expected_gradient = objective(reference, mask, weights)(hidden, unembed)
        np.testing.assert_allclose(value, expected, rtol=1e-13)
        for actual, wanted in zip(gradient, expected_gradient, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-13)


def test_bfloat16_inputs_accumulate_in_float32(problem):
    hidden, unembed, target, _, weights = problem
    low = hidden.astype(jnp.bfloat16), unembed.astype(jnp.bfloat16)
    logp_RT, entropy_RT = token_logp(*low, target)
    exact = plain(low[0].astype(jnp.float32), low[1].astype(jnp.float32), target, 1.0)
    assert logp_RT.dtype == entropy_RT.dtype == jnp.float32
    np.testing.assert_allclose(logp_RT, exact[0], atol=1e-5)
    gradient = jax.grad(lambda h, w: (weights[0] * token_logp(h, w, target)[0]).sum(), (0, 1))(*low)
    assert [g.dtype for g in gradient] == [jnp.bfloat16, jnp.bfloat16]


def test_a_tied_embedding_receives_both_gradients(problem):
    _, unembed, target, _, weights = problem

    def value(function):
        return jax.grad(lambda embed: (weights[0] * function(embed[target] * 2, embed, target)[0]).sum())(unembed)

    wanted = value(lambda h, w, t: plain(h, w, t, 1.0))
    assert jnp.abs(value(token_logp) - wanted).max() <= 1e-5 * jnp.abs(wanted).max()


@pytest.mark.parametrize("chunk", [7, None])
def test_what_lies_at_masked_positions_never_matters(problem, chunk):
    hidden, unembed, target, mask, weights = problem
    poisoned = jnp.where(mask[..., None], hidden, jnp.nan)

    def value(hidden, unembed):
        return (token_logp(hidden, unembed, target, mask_RT=mask, chunk=chunk)[0] * weights[0]).sum()

    def gradient(hidden):
        return jax.grad(value, (0, 1))(hidden, unembed)

    for actual, wanted in zip(gradient(poisoned), gradient(hidden), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_a_masked_target_may_be_outside_the_vocabulary(problem):
    hidden, unembed, target, mask, _ = problem
    padded = jnp.where(mask, target, -1)
    for actual, wanted in zip(
        token_logp(hidden, unembed, padded, mask_RT=mask),
        token_logp(hidden, unembed, target, mask_RT=mask),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, wanted)


def test_no_position_counts(problem):
    hidden, unembed, target, mask, _ = problem
    logp_RT, entropy_RT = token_logp(hidden, unembed, target, mask_RT=jnp.zeros_like(mask))
    assert not logp_RT.any()
    assert not entropy_RT.any()


@pytest.mark.parametrize(("chunk", "products"), [(None, 3), (7, 4)])
def test_logits_that_make_one_chunk_are_computed_once(problem, chunk, products):
    hidden, unembed, target, mask, _ = problem

    def value(hidden, unembed):
        return token_logp(hidden, unembed, target, mask_RT=mask, chunk=chunk)[0].sum()

    traced = jax.jit(jax.grad(value, (0, 1))).trace(hidden, unembed)
    assert str(traced.jaxpr).count("dot_general[") == products


@pytest.mark.parametrize("vocabulary", [48, 32_000, 151_936, 500_000])
@pytest.mark.parametrize("tokens", [1, 511, 700, 1024, 1100, 5000, 100_000])
def test_chunks_are_few_and_the_last_is_hardly_emptier(tokens, vocabulary):
    chunk = default_chunk(tokens, vocabulary)
    chunks = logit_chunks(tokens, vocabulary)
    assert chunks == -(-tokens // chunk)
    assert chunk <= 512 or chunk * vocabulary <= 2**26
    assert chunks == 1 or chunks * chunk - tokens < 128 * chunks
    assert chunks == 1 or chunk > 256
    assert logit_chunks(tokens, vocabulary, chunk=300) == -(-tokens // 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "Score greedy"),
        ({"chunk": 0}, "chunk must be"),
        ({"shards": 3}, "divide the 4 rows"),
        ({"target_RT": jnp.zeros((4, 9), int)}, "target_RT must have shape"),
        ({"mask_RT": jnp.zeros((3, 10), bool)}, "mask_RT must have shape"),
        ({"mask_RT": jnp.ones((4, 10))}, "mask_RT must be boolean"),
        ({"unembed_VD": jnp.zeros((50, 8))}, r"must have shape \(vocabulary, 16\), a row per token: got \(50, 8\)"),
        ({"unembed_VD": jnp.zeros((16, 50))}, r"Transpose it \(`unembed.T`\)"),
        ({"hidden_RTD": jnp.zeros((10, 16))}, "three axes"),
        ({"target_RT": jnp.zeros((4, 10))}, "integers: got float32"),
        ({"target_RT": jnp.zeros((4, 10), int).at[1, 2].set(50)}, r"in \[0, 50\), the vocabulary: got 50 at \[1, 2\]"),
        ({"target_RT": np.full((4, 10), -1)}, r"got -1 at \[0, 0\]"),
    ],
)
def test_refuses_what_it_cannot_compute(problem, change, message):
    hidden, unembed, target, *_ = problem
    arguments = {"hidden_RTD": hidden, "unembed_VD": unembed, "target_RT": target} | change
    with pytest.raises(LossError, match=message):
        token_logp(**arguments)


def test_memory_at_real_size_is_a_fraction_of_the_plain_computation():
    abstract = jax.ShapeDtypeStruct
    shapes = (
        abstract((8, 1024, 896), jnp.float32),
        abstract((151_936, 896), jnp.float32),
        abstract((8, 1024), jnp.int32),
    )

    def temporaries(function):
        def value(hidden, unembed, target):
            logp_RT, entropy_RT = function(hidden, unembed, target)
            return (logp_RT + 0.1 * entropy_RT).sum()

        compiled = jax.jit(jax.value_and_grad(value, (0, 1))).lower(*shapes).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    fused, whole = temporaries(token_logp), temporaries(lambda h, w, t: plain(h, w, t, 1.0))
    print(f"fused {fused / 2**20:.0f} MiB, plain {whole / 2**20:.0f} MiB: {fused / whole:.1%}")
    assert fused < 0.25 * whole


@pytest.mark.slow
def test_a_sharded_vocabulary_stays_sharded():
    worker = Path(__file__).with_name("vocabulary_worker.py")
    output = subprocess.run([sys.executable, str(worker)], check=True, capture_output=True, text=True).stdout
    report = json.loads(output.splitlines()[-1])
    print(json.dumps(report, indent=1))
    for found in report.values():
        assert found["difference"] < 1e-5
        # Less than the unembedding (96 x 16) or a chunk of logits (16 x 96): the vocabulary is never gathered.
        assert found["largest_collective"] < 96 * 16
