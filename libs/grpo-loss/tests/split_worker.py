"""One process of the splitting test: gradients of one batch, for many ways of splitting it, written to a file."""

import argparse
import dataclasses
from functools import partial

import jax
import numpy as np


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="+", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices // options.processes)
    jax.config.update("jax_enable_x64", True)
    if options.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{options.port}", options.processes, options.rank)
    results = {}
    for dtype in ("float32", "float64"):
        for rows in options.rows:
            for layout in ("packed", "blocks", "sizes", "padded"):
                for name, value in gradients(dtype, rows, layout, options.devices).items():
                    results[f"{dtype}/{layout}/{rows}/{name}"] = value
    if options.rank == 0:
        np.savez(options.out, **results)


def gradients(dtype, rows, layout, devices=1):
    """Loss, denominator and the gradient of every parameter, divided once, on `devices` devices."""
    from grpo_loss_ragged import ragged, toy_forward, toy_loss, toy_params
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import grpo_loss

    data = ragged(seed=5, groups=5, group_size=4, longest_prompt=6, longest=12, dtype=getattr(np, dtype))
    sizes = {"sequences": 20, "groups": 5, "max_prompt_length": 6, "max_new_tokens": 12, "row_length": 16}
    shape = grpo_loss.PackShape.for_rollout(
        rows=rows, shards=devices, blocks=4 if layout in ("blocks", "sizes") else 1, prompts=rows, **sizes
    )
    if layout == "sizes":
        half = -(-rows // devices // 2) * devices
        smaller = (grpo_loss.MicroSize(rows, 12, half, 5), grpo_loss.MicroSize(half, 12, devices, 3))
        shape = dataclasses.replace(shape, smaller=smaller, micro_batches=2 * shape.micro_batches)
    batch = data.pad(rows) if layout == "padded" else data.pack(shape)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec(None, "data"))

    def place(array, sharding):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    micro = jax.tree.map(partial(place, sharding=by_row), batch.micro)
    size_M = None if batch.size_M is None else place(batch.size_M, replicated)
    batch = dataclasses.replace(batch, micro=micro, count=place(batch.count, replicated), size_M=size_M)
    params = jax.tree.map(partial(place, sharding=replicated), toy_params(dtype))

    def divided(params, batch):
        gradient, terms = grpo_loss.accumulate(partial(toy_forward, shards=devices), toy_loss, params, batch)
        return {name: value / terms.denominator for name, value in gradient.items()} | {
            "loss": terms.loss(),
            "denominator": terms.denominator,
            **terms.means(),
        }

    results = jax.jit(divided, out_shardings=replicated)(params, batch)
    return {name: np.asarray(value.addressable_data(0)) for name, value in results.items()}


if __name__ == "__main__":
    main()
