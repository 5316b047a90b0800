import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from grpo_mesh import MeshError, Rules, bytes_per_device, explain, pad, shardings, state_shardings, unpad

MESH = AbstractMesh((1, 4, 2), ("dp", "fsdp", "tp"))
PARAMS = {
    "embed": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16),
    "final_norm": jax.ShapeDtypeStruct((32,), jnp.float32),
    "layers": {
        "q": jax.ShapeDtypeStruct((3, 32, 4, 8), jnp.float32),
        "q_bias": jax.ShapeDtypeStruct((3, 4, 8), jnp.float32),
    },
}
RULES = Rules(
    [
        ("embed", ("vocabulary", "width")),
        ("layers/q", (None, "width", "heads")),
        ("layers/.*_bias", (None, "heads")),
        (".*", ()),
    ],
    axes={"vocabulary": "tp", "width": "fsdp", "heads": "tp"},
    pad=("vocabulary",),
)


def specs(tree):
    return jax.tree.map(lambda sharding: sharding.spec, tree)


def test_the_first_rule_that_matches_the_whole_path_wins():
    assert specs(shardings(PARAMS, MESH, RULES)) == {
        "embed": PartitionSpec("tp", "fsdp"),
        "final_norm": PartitionSpec(),
        "layers": {"q": PartitionSpec(None, "fsdp", "tp"), "q_bias": PartitionSpec(None, "tp")},
    }


def test_mesh_axes_and_tuples_need_no_logical_name():
    rules = Rules([(".*", PartitionSpec(("fsdp", "tp")))])
    tree = {"w": jax.ShapeDtypeStruct((16, 3), jnp.float32), "scale": jax.ShapeDtypeStruct((), jnp.float32)}
    placed = specs(shardings(tree, MESH, rules))
    assert placed == {"w": PartitionSpec(("fsdp", "tp")), "scale": PartitionSpec()}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("layers/q", ()), r"no rule matches 'embed'"),
        (("bed", ()), r"no rule matches 'embed' \('bed' matches a part of it"),
        (("embed", ("fsdp", None, "tp")), "'embed' has 2 dimensions but rule 'embed' names 3"),
        (("embed", ("tpu",)), "'embed': axis 'tpu' is neither a mesh axis"),
        (("embed", ("fsdp", "fsdp")), "mesh axis fsdp shards two dimensions"),
    ],
)
def test_a_leaf_no_rule_can_place_is_refused_by_name(rule, message):
    with pytest.raises(MeshError, match=message):
        shardings({"embed": PARAMS["embed"]}, MESH, Rules([rule]))


def test_a_dimension_that_does_not_divide_is_refused_with_the_nearest_fix():
    rules = Rules([("w", ("fsdp",))])
    with pytest.raises(MeshError, match=r"'w': dimension 0 of \(6, 2\) must divide by fsdp = 4.*let fsdp be 3.*to 8"):
        shardings({"w": jax.ShapeDtypeStruct((6, 2), jnp.float32)}, MESH, rules)


def test_a_vocabulary_is_padded_only_where_asked():
    tree = PARAMS | {"embed": jnp.ones((63, 32))}
    with pytest.raises(MeshError, match=r"Call `pad\(tree, mesh, rules\)` first: 63 becomes 64"):
        shardings(tree, MESH, RULES)
    padded = pad(tree, MESH, RULES)
    assert padded["embed"].shape == (64, 32)
    assert not padded["embed"][63].any()
    assert padded["layers"]["q"] is tree["layers"]["q"]
    shardings(padded, MESH, RULES)
    assert unpad(padded, tree)["embed"].shape == (63, 32)
    with pytest.raises(MeshError, match="cannot be cut"):
        unpad(tree, padded)


def matrices_only(params):
    return jax.tree.map(lambda leaf: len(leaf.shape) > 1, params)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.adamw(1e-3),
        optax.adamw(1e-3, mask=matrices_only),
        optax.lion(1e-3),
        optax.sgd(1e-3, momentum=0.9),
        optax.rmsprop(1e-3, momentum=0.9, centered=True),
        optax.adafactor(1e-3),  # every dimension is below its `min_dim_size_to_factor`
        optax.contrib.muon(1e-3),
        optax.contrib.muon(1e-3, weight_decay=0.1, weight_decay_mask=matrices_only),
        optax.masked(optax.adamw(1e-3), matrices_only),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3))),
        optax.MultiSteps(optax.sgd(1e-3, momentum=0.9), 4),
    ],
)
def test_optimizer_state_follows_its_parameter(optimizer):
    rules = Rules([rule for rule in RULES.rules if rule[0] != ".*"] + [("final_norm", ())], RULES.axes)
    state = jax.eval_shape(optimizer.init, PARAMS)
    spec_of_shape = {
        leaf.shape: sharding.spec
        for leaf, sharding in zip(*map(jax.tree.leaves, (PARAMS, shardings(PARAMS, MESH, rules))))
    }
    placed = state_shardings(state, PARAMS, MESH, rules)
    matrices = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert sharding.spec == spec_of_shape.get(leaf.shape, PartitionSpec())
        assert leaf.shape in spec_of_shape or leaf.size < 10
        matrices += leaf.ndim > 1
    assert matrices >= 3


