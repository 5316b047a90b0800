import importlib
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_mesh import CHIPS, MeshError, compile_report, compile_with_text, find_slice, make_mesh, slice_devices

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts"),
    [
        ("v5e-1", "1x1", 1, 1),
        ("v5e-4", "2x2", 4, 1),
        ("v5e-16", "4x4", 16, 4),
        ("v5e-256", "16x16", 256, 64),
        ("v6e-8", "2x4", 8, 1),
        ("v6e-16", "4x4", 16, 4),
        ("v4-8", "2x2x1", 4, 1),
        ("v4-16", "2x2x2", 8, 2),
        ("v5p-128", "4x4x4", 64, 16),
        ("v5p-512", "4x8x8", 256, 64),
    ],
)
def test_a_slice_name_tells_chips_and_hosts(name, topology, chips, hosts):
    found = find_slice(name)
    assert (found.topology, found.chips, found.hosts) == (topology, chips, hosts)
    assert found.chips_per_host * found.hosts == chips


def test_a_slice_is_named_by_text():
    with pytest.raises(MeshError, match="a slice is named by text such as 'v5e-16': got 16"):
        find_slice(16)  # type: ignore[arg-type]
    with pytest.raises(MeshError, match="slices must be at least 1: got 0"):
        slice_devices("v5e-4", slices=0)


@pytest.mark.parametrize("name", ["v5e-3", "v5e-512", "v4-7", "v4-2", "v5e", "v5e-x"])
def test_sizes_that_are_not_rented_are_refused_with_those_that_are(name):
    with pytest.raises(MeshError, match=f"not offered: choose one of {name[:2]}"):
        find_slice(name)


def test_unknown_chips_are_refused():
    with pytest.raises(MeshError, match="must start with one of v4, v5e, v5p, v6e"):
        find_slice("h100-8")


def test_the_compiler_leaves_less_than_the_nominal_memory():
    for chip in CHIPS.values():
        assert 0.9 * chip.hbm_bytes < chip.usable_bytes < 1.01 * chip.hbm_bytes


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["v4-16", "v5e-1", "v5e-8", "v5e-16", "v5p-16", "v6e-8", "v6e-256"])
def test_a_mesh_on_compile_only_devices(name):
    devices = slice_devices(name)
    assert len(devices) == find_slice(name).chips
    assert len({device.process_index for device in devices}) == find_slice(name).hosts
    assert make_mesh("auto", devices).shape["fsdp"] == len(devices)


@pytest.mark.slow
@needs_compiler
def test_two_slices_make_a_hybrid_mesh():
    devices = slice_devices("v5e-16", slices=2)
    mesh = make_mesh("auto", devices)
    assert dict(mesh.shape) == {"dp": 2, "fsdp": 16, "tp": 1}
    assert [len({device.slice_index for device in row.flat}) for row in mesh.devices] == [1, 1]
    assert dict(make_mesh("tp:4,fsdp:-1", devices).shape) == {"dp": 1, "fsdp": 8, "tp": 4}
    with pytest.raises(MeshError, match=r"dp·fsdp = 1·1 cannot be spread over 2 slices"):
        make_mesh("tp:32", devices)


@pytest.mark.slow
@needs_compiler
def test_a_scan_over_layers_is_counted_whole_on_tpu():
    mesh = make_mesh("auto", slice_devices("v5e-4"))
    place = lambda shape, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    layers, rows, width, hidden = 6, 1024, 512, 2048

    def forward(weights, x):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w[0]) @ w[1] + h, None), x, weights)[0]

    weights = place((layers, width, hidden), None, "fsdp"), place((layers, hidden, width), None, None, "fsdp")
    report = compile_report(jax.jit(forward).lower(weights, place((rows, width), "fsdp")).compile())
    assert report.unknown_loops == 0
    assert report.flops == pytest.approx(2 * 2 * layers * rows * width * hidden / 4, rel=0.01)
    gathered = layers * 2 * width * hidden * 2
    moved = sum(kind.bytes for kind in report.collectives.values())
    assert 0.5 * gathered <= moved <= 2 * gathered


@pytest.mark.slow
@needs_compiler
def test_a_kernel_that_declares_no_cost_is_listed():
    splash = importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention")
    heads, tokens, size = 2, 512, 128
    kernel = splash.make_splash_mha_single_device(splash.MultiHeadMask([splash.CausalMask((tokens, tokens))] * heads))
    mesh = make_mesh("auto", slice_devices("v5e-1"))
    x = jax.ShapeDtypeStruct((heads, tokens, size), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    def repeated(q, k, v):
        return jax.lax.scan(lambda q, _: (kernel(q, k, v), None), q, length=5)[0]

    report = compile_report(jax.jit(repeated).trace(x, x, x).lower(lowering_platforms=("tpu",)).compile())
    assert list(report.kernels.values()) == [5]
    assert report.undeclared == set(report.kernels)
    assert report.peak >= 3 * x.size * 2


@pytest.mark.slow
@needs_compiler
def test_a_lookup_on_the_sparse_core_is_read_as_the_compiler_wrote_it():
    mesh = make_mesh("auto", slice_devices("v6e-1"))
    place = lambda shape, dtype: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    entries, tokens, width = 50_000, 4096, 512
    lowered = jax.jit(lambda table, ids, w: jnp.tanh(table[ids] @ w)).lower(
        place((entries, width), jnp.bfloat16), place((tokens,), jnp.int32), place((width, width), jnp.bfloat16)
    )
    compiled, text = compile_with_text(lowered.compile)
    report = compile_report(compiled, text=text)
    assert report.flops == 2 * tokens * width * width
    # Looked up, written, read by the product, its result written; and not all of the table.
    row = width * 2
    assert 4 * tokens * row <= report.traffic <= 6 * tokens * row < entries * row
    if "sparsecore" in text:
        with pytest.raises(MeshError, match="Compile it with `compile_with_text`"):
            compile_report(compiled)
