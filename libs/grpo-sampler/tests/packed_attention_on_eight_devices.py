"""Run by test_packed_attention.py in its own process: forced devices must come before jax starts."""

import json
import os
from functools import partial

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_sampler._packed import plan_attention
from grpo_sampler._packed_attention import packed_attention, plan_packed

BATCH = ("dp", "fsdp")


def difference(shape: tuple[int, int, int], shards: int, kv_heads: int) -> dict[str, float]:
    """Largest differences, from plain attention on one device, of values and gradients on a mesh; collectives."""
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("dp", "fsdp", "tp"), axis_types=(AxisType.Auto,) * 3)
    random = np.random.default_rng(0)
    R, T, P, Tp, H, E = 8, 40, 8, 20, 4, 8
    length_P = jnp.asarray(random.integers(0, Tp + 1, P), jnp.int32)
    of_shard_R = np.arange(R) * shards // R * (P // shards)
    prompt_RC = jnp.asarray(of_shard_R[:, None] + random.integers(0, P // shards, (R, 2)), jnp.int32)
    segment_RT = jnp.asarray(np.sort(random.integers(0, 4, (R, T)), axis=1)[:, ::-1].copy(), jnp.int32)
    array = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
    kv = lambda n, t: (array(n, t, kv_heads, E), array(n, t, kv_heads, E))  # noqa: E731
    inputs = kv(P, Tp), (array(R, T, H, E), *kv(R, T))
    weight = array(R, T, H, E) * (segment_RT > 0)[..., None, None]

    def run(attend, inputs):
        def loss(inputs):
            out = attend(*inputs) * weight
            return out.sum(), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
        return jax.tree.leaves((out, gradients))

    sizes = {"prompt_length": Tp, "group": H // kv_heads, "shards": shards}
    layout = segment_RT, prompt_RC, length_P
    plain = jax.jit(partial(run, plan_attention("xla", *layout, **sizes, mesh=None)))(inputs)

    def on_mesh(inputs, *layout):
        return run(partial(packed_attention, plan_packed(*layout, **sizes, mesh=mesh, interpret=True)), inputs)

    rows = NamedSharding(mesh, PartitionSpec(BATCH))
    heads = NamedSharding(mesh, PartitionSpec(BATCH, None, "tp" if kv_heads % shape[2] == 0 else None))
    placed = jax.device_put(inputs, heads), *(jax.device_put(x, rows) for x in layout)
    compiled = jax.jit(on_mesh).lower(*placed).compile()
    worst = max(float(jnp.abs(a - b).max()) for a, b in zip(compiled(*placed), plain, strict=True))
    return {"worst": worst, "gathers": str(compiled.as_text()).count(" all-gather(")}


if __name__ == "__main__":
    cases = {"own": ((2, 2, 2), 4, 2), "all": ((2, 2, 2), 1, 2), "whole heads": ((2, 1, 4), 2, 2)}
    print(json.dumps({name: difference(*case) for name, case in cases.items()}))
