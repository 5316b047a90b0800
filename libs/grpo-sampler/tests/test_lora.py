"""Adapters: they start as nothing, compute a low-rank change of each matrix, and travel as files of peft."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_contracts import Prompts, SamplingParams
from grpo_sampler import (
    LoRA,
    ModelConfig,
    Sampler,
    SamplerError,
    WeightsError,
    abstract,
    init_adapters,
    join_adapters,
    load_adapters,
    merge,
    merge_adapters,
    save_adapters,
    save_pretrained,
    split_adapters,
)

BASE = ModelConfig("qwen2", 61, 32, 48, 3, 4, 2, 8, qkv_bias=True, tied=True)
ALL = LoRA(4, 6.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 11)), jnp.int32)


def with_lora(lora=ALL, base=BASE):
    return replace(base, lora=lora)


def base_params(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), dtype), abstract(BASE)[1])


def moved(config, size=0.3):
    """Adapters after some training: B is no longer zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, size, leaf.shape), jnp.float32), init_adapters(config, seed=0)
    )


def logits(config, params, **options):
    model = merge(abstract(config, **options)[0], params)
    return model(TOKENS) @ model.unembedding.T.astype(model.compute_dtype)


def flat(weight, rank_axis):
    """A factor as a matrix of one layer, in numpy: [L, in, r] or [L, r, out]."""
    array, layers = np.asarray(weight, np.float64), len(weight)
    return array.reshape(layers, -1, array.shape[-1]) if rank_axis else array.reshape(layers, array.shape[1], -1)


def changed_in_numpy(params, adapters, lora):
    """W + alpha / rank · A B of every target, by the formula of the paper."""
    scale = lora.alpha / (lora.rank**0.5 if lora.rank_stabilized else lora.rank)
    layers = dict(params["layers"])
    for name in lora.targets:
        a, b = flat(adapters["layers"][f"{name}_a"], 1), flat(adapters["layers"][f"{name}_b"], 0)
        change = scale * np.einsum("lir,lro->lio", a, b)
        layers[name] = jnp.asarray(
            np.asarray(layers[name], np.float64) + change.reshape(layers[name].shape), jnp.float32
        )
    return {**params, "layers": layers}


def test_new_adapters_change_not_one_bit():
    config, params = with_lora(), base_params()
    joined = join_adapters(params, init_adapters(config, seed=3))
    np.testing.assert_array_equal(logits(config, joined), logits(BASE, params))


def test_they_start_from_their_seed():
    same, other = (init_adapters(with_lora(), seed=seed)["layers"] for seed in (3, 4))
    np.testing.assert_array_equal(same["q_a"], init_adapters(with_lora(), seed=3)["layers"]["q_a"])
    assert (np.asarray(same["q_a"]) != np.asarray(other["q_a"])).any()
    assert not np.asarray(same["down_b"]).any()
    bound = BASE.mlp_width**-0.5
    assert 0.9 * bound < np.abs(np.asarray(same["down_a"])).max() <= bound


@pytest.mark.parametrize(
    "lora", [ALL, LoRA(3, 6.0, ("q", "down")), LoRA(8, 2.0, ("o", "gate"), rank_stabilized=True), LoRA(1, 1.0, ("v",))]
)
def test_the_network_computes_the_low_rank_change(lora):
    config, params = with_lora(lora), base_params()
    adapters = moved(config)
    expected = logits(BASE, changed_in_numpy(params, adapters, lora))
    scale = np.abs(np.asarray(expected)).max()
    joined = join_adapters(params, adapters)
    np.testing.assert_allclose(logits(config, joined), expected, atol=2e-6 * scale)
    np.testing.assert_allclose(logits(BASE, merge_adapters(joined, config)), expected, atol=2e-6 * scale)
    assert np.abs(np.asarray(expected - logits(BASE, params))).max() > 0.05 * scale


def test_merging_into_bfloat16_rounds_each_weight_once():
    config, params = with_lora(), base_params(jnp.bfloat16)
    adapters = moved(config)
    merged = merge_adapters(join_adapters(params, adapters), config)
    exact = changed_in_numpy(params, adapters, ALL)
    for name in ALL.targets:
        assert merged["layers"][name].dtype == jnp.bfloat16
        difference = np.abs(np.asarray(merged["layers"][name], np.float64) - np.asarray(exact["layers"][name]))
        assert (difference <= 2.0**-8 * np.abs(np.asarray(exact["layers"][name])) + 1e-6).all()
    assert merged["layers"]["q_bias"] is params["layers"]["q_bias"]


def test_gradients_are_those_of_the_whole_matrix():
    """dA = scale · dW Bᵀ and dB = scale · Aᵀ dW, with dW the gradient in the merged matrix."""
    config, params = with_lora(), base_params()
    adapters = moved(config)
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(*TOKENS.shape, BASE.vocab_size)), jnp.float32)

    def of_adapters(adapters):
        return jnp.sum(weights * jax.nn.log_softmax(logits(config, join_adapters(params, adapters))))

    def of_matrices(params):
        return jnp.sum(weights * jax.nn.log_softmax(logits(BASE, params)))

    ours = jax.grad(of_adapters)(adapters)["layers"]
    full = jax.grad(of_matrices)(merge_adapters(join_adapters(params, adapters), config))["layers"]
    for name in ALL.targets:
        a, b = flat(adapters["layers"][f"{name}_a"], 1), flat(adapters["layers"][f"{name}_b"], 0)
        change = np.asarray(full[name], np.float64).reshape(BASE.layers, a.shape[1], b.shape[2])
        expected = {
            "a": ALL.alpha / ALL.rank * np.einsum("lio,lro->lir", change, b),
            "b": ALL.alpha / ALL.rank * np.einsum("lir,lio->lro", a, change),
        }
        for half, value in expected.items():
            given = np.asarray(ours[f"{name}_{half}"]).reshape(value.shape)
            np.testing.assert_allclose(given, value, atol=3e-6 * np.abs(value).max(), err_msg=name + half)