def test_factored_state_keeps_the_shardings_of_the_dimensions_it_has():
    params = {
        "embed": jax.ShapeDtypeStruct((512, 256), jnp.float32),
        "square": jax.ShapeDtypeStruct((256, 256), jnp.float32),
        "layers": {"up": jax.ShapeDtypeStruct((3, 256, 1024), jnp.float32)},
        "norm": jax.ShapeDtypeStruct((256,), jnp.float32),
    }
    rules = Rules([("embed|square", ("tp", "fsdp")), ("layers/up", (None, "fsdp", "tp")), ("norm", ("fsdp",))])
    state = jax.eval_shape(optax.adafactor(1e-3).init, params)
    factored = state[0]
    assert factored.v_row["embed"].shape == (256,)
    assert factored.v_col["layers"]["up"].shape == (3, 1024)
    placed = specs(state_shardings(state, params, MESH, rules))[0]
    assert placed.v_row == {
        "embed": PartitionSpec("fsdp"),
        "square": PartitionSpec(),  # the sizes do not tell which dimension is missing
        "layers": {"up": PartitionSpec(None, "fsdp")},
        "norm": PartitionSpec(),
    }
    assert placed.v_col["embed"] == PartitionSpec("tp")
    assert placed.v_col["layers"]["up"] == PartitionSpec(None, "tp")
    assert placed.v["norm"] == PartitionSpec("fsdp")


def test_a_single_array_owns_its_state():
    params = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    placed = state_shardings(state, params, MESH, Rules([("", ("fsdp", "tp"))]))
    assert placed[0].mu.spec == PartitionSpec("fsdp", "tp")
    assert placed[0].count.spec == PartitionSpec()


@pytest.mark.parametrize("name", ["all", "embed"])
def test_large_state_of_another_shape_needs_a_rule(name):
    state = {"flat": {name: jax.ShapeDtypeStruct((4096,), jnp.float32)}}
    with pytest.raises(MeshError, match=f"no rule matches 'flat/{name}'"):
        state_shardings(state, {"embed": PARAMS["embed"]}, MESH, Rules([("embed", ("tp", "fsdp"))]))
    placed = state_shardings(state, {"embed": PARAMS["embed"]}, MESH, Rules([("flat/.*", ("fsdp",)), ("embed", ())]))
    assert placed["flat"][name].spec == PartitionSpec("fsdp")


@pytest.mark.parametrize("function", [shardings, explain, pad])
def test_arguments_in_another_order_are_refused(function):
    with pytest.raises(MeshError, match=r"mesh must be .*: got dict. The order is \(tree, mesh, rules\)"):
        function(MESH, PARAMS, RULES)
    with pytest.raises(MeshError, match=r"rules must be grpo_mesh.Rules: got list"):
        function(PARAMS, MESH, list(RULES.rules))


def test_state_shardings_refuses_arguments_in_another_order():
    with pytest.raises(MeshError, match=r"mesh must be .*: got Rules"):
        state_shardings(PARAMS, PARAMS, RULES, MESH)  # type: ignore[arg-type]


def test_bytes_of_a_device_follow_the_shardings():
    placed = shardings(PARAMS, MESH, RULES)
    tree = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), PARAMS, placed
    )
    assert bytes_per_device(tree) == 64 * 32 * 2 // 8 + 32 * 4 + 3 * 32 * 4 * 8 * 4 // 8 + 3 * 4 * 8 * 4 // 2
    assert bytes_per_device(PARAMS) == 64 * 32 * 2 + 32 * 4 + 3 * 32 * 4 * 8 * 4 + 3 * 4 * 8 * 4
    assert bytes_per_device({"x": jnp.zeros((3, 5), jnp.int8), "none": None}) == 15
    with pytest.raises(MeshError, match="'x' must be an array"):
        bytes_per_device({"x": 3})


def test_explain_adds_up_the_bytes_of_a_device():
    table = explain(PARAMS, MESH, RULES)
    assert table.total == 64 * 32 * 2 + 32 * 4 + 3 * 32 * 4 * 8 * 4 + 3 * 4 * 8 * 4
    assert table.bytes_per_device == 64 * 32 * 2 // 8 + 32 * 4 + 3 * 32 * 4 * 8 * 4 // 8 + 3 * 4 * 8 * 4 // 2
    text = str(table)
    assert "layers/q" in text
    assert "–, fsdp, tp, –" in text
    assert f"{table.bytes_per_device:,}" in text.splitlines()[-1]


def test_rules_are_checked_when_made():
    with pytest.raises(MeshError, match="must be a regular expression"):
        Rules([("(", ())])
    with pytest.raises(MeshError, match="pad must name logical axes"):
        Rules([], pad=("vocabulary",))


def test_a_leaf_that_is_no_array_is_refused():
    with pytest.raises(MeshError, match="'name' must be an array"):
        shardings({"name": "x"}, MESH, RULES)
