"""Network and rollout programs compiled for a TPU slice that is not there: splash attention under a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from trainer_layout import SPECS

from grpo_contracts import SamplingParams
from grpo_sampler import ModelConfig, Sampler, abstract, merge

CONFIG = ModelConfig("qwen2", 512, 256, 512, 2, 8, 4, 64, qkv_bias=True, tied=True)


def v6e_devices() -> np.ndarray:
    pytest.importorskip("libtpu", reason="the TPU compiler comes with libtpu")
    return np.asarray(topologies.get_topology_desc("v6e:2x2", "tpu", chips_per_host_bounds=(2, 2, 1)).devices)


@pytest.mark.slow
def test_splash_attention_compiles_for_a_v6e_slice():
    mesh = Mesh(v6e_devices().reshape(1, 2, 2), ("dp", "fsdp", "tp"))
    graphdef, shapes = abstract(CONFIG, compute_dtype=jnp.bfloat16, remat=True, mesh=mesh)

    def on_mesh(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    params = jax.tree.map(lambda leaf: on_mesh(leaf.shape, leaf.dtype), shapes)
    prompts = on_mesh((4, 96), jnp.int32, ("dp", "fsdp"))
    rows = on_mesh((4, 384), jnp.int32, ("dp", "fsdp"))
    vector = on_mesh((4,), jnp.int32, ("dp", "fsdp"))
    blocks = on_mesh((4, 3), jnp.int32, ("dp", "fsdp"))

    def plain(params, tokens, segment):
        return jnp.sum(merge(graphdef, params)(tokens, None, segment).astype(jnp.float32))

    def shared(params, prompts, length, tokens, positions, segment, prompt):
        model = merge(graphdef, params)
        return jnp.sum(model.with_prompts(prompts, length, tokens, positions, segment, prompt).astype(jnp.float32))

    assert merge(graphdef, shapes).attention == "splash"
    for function, inputs in ((plain, (rows, rows)), (shared, (prompts, vector, rows, rows, rows, blocks))):
        compiled = jax.jit(jax.grad(function)).lower(params, *inputs).compile()
        text = str(compiled.as_text())
        assert "tpu_custom_call" in text
        # Packed rows keep no logits: neither of a block nor of the whole row, against the prompt and the row.
        assert ("packed_attention_dq" in text) == (function is shared)
        assert not re.search(r"\[(\d+,)*(128|384),480\]", text)


@pytest.mark.slow
def test_prompts_are_prefilled_by_splash_with_heads_split_over_tp():
    pytest.importorskip("libtpu", reason="the TPU compiler comes with libtpu")
    described = topologies.get_topology_desc("v5e:2x2", "tpu", chips_per_host_bounds=(2, 2, 1))
    mesh = Mesh(np.asarray(described.devices).reshape(1, 2, 2), ("dp", "fsdp", "tp"))
    _, shapes = abstract(CONFIG)

    def placed(path, leaf):
        heads = jax.tree_util.keystr(path)[-4:-2] in ("'q", "'k", "'v")
        spec = PartitionSpec(None, None, "tp") if heads else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree_util.tree_map_with_path(placed, shapes)
    sampler = Sampler(CONFIG, max_prompt_length=64, max_new_tokens=64, slots=8, compute_dtype=jnp.bfloat16, mesh=mesh)
    prefill = sampler.programs(params, group_size=4)["prefill"]().compile()
    assert "tpu_custom_call" in str(prefill.as_text())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 2)], ids=["fsdp4", "fsdp2-tp2"])
def test_rollout_programs_compile_for_a_v6e_slice(shape):
    """Qwen2.5-0.5B, 256 sequences in groups of 8, prompts of 512 and 512 new tokens, bf16; `-s` prints the bytes."""
    config = ModelConfig("qwen2", 151_936, 896, 4864, 24, 14, 2, 64, 1_000_000.0, qkv_bias=True, tied=True)
    mesh = Mesh(v6e_devices().reshape(shape), ("dp", "fsdp", "tp"))
    _, shapes = abstract(config, param_dtype=jnp.bfloat16)

    def place(path, leaf):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*SPECS.get(path[-1].key, ())))
        )

    sampler = Sampler(config, SamplingParams(), max_prompt_length=512, max_new_tokens=512, slots=256, mesh=mesh)
    for name, lower in sampler.programs(jax.tree.map_with_path(place, shapes), group_size=8).items():
        compiled = lower().compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        if name == "decode":
            # Each prefix of a layer's ring is read by itself, as are the prompts (512), and no ring is copied.
            slices = re.findall(r"dynamic_slice_sizes=\{1,\d+,\d+,64,(\d+)\}", str(compiled.as_text()))
            assert sorted(map(int, slices)) == [256, 384, 512, 512]
            assert not re.search(r"= bf16\[24,\d+,\d+,(64,512|512,64)\]\S* copy\(", str(compiled.as_text()))
            # Logits are drawn from as the product wrote them.
            assert not re.search(r"= f32\[\d+,151936\]\S* copy\(", str(compiled.as_text()))
        arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
        peak = arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        print(
            f"{shape} {name}: arguments {arguments:,}, outputs {outputs:,}, donated {memory.alias_size_in_bytes:,}, "
            f"temporaries {memory.temp_size_in_bytes:,}, together {peak:,} bytes a device"
        )
        assert peak < 31 * 2**30
