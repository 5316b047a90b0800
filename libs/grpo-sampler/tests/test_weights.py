"""Checkpoints: what is read, where it lands, what is refused, and that a round trip changes no bit."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_sampler import ModelConfig, SamplerError, WeightsError, load_pretrained, save_pretrained
from grpo_sampler._layout import leaves

QWEN2 = ModelConfig("qwen2", 37, 16, 24, 3, 4, 2, 4, qkv_bias=True, tied=True)
LLAMA = ModelConfig("llama", 37, 16, 24, 2, 4, 1, 6)
QWEN3 = ModelConfig("qwen3", 37, 16, 24, 2, 4, 4, 6, qk_norm=True)


def tensors_of(config, dtype=np.float32):
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(leaf.stored_shape).astype(dtype)
        for leaf in leaves(config)
        for name in leaf.tensor_names()
    }


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "model", QWEN2, tensors_of(QWEN2))


@pytest.mark.parametrize(
    ("name", "value", "target"),
    [
        ("model.norm.weight", np.nan, None),
        ("model.layers.1.mlp.down_proj.weight", np.inf, jnp.float32),
        ("model.embed_tokens.weight", -np.inf, jnp.bfloat16),
        ("model.layers.0.self_attn.q_proj.bias", np.nan, jnp.float16),
    ],
)
def test_a_weight_that_is_not_finite_is_named(tmp_path, name, value, target):
    tensors = tensors_of(QWEN2)
    tensors[name].reshape(-1)[-1] = value
    with pytest.raises(WeightsError, match=f"must be finite: {name} holds 1 values"):
        load_pretrained(write(tmp_path / "model", QWEN2, tensors), dtype=target)


def test_a_weight_that_the_type_cannot_hold_is_named(tmp_path):
    tensors = tensors_of(QWEN2)
    tensors["model.norm.weight"][0] = 1e30
    folder = write(tmp_path / "model", QWEN2, tensors)
    load_pretrained(folder, dtype=jnp.bfloat16)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight holds 1 values that are NaN or infinite, as float16"):
        load_pretrained(folder, dtype=jnp.float16, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@pytest.mark.parametrize(
    "value",
    [5, ["a"], "", None, "../outside/x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "x.bin"],
    ids=repr,
)
def test_an_index_that_leads_elsewhere_is_refused(checkpoint, value):
    (checkpoint.parent / "outside").mkdir()
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "outside/x.safetensors")
    index = {"weight_map": dict.fromkeys(tensors_of(QWEN2), value)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="weight_map must name safetensors files of its own folder"):
        load_pretrained(checkpoint)


@pytest.mark.parametrize(
    "index", ["[" * 200_000, "5", '{"weight_map": []}', '{"weight_map": {}}', "{}"], ids=lambda text: text[:19]
)
def test_an_index_that_is_none_is_refused(checkpoint, index):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match="weight_map"):
        load_pretrained(checkpoint)


def test_a_folder_in_place_of_the_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").mkdir()
    with pytest.raises(WeightsError, match="must be a file"):
        load_pretrained(checkpoint)


def test_of_a_tensor_in_two_files_the_index_decides(checkpoint):
    tensors = tensors_of(QWEN2)
    (checkpoint / "model.safetensors").unlink()
    changed = {name: np.zeros_like(value) for name, value in tensors.items()}
    save_file(tensors, checkpoint / "a.safetensors")
    save_file(changed, checkpoint / "b.safetensors")
    where = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    _, params = load_pretrained(checkpoint)
    assert not params["final_norm"].any()
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", [5, None, "a" * 5000, "a b"], ids=["int", "None", "long", "space"])
def test_what_is_no_model_is_refused(name):
    with pytest.raises(WeightsError):
        load_pretrained(name)


def test_arguments_of_another_kind_are_refused(checkpoint, tmp_path):
    with pytest.raises(SamplerError, match="dtype must be a floating type"):
        load_pretrained(checkpoint, dtype="nonsense")
    config, params = load_pretrained(checkpoint)
    with pytest.raises(SamplerError, match="config must be a ModelConfig: got a dict"):
        save_pretrained(tmp_path / "b", params, config)  # type: ignore[arg-type]
    with pytest.raises(SamplerError, match="max_shard_bytes must be at least 1"):
        save_pretrained(tmp_path / "b", config, params, max_shard_bytes=0)


@pytest.mark.parametrize("config", [QWEN2, LLAMA, QWEN3], ids=["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("limit", [4_000_000_000, 5_000], ids=["single", "sharded"])
def test_round_trip_is_bit_for_bit(tmp_path, config, dtype, limit):
    tensors = tensors_of(config, dtype)
    read, params = load_pretrained(write(tmp_path / "a", config, tensors), dtype=dtype)
    assert read == config
    save_pretrained(tmp_path / "b", read, params, max_shard_bytes=limit)
    again, same = load_pretrained(tmp_path / "b", dtype=dtype)
    assert again == config
    assert all(
        a.dtype == dtype and np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same))
    )
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert (len(files) > 1) == (limit < 10_000)
    saved = {name: value for file in files for name, value in load_file(file).items()}
    assert set(saved) == set(tensors)
    assert all(saved[name].tobytes() == value.tobytes() for name, value in tensors.items())
    if len(files) > 1:
        index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())


def test_linear_layers_are_transposed_and_split_into_heads(checkpoint):
    tensors = tensors_of(QWEN2)
    _, params = load_pretrained(checkpoint, dtype=jnp.float32)
    layers = params["layers"]
    stored = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert np.array_equal(layers["q"][1], stored.reshape(4, 4, 16).transpose(2, 0, 1))
    stored = tensors["model.layers.2.self_attn.o_proj.weight"]
    assert np.array_equal(layers["o"][2], stored.reshape(16, 4, 4).transpose(1, 2, 0))
    assert np.array_equal(layers["k_bias"][0], tensors["model.layers.0.self_attn.k_proj.bias"].reshape(2, 4))
    assert np.array_equal(layers["down"][2], tensors["model.layers.2.mlp.down_proj.weight"].T)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_any_floating_type_becomes_the_one_asked_for(tmp_path, stored):
    tensors: dict[str, Any] = dict(tensors_of(LLAMA, stored))
    _, params = load_pretrained(write(tmp_path / "m", LLAMA, tensors), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    expected = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    assert np.array_equal(params["embed"], expected)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_without_a_dtype_weights_keep_theirs(tmp_path, stored):
    tensors: dict[str, Any] = dict(tensors_of(LLAMA, stored))
    _, params = load_pretrained(write(tmp_path / "m", LLAMA, tensors))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(stored)}
    assert params["embed"].tobytes() == tensors["model.embed_tokens.weight"].tobytes()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    with pytest.raises(WeightsError, match=r"one type to be loaded without dtype: got .*F64"):
        load_pretrained(write(tmp_path / "mixed", LLAMA, tensors))


def test_every_block_of_a_parameter_can_be_read_by_itself():
    """What a device of a mesh asks for, over every axis of every parameter."""
    for config in (QWEN2, LLAMA, QWEN3):
        tensors = tensors_of(config)
        for leaf in leaves(config):
            stored = tensors[leaf.tensor_names()[0]]
            whole_shape = leaf.shape if leaf.layers is None else leaf.shape[1:]
            whole = leaf.read(lambda at, stored=stored: stored[at], tuple(slice(None) for _ in whole_shape))
            assert whole.shape == whole_shape
            assert np.array_equal(leaf.stored(whole), stored)
            for axis, size in enumerate(whole_shape):
                index = tuple(
                    slice(size // 2, size) if i == axis else slice(0, (n + 1) // 2) for i, n in enumerate(whole_shape)
                )
                assert np.array_equal(leaf.read(lambda at, stored=stored: stored[at], index), whole[index])


def test_shardings_as_one_as_a_function_and_as_a_tree(checkpoint):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    plain = load_pretrained(checkpoint, dtype=jnp.float32)[1]
    asked = []

    def choose(path):
        asked.append(path)
        return device

    for sharding in (device, choose, jax.tree.map(lambda _: device, plain)):
        placed = load_pretrained(checkpoint, dtype=jnp.float32, sharding=sharding)[1]
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(plain)))
        assert all(leaf.sharding == device for leaf in jax.tree.leaves(placed))
    assert {"embed", "final_norm", "layers/q", "layers/q_bias"} <= set(asked)
    with pytest.raises(WeightsError, match="entry for embed"):
        load_pretrained(checkpoint, dtype=jnp.float32, sharding={"layers": {}})


def changed(checkpoint, change):
    tensors = tensors_of(QWEN2)
    change(tensors)
    return write(checkpoint, QWEN2, tensors)


def test_missing_and_unexpected_tensors_are_named(checkpoint):
    name = "model.layers.2.mlp.up_proj.weight"
    changed(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsError, match=f"missing {name}"):
        load_pretrained(checkpoint, dtype=jnp.float32)
    changed(checkpoint, lambda tensors: tensors.update(extra=np.zeros(3, np.float32)))
    with pytest.raises(WeightsError, match="got also extra"):
        load_pretrained(checkpoint, dtype=jnp.float32)


def test_wrong_shapes_and_types_are_named(checkpoint):
    name = "model.norm.weight"
    changed(checkpoint, lambda tensors: tensors.update({name: np.zeros(15, np.float32)}))
    with pytest.raises(WeightsError, match=rf"{name} must have shape \(16,\): got \(15,\)"):
        load_pretrained(checkpoint, dtype=jnp.float32)
    changed(checkpoint, lambda tensors: tensors.update({name: np.zeros(16, np.int8)}))
    with pytest.raises(WeightsError, match=f"{name} must be one of .*: got I8"):
        load_pretrained(checkpoint, dtype=jnp.float32)


def test_a_truncated_file_is_named(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors must be a complete safetensors file"):
        load_pretrained(checkpoint, dtype=jnp.float32)


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(checkpoint):
    changed(checkpoint, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "unembed" not in load_pretrained(checkpoint, dtype=jnp.float32)[1]
    changed(checkpoint, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(WeightsError, match=r"contains a different lm_head\.weight"):
        load_pretrained(checkpoint, dtype=jnp.float32)


def test_lost_shards_and_broken_indices_are_named(checkpoint, tmp_path):
    config, params = load_pretrained(checkpoint, dtype=jnp.float32)
    folder = tmp_path / "sharded"
    save_pretrained(folder, config, params, max_shard_bytes=5_000)
    first = min(folder.glob("model-00001-*"))
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(WeightsError, match=r"model-00001-of-\d+\.safetensors must exist"):
        load_pretrained(folder, dtype=jnp.float32)
    first.write_bytes(kept)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = first.name
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="no file holds ghost"):
        load_pretrained(folder, dtype=jnp.float32)
    index.write_text("{}")
    with pytest.raises(WeightsError, match="must contain a weight_map"):
        load_pretrained(folder, dtype=jnp.float32)
    shutil.rmtree(folder)
    with pytest.raises(WeightsError, match="no such folder"):
        load_pretrained(folder, dtype=jnp.float32)


def test_a_second_save_leaves_nothing_of_the_first(checkpoint, tmp_path):
    config, params = load_pretrained(checkpoint, dtype=jnp.float32)
    save_pretrained(tmp_path / "b", config, params, max_shard_bytes=5_000)
    save_pretrained(tmp_path / "b", config, params)
    assert {file.name for file in (tmp_path / "b").iterdir()} == {"config.json", "model.safetensors"}


def test_what_is_saved_may_be_read_by_whom_the_umask_lets(checkpoint, tmp_path):
    config, params = load_pretrained(checkpoint)
    (tmp_path / "any").touch()
    save_pretrained(tmp_path / "copy", config, params)
    assert (tmp_path / "copy" / "model.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_saving_refuses_what_is_not_the_models(checkpoint, tmp_path):
    config, params = load_pretrained(checkpoint, dtype=jnp.float32)
    with pytest.raises(WeightsError, match="params must hold final_norm"):
        save_pretrained(tmp_path / "b", config, {k: v for k, v in params.items() if k != "final_norm"})
    with pytest.raises(WeightsError, match="got also unembed"):
        save_pretrained(tmp_path / "b", config, params | {"unembed": params["embed"]})
    with pytest.raises(WeightsError, match="one type: got bfloat16, float32"):
        save_pretrained(tmp_path / "b", config, params | {"embed": params["embed"].astype(jnp.bfloat16)})
    with pytest.raises(WeightsError, match="final_norm must have shape"):
        save_pretrained(tmp_path / "b", config, params | {"final_norm": params["embed"]})
    with pytest.raises(SamplerError, match="floating type: got int32"):
        load_pretrained(checkpoint, dtype=jnp.int32)


def test_a_folder_of_another_format_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA.to_hf()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="Only safetensors are read"):
        load_pretrained(tmp_path, dtype=jnp.float32)
