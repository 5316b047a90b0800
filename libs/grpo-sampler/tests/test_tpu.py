"""The network compiled for a TPU slice that is not there: splash attention under a mesh, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_sampler import ModelConfig, Sampler, abstract, merge

CONFIG = ModelConfig("qwen2", 512, 256, 512, 2, 8, 4, 64, qkv_bias=True, tied=True)


@pytest.mark.slow
def test_splash_attention_compiles_for_a_v6e_slice():
    pytest.importorskip("libtpu", reason="the TPU compiler comes with libtpu")
    described = topologies.get_topology_desc("v6e:2x2", "tpu", chips_per_host_bounds=(2, 2, 1))
    mesh = Mesh(np.asarray(described.devices).reshape(1, 2, 2), ("dp", "fsdp", "tp"))
    graphdef, shapes = abstract(CONFIG, compute_dtype=jnp.bfloat16, remat=True, mesh=mesh)

    def on_mesh(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    params = jax.tree.map(lambda leaf: on_mesh(leaf.shape, leaf.dtype), shapes)
    prompts = on_mesh((4, 96), jnp.int32, ("dp", "fsdp"))
    rows = on_mesh((4, 384), jnp.int32, ("dp", "fsdp"))
    vector = on_mesh((4,), jnp.int32, ("dp", "fsdp"))

    def plain(params, tokens, segment):
        return jnp.sum(merge(graphdef, params)(tokens, None, segment).astype(jnp.float32))

    def shared(params, prompts, length, tokens, positions, segment, prompt):
        model = merge(graphdef, params)
        return jnp.sum(model.with_prompts(prompts, length, tokens, positions, segment, prompt).astype(jnp.float32))

    assert merge(graphdef, shapes).attention == "splash"
    for function, inputs in ((plain, (rows, rows)), (shared, (prompts, vector, rows, rows, rows, vector))):
        compiled = jax.jit(jax.grad(function)).lower(params, *inputs).compile()
        assert "tpu_custom_call" in str(compiled.as_text())


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
    prefill = sampler.programs(params, group_size=4)["prefill"]()
    assert "tpu_custom_call" in str(prefill.as_text())
