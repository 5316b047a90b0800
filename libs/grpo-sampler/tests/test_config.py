"""config.json in both generations, and what is refused by name."""

import json

import pytest

from grpo_sampler import Llama3Scaling, ModelConfig, SamplerError, UnsupportedModelError

QWEN25 = {  # Qwen2.5-0.5B-Instruct's own file
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA32 = {
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_reads_qwen25():
    config = ModelConfig.from_hf(QWEN25)
    assert (config.family, config.width, config.mlp_width, config.layers) == ("qwen2", 896, 4864, 24)
    assert (config.query_heads, config.kv_heads, config.head_size) == (14, 2, 64)
    assert (config.qkv_bias, config.qk_norm, config.tied) == (True, False, True)
    assert (config.rope_theta, config.rope_scaling, config.eos_ids) == (1e6, None, (151645,))


def test_reads_llama3_scaling_and_several_ends():
    config = ModelConfig.from_hf(LLAMA32)
    assert config.rope_scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert config.eos_ids == (128001, 128008, 128009)
    assert config.norm_eps == 1e-5


def test_reads_qwen3_with_its_own_head_size():
    config = ModelConfig.from_hf(QWEN3)
    assert (config.head_size, config.qk_norm, config.qkv_bias) == (128, True, False)
    assert ModelConfig.from_hf({k: v for k, v in QWEN3.items() if k != "head_dim"}).head_size == 128


@pytest.mark.parametrize("old", [QWEN25, LLAMA32, QWEN3], ids=["qwen2", "llama", "qwen3"])
def test_both_generations_of_rope_and_the_round_trip_agree(old):
    config = ModelConfig.from_hf(old)
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": old["rope_theta"],
        **(old.get("rope_scaling") or {}),
    }
    assert ModelConfig.from_hf(new) == config
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf("bfloat16")))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "model_type .*'gemma2'"),
        ({"hidden_act": "gelu"}, "hidden_act .*'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window .*4096 tokens from layer 21"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding_attention"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type .*'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type .*'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_what_is_not_here_is_refused_by_name(change, named):
    with pytest.raises(UnsupportedModelError, match=named):
        ModelConfig.from_hf(QWEN25 | change)


def test_a_window_that_no_layer_uses_is_accepted():
    used_nowhere = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 24}
    assert ModelConfig.from_hf(QWEN25 | used_nowhere) == ModelConfig.from_hf(QWEN25)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "multiple of kv_heads"),
        ({"head_dim": 7}, "head_size must be even"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor missing"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, named):
    with pytest.raises(SamplerError, match=named):
        ModelConfig.from_hf(QWEN25 | change)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": None},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": 10**400},
        {"max_position_embeddings": None},
        {"num_key_value_heads": "2"},
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"rope_scaling": "linear"},
        {"rope_parameters": [1]},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        {"rope_scaling": {"rope_type": ["llama3"]}},
        {"rope_scaling": {**LLAMA32["rope_scaling"], "factor": float("inf")}},
        {"rope_scaling": {**LLAMA32["rope_scaling"], "high_freq_factor": 1.0}},
        {"rope_scaling": {**LLAMA32["rope_scaling"], "original_max_position_embeddings": "8192"}},
        {"layer_types": 1},
        {"layer_types": [["full_attention"]]},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**4000},
        {"hidden_size": True},
        {"tie_word_embeddings": "false"},
        {"use_sliding_window": True, "max_window_layers": None},
        {"eos_token_id": [1, None]},
        {"eos_token_id": {"a": 1}},
        {"bos_token_id": -1},
        {"model_type": ["qwen2"]},
    ],
    ids=lambda change: repr(change)[:60],
)
def test_a_field_of_another_type_or_an_absurd_size_is_named(change):
    with pytest.raises(SamplerError) as caught:
        ModelConfig.from_hf(QWEN25 | change)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"a": "\xff"}', b"[]", b"1" * 5000, b" " * 20_000_000],
    ids=range(5),
)
def test_a_file_that_holds_no_configuration(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SamplerError, match="must"):
        ModelConfig.from_file(tmp_path)


@pytest.mark.parametrize("path", [5, None, "a" * 5000, "a\0b"], ids=["int", "None", "long", "null"])
def test_what_is_no_path(path):
    with pytest.raises(SamplerError):
        ModelConfig.from_file(path)


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SamplerError, match="must be a file"):
        ModelConfig.from_file(tmp_path)


def test_family_and_its_parts_must_agree():
    with pytest.raises(SamplerError, match="qkv_bias, qk_norm"):
        ModelConfig("qwen2", 8, 8, 8, 1, 1, 1, 8)


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(SamplerError, match=r"config\.json must exist"):
        ModelConfig.from_file(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SamplerError, match="must be JSON"):
        ModelConfig.from_file(tmp_path)
