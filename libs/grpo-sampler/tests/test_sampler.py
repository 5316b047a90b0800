"""The rollout engine: what it draws, what it reports, and what it never does twice."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from grpo_contracts import ContractError, FinishReason, PolicyVersion, Prompts, Rollout, SamplingParams, validate
from grpo_sampler import ModelConfig, Sampler, SamplerBackend, SamplerError, Transformer, merge, split
from grpo_sampler._slots import few_rows, shapes_for

POLICY = PolicyVersion(3, "ab12")
CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=23,
    width=16,
    mlp_width=32,
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_size=8,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-6,
    tied=True,
    qkv_bias=False,
    qk_norm=True,
    max_positions=256,
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    graphdef, params = split(Transformer(CONFIG, rngs=nnx.Rngs(0)))
    # The initial 0.02 makes all tokens equally likely; ten times that gives opinions.
    return merge(
        graphdef,
        jax.tree.map(
            lambda leaf: leaf * (1 if leaf.ndim == 1 or (leaf.ndim == 2 and leaf.shape[0] == 2) else 10), params
        ),
    )


@pytest.fixture(scope="module")
def params(model):
    return split(model)[1]


def prompts_of(lengths, seed=0, vocabulary=23, ids=None) -> Prompts:
    lengths = np.asarray(lengths, np.int32)
    tokens = np.random.default_rng(seed).integers(1, vocabulary, (len(lengths), lengths.max())).astype(np.int32)
    tokens[np.arange(lengths.max()) >= lengths[:, None]] = 0
    ids = np.arange(len(lengths)) if ids is None else ids
    return Prompts(tokens, lengths, np.asarray(ids, np.int32), vocabulary, 0)


STOPPING = SamplingParams(stop_ids=(5,))


@functools.cache  # programs compile once for all tests
def sampler_of(**options: Any) -> Sampler:
    # Two sizes are enough to shrink; each more is a second of compilation.
    defaults: dict[str, Any] = {"max_prompt_length": 12, "max_new_tokens": 16, "slots": 16, "sizes": 2}
    return Sampler(CONFIG, **defaults | options)


def generate(sampler: Sampler, params: Any, prompts: Prompts, group_size: int = 4, **options: Any) -> Rollout:
    defaults: dict[str, Any] = {"seed": 7, "step": 3, "policy": POLICY}
    rollout = sampler.generate(params, prompts, group_size=group_size, **defaults | options)
    validate(rollout, level="values")
    return rollout


def scored(model, rollout, sampling=None) -> np.ndarray:
    """Log-probabilities of a rollout's tokens by the training-style forward."""
    segment_BT = (np.arange(rollout.tokens_BT.shape[1]) < rollout.total_length_B[:, None]).astype(np.int32)
    hidden = model(jnp.asarray(rollout.tokens_BT), segment_BT=jnp.asarray(segment_BT))
    logp = jax.nn.log_softmax(
        jnp.einsum("BTD,VD->BTV", hidden, model.unembedding, preferred_element_type=jnp.float32), -1
    )
    taken = np.take_along_axis(np.asarray(logp)[:, :-1], rollout.tokens_BT[:, 1:, None], -1)[..., 0]
    return np.pad(taken, ((0, 0), (1, 0))) * rollout.loss_mask_BT


def same(a: Rollout, b: Rollout, atol=0.0) -> None:
    np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)
    np.testing.assert_array_equal(a.finish_B, b.finish_B)
    np.testing.assert_allclose(a.logp_BT, b.logp_BT, atol=atol, rtol=0)
    np.testing.assert_allclose(a.policy_logp_BT, b.policy_logp_BT, atol=atol, rtol=0)


@pytest.mark.parametrize("unroll", [True, False])
def test_decoded_log_probabilities_are_the_training_forwards(model, params, unroll, record_property):
    rollout = generate(sampler_of(unroll=unroll), params, prompts_of([1, 3, 12, 7, 2, 9]), sampling=STOPPING)
    gap = np.abs(scored(model, rollout) - rollout.policy_logp_BT).max()
    record_property("gap", float(gap))
    print(f"gap decode against training forward, f32: {gap:.2e}")
    assert gap <= 1e-5
    np.testing.assert_array_equal(rollout.logp_BT, rollout.policy_logp_BT)
    stopped = rollout.finish_B == FinishReason.STOP
    assert stopped.any()
    assert (~stopped).any()
    last = rollout.tokens_BT[np.arange(24), rollout.total_length_B - 1]
    np.testing.assert_array_equal(last == 5, stopped)
    assert (rollout.completion_length_B[~stopped] == 16).all()


