"""Log-probabilities with a sharded vocabulary on eight devices; prints the largest relative differences as JSON."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_loss import token_logp

R, T, D, V = 8, 32, 16, 96


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(R, T, D)), jnp.float32)
    unembed = jnp.asarray(rng.normal(size=(V, D)) * 0.3, jnp.float32)
    target = jnp.asarray(rng.integers(0, V, (R, T)))
    mask = jnp.asarray(rng.random((R, T)) < 0.7)

    def value(hidden, unembed, target, mask, shards):
        logp_RT, entropy_RT = token_logp(hidden, unembed, target, mask_RT=mask, chunk=16, shards=shards)
        return (jnp.sin(target) * logp_RT + 0.3 * entropy_RT).sum(), (logp_RT, entropy_RT)

    def run(shards):
        return jax.jit(jax.value_and_grad(partial(value, shards=shards), argnums=(0, 1), has_aux=True))

    expected = run(1)(hidden, unembed, target, mask)
    report = {}
    for data, tensor in ((8, 1), (2, 4), (1, 8)):
        mesh = Mesh(np.asarray(jax.devices()).reshape(data, tensor), ("data", "tensor"))
        rows, vocabulary = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", "tensor"))
        arguments = [
            jax.device_put(x, s) for x, s in zip((hidden, unembed, target, mask), (rows, vocabulary, rows, rows))
        ]
        compiled = run(data).lower(*arguments).compile()
        actual = compiled(*arguments)
        worst = max(
            float(jnp.abs(np.asarray(a) - np.asarray(b)).max() / jnp.abs(b).max())
            for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        )
        moved = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in collectives(compiled.as_text())]
        report[f"data {data} x tensor {tensor}"] = {"difference": worst, "largest_collective": max(moved, default=0)}
    print(json.dumps(report))


def collectives(program):
    """Dimensions of every result that crosses devices."""
    return re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)


if __name__ == "__main__":
    main()