@pytest.mark.parametrize("unroll", [True, False])
def test_a_sampler_draws_from_the_merged_network(unroll):
    config, params = with_lora(), base_params()
    joined = join_adapters(params, moved(config))
    prompts = Prompts.from_ids([[5, 6, 7], [8, 9]], vocab_size=61)
    rollouts = [
        Sampler(of, SamplingParams(), max_prompt_length=4, max_new_tokens=8, slots=4, unroll=unroll).generate(
            weights, prompts, group_size=2, seed=1, step=0
        )
        for of, weights in ((config, joined), (BASE, merge_adapters(joined, config)))
    ]
    np.testing.assert_array_equal(rollouts[0].tokens_BT, rollouts[1].tokens_BT)
    np.testing.assert_allclose(rollouts[0].logp_BT, rollouts[1].logp_BT, atol=1e-5)


def test_shared_prompts_and_packed_rows_have_adapters_too():
    config, params = with_lora(), base_params()
    joined = join_adapters(params, moved(config))
    packed: dict[str, Any] = {
        "prompt_tokens_PT": TOKENS[:1, :4],
        "prompt_length_P": jnp.asarray([4]),
        "tokens_RT": TOKENS[:1, 4:],
        "positions_RT": jnp.arange(4, 11)[None],
        "segment_RT": jnp.ones((1, 7), jnp.int32),
        "prompt_RC": jnp.zeros((1, 1), jnp.int32),
    }
    whole = merge(abstract(config)[0], joined)(TOKENS[:1])
    for remat in (False, True):
        rows = merge(abstract(config, remat=remat)[0], joined).with_prompts(**packed)
        np.testing.assert_allclose(rows[0], whole[0, 4:], atol=1e-5)


def test_they_travel_in_the_layout_of_peft(tmp_path):
    lora = LoRA(4, 6.0, ("q", "o", "down"), rank_stabilized=True)
    config = with_lora(lora)
    adapters = moved(config)
    save_adapters(tmp_path, config, adapters, base="Qwen/Qwen2.5-0.5B")
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert facts["target_modules"] == ["q_proj", "o_proj", "down_proj"]
    assert (facts["r"], facts["lora_alpha"], facts["use_rslora"]) == (4, 6.0, True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.2.self_attn.o_proj.lora_A.weight"
    assert stored[name].shape == (4, 32)
    np.testing.assert_array_equal(stored[name], np.asarray(adapters["layers"]["o_a"][2]).reshape(32, 4).T)
    again, loaded = load_adapters(tmp_path, BASE)
    assert again == lora
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules"),
        ({"target_modules": "q_proj|v_proj"}, "target_modules"),
        ({"r": "four"}, "r and lora_alpha"),
        ({"r": 5}, "must have shape"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_other_adapters_are_refused(tmp_path, change, message):
    config = with_lora()
    save_adapters(tmp_path, config, moved(config))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(WeightsError, match=message):
        load_adapters(tmp_path, BASE)


@pytest.mark.parametrize("how", ["missing", "unexpected", "not finite", "no file"])
def test_damaged_adapters_are_refused(tmp_path, how):
    config = with_lora()
    save_adapters(tmp_path, config, moved(config))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    if how == "missing":
        del tensors[first]
    if how == "unexpected":
        tensors["lm_head.lora_A.weight"] = tensors[first]
    if how == "not finite":
        tensors[first] = np.full_like(tensors[first], np.nan)
    save_file(tensors, file)
    if how == "no file":
        file.unlink()
    with pytest.raises(WeightsError, match=r"adapter_model|shape|only adapters|finite"):
        load_adapters(tmp_path, BASE)


def test_nonsense_is_refused(tmp_path):
    for bad in ({"rank": 0}, {"alpha": -1.0}, {"targets": ()}, {"targets": ("q", "q")}, {"targets": ("lm_head",)}):
        with pytest.raises(SamplerError):
            LoRA(**{"rank": 4, "alpha": 8.0, **bad})
    with pytest.raises(SamplerError, match="must have lora"):
        init_adapters(BASE, seed=0)
    config, params = with_lora(), base_params()
    joined = join_adapters(params, init_adapters(config, seed=0))
    with pytest.raises(WeightsError, match="without adapters"):
        save_pretrained(tmp_path, config, joined)
    with pytest.raises(WeightsError, match="got also layers/"):
        Sampler(BASE, max_prompt_length=4, max_new_tokens=4).warmup(joined)
    with pytest.raises(WeightsError, match="missing"):
        Sampler(config, max_prompt_length=4, max_new_tokens=4).warmup(params)
    base, adapters = split_adapters(joined)
    assert base["layers"].keys() == params["layers"].keys()
    assert adapters["layers"].keys() == init_adapters(config, seed=0)["layers"].keys()