def test_bfloat16_gap_is_within_its_bound(model, params):
    """Bound: 0.05 nats, for logits of order 1; bfloat16 keeps 8 bits, and errors add up over layers and heads."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rollout = generate(sampler_of(), half, prompts_of([3, 12, 7, 9]))
    gap = np.abs(scored(merge(*_bfloat16(half)), rollout) - rollout.policy_logp_BT).max()
    print(f"gap decode against training forward, bf16: {gap:.2e}")
    assert gap <= 0.05


def _bfloat16(params):
    return split(Transformer(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))[0], params


def test_greedy_is_the_training_forwards_argmax(model, params):
    rollout = generate(
        sampler_of(), params, prompts_of([5, 12, 1]), group_size=1, sampling=SamplingParams(temperature=0.0)
    )
    hidden = model(jnp.asarray(rollout.tokens_BT))
    best_BT = np.asarray(jnp.argmax(hidden @ model.unembedding.T, -1))
    np.testing.assert_array_equal(
        rollout.tokens_BT[:, 1:][rollout.loss_mask_BT[:, 1:]], best_BT[:, :-1][rollout.loss_mask_BT[:, 1:]]
    )
    assert (rollout.logp_BT == 0).all()


def test_sequences_follow_the_exact_joint_distribution(model, params, record_property):
    """Two tokens in a row against all 529 pairs, whose probabilities the network gives."""
    sampling = SamplingParams(temperature=1.3)
    sampler = sampler_of(sampling=sampling, max_new_tokens=2, slots=512, sizes=1)
    prompts = prompts_of([4])
    counts = np.zeros((23, 23))
    for step in range(20):
        rollout = generate(sampler, params, prompts, group_size=512, step=step)
        np.add.at(counts, (rollout.tokens_BT[:, 4], rollout.tokens_BT[:, 5]), 1)
    rows = np.concatenate([np.repeat(prompts.tokens_PT, 23, 0), np.arange(23)[:, None]], 1)
    logp = jax.nn.log_softmax(model(jnp.asarray(rows)) @ model.unembedding.T / 1.3, -1)
    expected = np.exp(np.asarray(logp[0, 3], np.float64)[:, None] + np.asarray(logp[:, 4], np.float64)) * counts.sum()
    frequent = expected >= 5
    observed = np.append(counts[frequent], counts[~frequent].sum())
    wanted = np.append(expected[frequent], expected[~frequent].sum())
    p = stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue
    record_property("p_value", float(p))
    print(f"chi-square, two tokens jointly ({frequent.sum()} cells): p = {p:.3f}")
    assert p > 1e-3


def test_the_law_reported_is_the_law_drawn_from(model, params):
    sampling = SamplingParams(temperature=0.7, top_k=9, top_p=0.8, min_p=0.02, stop_ids=(5,))
    rollout = generate(sampler_of(), params, prompts_of([5, 12, 1]), sampling=sampling)
    inside = rollout.loss_mask_BT
    assert (rollout.logp_BT[inside] >= rollout.policy_logp_BT[inside] - 2).all()
    assert not np.allclose(rollout.logp_BT, rollout.policy_logp_BT)
    np.testing.assert_allclose(scored(model, rollout), rollout.policy_logp_BT, atol=1e-5)


class TestRandomnessByIdentity:
    """Same (seed, step, prompt, sample, position), same draw."""

    lengths = (3, 12, 7, 5, 9, 2)

    def test_neither_order_nor_company_matters_within_a_shape(self, params):
        sampler, prompts = sampler_of(slots=24), prompts_of(self.lengths)
        whole = generate(sampler, params, prompts, sampling=STOPPING)
        turned = generate(sampler, params, _take(prompts, [5, 4, 3, 2, 1, 0]), sampling=STOPPING)
        order = np.arange(24).reshape(6, 4)[::-1].reshape(-1)
        same(_rows(turned, order), whole, atol=2e-6)

    def test_the_same_call_gives_the_same_bits(self, params):
        sampler, prompts = sampler_of(), prompts_of(self.lengths)
        first = generate(sampler, params, prompts, sampling=STOPPING)
        same(generate(sampler, params, prompts, sampling=STOPPING), first)

    @pytest.mark.parametrize("slots", [5, 16])
    def test_slots_do_not_matter(self, params, slots):
        prompts = prompts_of(self.lengths)
        few = generate(sampler_of(slots=slots), params, prompts, sampling=STOPPING)
        same(few, generate(sampler_of(slots=24), params, prompts, sampling=STOPPING), atol=3e-6)

    def test_every_part_of_the_identity_matters(self, params):
        sampler, prompts = sampler_of(), prompts_of([4, 4])
        base = generate(sampler, params, prompts).tokens_BT
        assert (generate(sampler, params, prompts, seed=8).tokens_BT != base).any()
        assert (generate(sampler, params, prompts, seed=7 + 2**32).tokens_BT != base).any()
        assert (generate(sampler, params, prompts, step=4).tokens_BT != base).any()
        renamed = Prompts(prompts.tokens_PT, prompts.length_P, prompts.prompt_id_P + 10, 23, 0)
        assert (generate(sampler, params, renamed).tokens_BT != base).any()
        assert len(np.unique(base[:4], axis=0)) == 4

    def test_smaller_groups_are_prefixes_of_larger_ones(self, params):
        small = generate(sampler_of(), params, prompts_of([4, 7]), group_size=2)
        large = generate(sampler_of(), params, prompts_of([4, 7]), group_size=4)
        same(_rows(large, [0, 1, 4, 5]), small, atol=3e-6)


def _take(prompts: Prompts, order) -> Prompts:
    return Prompts(prompts.tokens_PT[order], prompts.length_P[order], prompts.prompt_id_P[order], 23, 0)


def _rows(rollout: Rollout, rows: Any) -> Rollout:
    arrays = {name: getattr(rollout, name)[rows] for name in Rollout.specs() if name.endswith(("_B", "_BT"))}
    return dataclasses.replace(rollout, **arrays)


@pytest.mark.parametrize("batches", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_nothing_compiles_after_warm_up(params, batches):
    many = {"sizes": 4, "slots": 32} if batches == 500 else {}
    sampler = sampler_of(max_new_tokens=6, prompt_buckets=(6, 12), prefill_sizes=2, **many)
    sampler.warmup(params, group_sizes=(4, 1))
    warm, rng = sampler.compile_count, np.random.default_rng(0)
    print(f"programs compiled by warm-up: {warm}")
    with _no_compilation():
        for step in range(batches):
            lengths = rng.integers(1, 13, rng.integers(1, 9))
            sampling = SamplingParams(
                temperature=float(rng.uniform(0, 2)), stop_ids=tuple(rng.integers(0, 23, 3).tolist())
            )
            sampler.generate(
                params,
                prompts_of(lengths, step),
                group_size=int(rng.choice([1, 4])),
                seed=0,
                step=step,
                policy=POLICY,
                sampling=sampling,
                max_new_tokens=rng.integers(1, 7, len(lengths)),
            )
    assert sampler.compile_count == warm


@pytest.mark.parametrize("unroll", [True, False])
def test_prefill_pads_prompts_to_the_shortest_length_that_holds_them(model, params, unroll):
    """Few slots: units are used again, by shorter prompts too, and nothing of the longer one before may be seen."""
    few = {"max_prompt_length": 32, "max_new_tokens": 6, "slots": 8, "sizes": 1, "unroll": unroll}
    one, several = sampler_of(**few), sampler_of(prefill_sizes=4, **few)
    prompts = prompts_of([32, 7, 30, 3, 17, 9, 25, 1])
    counts = [np.array(sampler.prefill_positions) for sampler in (one, several)]
    same(generate(one, params, prompts), rollout := generate(several, params, prompts), atol=3e-6)
    logp_BT = scored(model, rollout)
    np.testing.assert_allclose(rollout.logp_BT[rollout.completion_BT], logp_BT[rollout.completion_BT], atol=1e-5)
    computed, live = (np.array(sampler.prefill_positions) - count for sampler, count in zip((one, several), counts))
    assert computed[1] == live[1] == sum(prompts.length_P - 1)
    # Half as many prompts at once, each at 8, 16, 24 or 32 tokens instead of 32.
    assert live[1] <= live[0] < computed[0] / 1.5
    assert live[0] % 8 == 0


class _no_compilation:
    """Fails if XLA compiles anything inside."""

    def __enter__(self):
        self.seen: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            self.seen.append(event)

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._note)
        assert not self.seen


def test_stream_yields_the_same_sequences(params):
    sampler, prompts = sampler_of(slots=5), prompts_of([3, 12, 7, 5, 9, 2, 6])
    rollout = generate(sampler, params, prompts, sampling=STOPPING)
    ended = list(sampler.stream(params, prompts, group_size=4, seed=7, step=3, sampling=STOPPING))
    assert sorted((e.group, e.sample) for e in ended) == [(p, s) for p in range(7) for s in range(4)]
    for e in ended:
        b = e.group * 4 + e.sample
        inside = slice(rollout.prompt_length_B[b], rollout.total_length_B[b])
        np.testing.assert_array_equal(e.tokens_T, rollout.tokens_BT[b, inside])
        np.testing.assert_array_equal(e.logp_T, rollout.logp_BT[b, inside])
        np.testing.assert_array_equal(e.policy_logp_T, rollout.policy_logp_BT[b, inside])
        assert e.finish == rollout.finish_B[b]


def test_every_request_keeps_its_own_limit(params):
    limit_P = np.array([1, 16, 3, 9])
    rollout = generate(sampler_of(slots=5), params, prompts_of([3, 5, 7, 12]), max_new_tokens=limit_P)
    np.testing.assert_array_equal(rollout.completion_length_B, np.repeat(limit_P, 4))
    assert (rollout.finish_B == FinishReason.LENGTH).all()
    whole = generate(sampler_of(slots=5), params, prompts_of([3, 5, 7, 12]))
    for b in range(16):
        n = rollout.total_length_B[b]
        np.testing.assert_array_equal(rollout.tokens_BT[b, :n], whole.tokens_BT[b, :n])


def test_no_sequence_stops_before_its_minimum(model, params):
    sampling = SamplingParams(stop_ids=tuple(range(0, 23, 2)))
    rollout = generate(sampler_of(min_new_tokens=5), params, prompts_of([3, 5, 7, 12]), sampling=sampling)
    assert rollout.completion_length_B.min() >= 5
    assert (rollout.finish_B == FinishReason.STOP).any()
    forbidden = (rollout.loss_mask_BT) & (np.arange(28) < rollout.prompt_length_B[:, None] + 5)
    assert (rollout.logp_BT[forbidden] > rollout.policy_logp_BT[forbidden]).all()
    np.testing.assert_allclose(scored(model, rollout), rollout.policy_logp_BT, atol=1e-5)


def test_a_ring_that_wraps_and_many_waves(model, params):
    lengths = np.random.default_rng(1).integers(1, 13, 40)
    sampling = SamplingParams(stop_ids=(5, 6, 7, 8))
    rollout = generate(sampler_of(slots=5), params, prompts_of(lengths), sampling=sampling)
    np.testing.assert_allclose(scored(model, rollout), rollout.policy_logp_BT, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": prompts_of([13])}, "at most max_prompt_length=12 tokens: prompt 0 has 13"),
        (
            {
                "prompts": Prompts(
                    np.full((1, 2), 23, np.int32), np.array([2], np.int32), np.array([0], np.int32), 99, 0
                )
            },
            "model's vocabulary: got 23",
        ),
        (
            {"prompts": Prompts.from_ids([[1, 2]], vocab_size=24)},
            "prompts.vocab_size must be at most the model's vocabulary, 23: got 24",
        ),
        (
            {"sampling": {"temperature": 0.5}},
            r"must be a SamplingParams: got a dict. Write SamplingParams\(\*\*sampling\)",
        ),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"step": -1}, "step must be at least 0"),
        ({"sampling": SamplingParams(stop_ids=(23,))}, "stop_ids must lie in"),
        ({"max_new_tokens": np.array([17])}, r"must lie in \[1, 16\]"),
        ({"max_new_tokens": np.array([1, 2])}, r"of shape \(1,\) or \(1, 4\)"),
    ],
)
def test_requests_that_do_not_fit_are_refused(params, options, message):
    with pytest.raises(SamplerError, match=message):
        generate(sampler_of(), params, **{"prompts": prompts_of([4])} | options)


def other(**changes: Any) -> Any:
    """Parameters of another model."""
    return split(Transformer(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)), r"dictionary of arrays: got a Transformer. .*split\(model\)"),
        (lambda: other(width=32), r"params embed must have shape \(23, 16\): got \(23, 32\)"),
        (lambda: other(vocab_size=24), r"params embed must have shape \(23, 16\): got \(24, 16\)"),
        (lambda: other(layers=3), r"params layers/attn_norm must have shape \(2, 16\): got \(3, 16\)"),
        (lambda: other(tied=False), "got also unembed"),
        (lambda: {k: v for k, v in other().items() if k != "layers"}, "must hold layers/attn_norm: it is missing"),
        (lambda: other() | {"embed": 1.5}, "params embed must be an array: got a float"),
        (lambda: other() | {"embed": jnp.zeros((23, 16), int)}, "params embed must be of a floating type: got int32"),
    ],
)
def test_parameters_of_another_model_are_refused_before_anything_compiles(given, message):
    sampler, prompts, wrong = Sampler(CONFIG, max_prompt_length=12, max_new_tokens=16), prompts_of([4]), given()
    identity: Any = {"group_size": 4, "seed": 0, "step": 0}
    for call in (
        lambda: sampler.generate(wrong, prompts, **identity),
        lambda: sampler.stream(wrong, prompts, **identity),
        lambda: sampler.warmup(wrong),
        lambda: sampler.programs(wrong, group_size=4),
        lambda: SamplerBackend(sampler).update_weights(wrong, POLICY),
    ):
        with pytest.raises(SamplerError, match=message):
            call()
    assert sampler.compile_count == 0


def test_arguments_of_another_type_are_refused():
    wrong: Any = dataclasses.asdict(CONFIG)
    with pytest.raises(SamplerError, match="config must be a ModelConfig: got a dict"):
        Sampler(wrong, max_prompt_length=12, max_new_tokens=16)
    wrong = {"temperature": 0.5}
    with pytest.raises(SamplerError, match="sampling must be a SamplingParams: got a dict"):
        Sampler(CONFIG, wrong, max_prompt_length=12, max_new_tokens=16)
    wrong = CONFIG
    with pytest.raises(SamplerError, match="sampler must be a Sampler: got a ModelConfig"):
        SamplerBackend(wrong)
    wrong = STOPPING
    with pytest.raises(SamplerError, match="a sequence of SamplingParams"):
        sampler_of().warmup({}, sampling=wrong)


def test_a_policy_version_need_not_be_given(params):
    rollout = sampler_of().generate(params, prompts_of([4]), group_size=4, seed=0, step=5)
    assert rollout.policy == PolicyVersion(5, "")
    validate(rollout, level="values")


def test_an_empty_prompt_is_refused(params):
    empty = Prompts(np.zeros((1, 3), np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), 23, 0)
    with pytest.raises(ContractError, match="length_P"):
        generate(sampler_of(), params, empty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be at least 1"),
        ({"max_new_tokens": 250}, "max_positions=256"),
        ({"min_new_tokens": 17}, "Lower min_new_tokens"),
        ({"prompt_buckets": (4,)}, "reach max_prompt_length=12"),
    ],
)
def test_invalid_samplers_are_refused(options, message):
    with pytest.raises(SamplerError, match=message):
        sampler_of(**options)


@pytest.mark.parametrize(
    ("rows", "few", "expected"),
    [(64, 1, [64, 32, 16, 8]), (3, 1, [3, 2, 1]), (64, 16, [64, 32, 16, 4]), (20, 16, [20, 5]), (4, 16, [4])],
)
def test_a_draining_batch_halves_until_few_rows_are_left(rows, few, expected):
    shapes = shapes_for(rows, 4, 4, streaming=False, few=few)
    assert [shape.rows for shape in shapes] == expected
    copies = shapes[0].units + max(1, shapes[0].units // 4)
    assert all(shape.units <= copies for shape in shapes)


def test_only_a_tiny_model_on_a_cpu_saves_sizes():
    tiny = ModelConfig("qwen3", 512, 128, 512, 4, 4, 2, 32, tied=True, qk_norm=True)
    small = dataclasses.replace(
        tiny, vocab_size=32_000, width=512, mlp_width=1536, layers=8, query_heads=8, head_size=64
    )
    assert (few_rows(tiny, unroll=True), few_rows(tiny, unroll=False), few_rows(small, unroll=True)) == (16, 1, 1)
