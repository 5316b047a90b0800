"""Tests that need eight devices; `test_on_eight_devices.py` runs them in a process that has them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_mesh import (
    MeshError,
    Rules,
    batch_sharding,
    compile_report,
    digest,
    local_rows,
    make_mesh,
    replicated,
    reshape_mesh,
    reshard,
    shardings,
    state_shardings,
    to_global,
    to_host,
    to_local,
)

RULES = Rules([("w", ("fsdp", "tp")), (".*", ("fsdp",))])
MESHES = ["8,1,1", "1,8,1", "1,4,2", "2,2,2"]


def parameters():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(8, 3, 5)), jnp.bfloat16),
        "ids": jnp.arange(8, dtype=jnp.int32),
        "flags": jnp.arange(8) % 3 == 0,
        "bytes": jnp.arange(8, dtype=jnp.int8),
    }


def test_the_digest_does_not_depend_on_the_sharding():
    params = parameters()
    alone = digest(jax.device_put(params, jax.devices()[3]))
    assert digest(jax.tree.map(np.asarray, params)) == alone
    for spec in MESHES:
        mesh = make_mesh(spec)
        assert digest(jax.device_put(params, shardings(params, mesh, RULES))) == alone
        assert digest(jax.device_put(params, replicated(mesh))) == alone


def test_a_program_moves_parameters_to_a_reshaped_mesh():
    params, mesh = parameters(), make_mesh("1,4,2")
    target = shardings(params, reshape_mesh(mesh, "2,2,2"), RULES)
    moved = jax.jit(lambda tree: tree, out_shardings=target)(jax.device_put(params, shardings(params, mesh, RULES)))
    assert jax.tree.map(lambda leaf: leaf.sharding, moved) == target
    assert digest(moved) == digest(params)


def test_parameters_move_between_meshes_unchanged():
    params = parameters()
    wanted = digest(params)
    for first, second in itertools.pairwise([*MESHES, MESHES[0]]):
        trained = jax.device_put(params, shardings(params, make_mesh(first), RULES))
        target = shardings(params, make_mesh(second), RULES)
        with jax.transfer_guard_device_to_host("disallow_explicit"):
            moved = reshard(trained, target, donate=True)
        assert all(jax.tree.leaves(jax.tree.map(lambda leaf, place: leaf.sharding == place, moved, target)))
        assert digest(moved) == wanted


def test_parameters_move_to_a_mesh_of_other_devices():
    params = parameters()
    train = make_mesh("1,4,1", jax.devices()[:4])
    sample = make_mesh("1,2,2", jax.devices()[4:])
    moved = reshard(jax.device_put(params, shardings(params, train, RULES)), shardings(params, sample, RULES))
    assert moved["w"].devices() == set(jax.devices()[4:])
    assert digest(moved) == digest(params)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(("first", "second"), [((0, 8), (2, 4)), ((0, 4), (0, 8)), ((4, 8), (0, 1)), ((0, 1), (0, 8))])
def test_parameters_move_to_more_or_fewer_devices(first, second, donate):
    params = parameters()
    train, sample = (make_mesh("1,-1,1", jax.devices()[slice(*which)]) for which in (first, second))
    trained = jax.device_put(params, shardings(params, train, RULES))
    target = shardings(params, sample, RULES)
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        moved = reshard(trained, target, donate=donate)
    assert digest(moved) == digest(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, place: leaf.sharding == place, moved, target)))
    assert donate or digest(trained) == digest(params)


@pytest.mark.parametrize("spec", MESHES)
def test_a_batch_survives_the_way_to_the_devices_and_back(spec):
    sharding = batch_sharding(make_mesh(spec))
    batch = {"tokens": np.arange(48).reshape(16, 3), "reward": np.linspace(0, 1, 16, dtype=np.float32)}
    placed = to_global(batch, sharding)
    assert placed["tokens"].sharding.spec == sharding.spec
    for back in (to_host(placed), to_local(placed)):
        for name, value in batch.items():
            np.testing.assert_array_equal(back[name], value)
    assert local_rows(sharding, 16).tolist() == list(range(16))


def test_any_dimension_may_be_sharded_when_every_process_has_all():
    mesh = make_mesh("2,4,1")
    batch = {"tokens": np.arange(48).reshape(2, 8, 3), "count": np.int32(3)}
    placed = to_global(batch, NamedSharding(mesh, PartitionSpec(None, ("dp", "fsdp"))))
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 1, 3)
    assert placed["count"].is_fully_replicated
    np.testing.assert_array_equal(to_host(placed)["tokens"], batch["tokens"])


def test_rows_that_do_not_divide_are_refused():
    sharding = batch_sharding(make_mesh("2,4,1"))
    with pytest.raises(MeshError, match=r"dimension 0 of \(12, 2\) must divide over dp·fsdp = 8: got 12. Use 8 or 16"):
        to_global(np.zeros((12, 2)), sharding)
    with pytest.raises(MeshError, match=r"tokens must have this process' 16 of 16 rows: got shape \(8, 2\)"):
        to_global({"tokens": np.zeros((8, 2))}, sharding, rows=16)


def test_a_mesh_in_place_of_a_sharding_is_refused():
    mesh = make_mesh("auto")
    for call in (
        lambda: to_global(np.zeros((8, 2)), mesh),  # type: ignore[arg-type]
        lambda: local_rows(3, mesh),  # type: ignore[arg-type]
    ):
        with pytest.raises(
            MeshError, match=r"must be a NamedSharding such as `batch_sharding\(mesh\)`: got (Mesh|int)"
        ):
            call()
    with pytest.raises(MeshError, match="must be a sharding or a pytree of them: got Mesh"):
        reshard(jnp.zeros((8, 2)), mesh)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "rmsprop", "adafactor", "muon"])
def test_optimizer_state_is_made_on_its_mesh_and_stays_there(name):
    optimizer = {
        "adamw": optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
        "lion": optax.lion(1e-3),
        "sgd": optax.sgd(1e-3, momentum=0.9),
        "rmsprop": optax.rmsprop(1e-3),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=8),
        "muon": optax.contrib.muon(1e-3),
    }[name]
    mesh = make_mesh("1,4,2")
    params = {"w": parameters()["w"], "bias": jnp.ones(12, jnp.float32)}
    params = jax.device_put(params, shardings(params, mesh, RULES))
    placed = state_shardings(jax.eval_shape(optimizer.init, params), params, mesh, RULES)
    state = jax.jit(optimizer.init, out_shardings=placed)(params)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == placed
    if name == "adafactor":
        # Of w, [16, 8], a row and a column; the bias whole.
        specs = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.size > 1}
        assert specs == {(8,): PartitionSpec("tp"), (16,): PartitionSpec("fsdp"), (12,): PartitionSpec("fsdp")}
    else:
        sharded = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (16, 8)]
        assert sharded
        assert all(leaf.addressable_shards[0].data.shape == (4, 4) for leaf in sharded)
    updates, _ = jax.jit(optimizer.update)(params, state, params)
    alone = jax.device_get(params)
    expected, _ = jax.jit(optimizer.update)(alone, optimizer.init(alone), alone)
    for left, right in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=2e-3, atol=1e-6)


def test_local_rows_of_an_array_sharded_over_columns_are_refused():
    mesh = make_mesh("1,4,2")
    array = jax.device_put(jnp.zeros((8, 8)), shardings({"w": jnp.zeros((8, 8))}, mesh, RULES)["w"])
    with pytest.raises(MeshError, match="sharded over rows only"):
        to_local(array)


def test_a_report_counts_collectives_inside_loops():
    mesh = make_mesh("1,8,1")
    layers, width = 5, 64
    weights = jax.ShapeDtypeStruct(
        (layers, width, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    x = jax.ShapeDtypeStruct((64, width), jnp.float32, sharding=batch_sharding(mesh))

    def forward(weights, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

    report = compile_report(jax.jit(forward, out_shardings=batch_sharding(mesh)).lower(weights, x).compile())
    assert report.flops == 2 * layers * (64 // 8) * width * width
    moved = sum(kind.bytes for kind in report.collectives.values())
    assert 0.5 * 4 * layers * width * width <= moved <= 3 * 4 * layers * width * width
