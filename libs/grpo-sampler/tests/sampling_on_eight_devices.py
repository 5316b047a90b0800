"""Run by test_sampling_on_eight_devices.py in its own process: forced devices must come before jax starts."""

import json
import os
import sys
from dataclasses import replace

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from trainer_layout import SPECS

from grpo_contracts import FinishReason, PolicyVersion, Prompts, SamplingParams
from grpo_sampler import LoRA, ModelConfig, Sampler, Transformer, init_adapters, join_adapters, split
from grpo_sampler._kernels import self_attention, splash_attention

CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=32,
    width=16,
    mlp_width=32,
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_size=8,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-6,
    tied=False,
    qkv_bias=True,
    qk_norm=False,
    max_positions=64,
)
SAMPLING = SamplingParams(temperature=0.9, stop_ids=(5, 9))


# Any of eight tokens, then any of eight others.
STOPS = np.zeros((2, 32), int)
STOPS[:, 10:18] = 1
STOPS[1, 20:28] = -1


def rollout(params, mesh, *, config, sampling, unroll, slots, stops):
    lengths = np.array([3, 8, 5, 1, 7], np.int32)
    tokens = np.random.default_rng(0).integers(1, 32, (5, 8)).astype(np.int32)
    tokens[np.arange(8) >= lengths[:, None]] = 0
    prompts = Prompts(tokens, lengths, np.arange(5, dtype=np.int32), 32, 0)
    sampler = Sampler(
        config,
        sampling,
        max_prompt_length=8,
        max_new_tokens=12,
        slots=slots,
        sizes=2,
        mesh=mesh,
        unroll=unroll,
        stop_table_AV=stops,
    )
    return sampler.generate(params, prompts, group_size=4, seed=1, step=2, policy=PolicyVersion(2, "0a"))


def sharded(params, mesh):
    def place(path, leaf):
        spec = SPECS.get(path[-1].key, ())
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map_with_path(place, params)


def splash_beside_xla(mesh: Mesh) -> float:
    """Largest difference of splash attention where a prefill calls it: rows split already, heads still to be."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((8, 40, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    segment = jnp.asarray(np.arange(40) < np.array([40, 30, 7, 1, 40, 2, 3, 4])[:, None], jnp.int32)
    rows = PartitionSpec(("dp", "fsdp"))
    split_rows = jax.shard_map(
        lambda q, k, v, segment: splash_attention(q, k, v, segment, mesh, interpret=True),
        mesh=mesh,
        in_specs=(rows,) * 4,
        out_specs=rows,
        axis_names={"dp", "fsdp"},
        check_vma=False,
    )
    difference = jax.jit(split_rows)(q, k, v, segment) - self_attention("xla", q, k, v, segment)
    return float(jnp.abs(difference * segment[..., None, None]).max())


def mesh_of(shape: list[int]) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), ("dp", "fsdp", "tp"), axis_types=(AxisType.Auto,) * 3)


def main(trained_on: list[int], shape: list[int], kind: str, unroll: bool) -> None:
    params = split(Transformer(CONFIG, rngs=nnx.Rngs(0)))[1]
    params = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, params) | {"embed": params["embed"] * 8}
    config, sampling = CONFIG, SAMPLING
    if kind == "filtered":
        sampling = SamplingParams(temperature=0.9, top_k=12, top_p=0.9, stop_ids=(5, 9))
    if kind == "adapters":
        config = replace(CONFIG, lora=LoRA(4, 8.0))
        adapters = jax.tree.map(lambda leaf: leaf + 0.1, init_adapters(config, seed=0))
        params = join_adapters(params, adapters)
    same = {"config": config, "sampling": sampling, "unroll": unroll, "stops": STOPS if kind == "stopping" else None}
    one = rollout(params, None, slots=24, **same)
    assert (one.finish_B == FinishReason.STOP_STRING).any() == (kind == "stopping")
    mesh = mesh_of(shape)
    placed = sharded(params, mesh_of(trained_on))
    if kind == "tensor alone":  # no axis for rows at all
        mesh = Mesh(np.array(jax.devices()[: shape[2]]), ("tp",), axis_types=(AxisType.Auto,))
        placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    many = rollout(placed, mesh, slots=16, **same)
    report = {
        "tokens": bool((one.tokens_BT == many.tokens_BT).all()),
        "finish": bool((one.finish_B == many.finish_B).all()),
        "logp": float(np.abs(one.logp_BT - many.logp_BT).max()),
        "policy_logp": float(np.abs(one.policy_logp_BT - many.policy_logp_BT).max()),
        "splash": splash_beside_xla(mesh_of(shape)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    first, second = ([int(size) for size in text.split(",")] for text in sys.argv[1:3])
    main(first, second, sys.argv[3], sys.argv[4] == "unrolled")
