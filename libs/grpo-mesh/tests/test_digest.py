import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_mesh import MeshError, digest


def test_it_is_a_function_of_bits_shape_dtype_and_path():
    x = np.arange(12, dtype=np.float32)
    trees = [
        {"a": x},
        {"b": x},
        {"a": x.reshape(3, 4)},
        {"a": x.reshape(4, 3)},
        {"a": x.view(np.int32)},
        {"a": x.astype(np.float16)},
        {"a": np.roll(x, 1)},
        {"a": x.reshape(3, 4).T},
        {"a": np.nextafter(x, 100)},
        {"a": x, "b": x},
        {"a": x * -0.0},
        {"a": x * 0.0},
        {},
    ]
    digests = [digest(tree) for tree in trees]
    assert len(set(digests)) == len(trees)
    assert digests == [digest(jax.tree.map(jnp.asarray, tree)) for tree in trees]
    assert all(len(text) == 64 for text in digests)


def test_every_bit_of_every_element_counts():
    x = np.random.default_rng(0).integers(0, 2**32, (5, 7), dtype=np.uint32)
    seen = {digest(x)}
    for place in np.ndindex(*x.shape):
        flipped = x.copy()
        flipped[place] ^= np.uint32(1 << (sum(place) % 32))
        seen.add(digest(flipped))
    assert len(seen) == x.size + 1


def test_swapping_two_elements_or_rows_changes_it():
    x = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    seen = {digest(x)}
    for axis in range(3):
        for first in range(x.shape[axis] - 1):
            order = np.arange(x.shape[axis])
            order[[first, first + 1]] = order[[first + 1, first]]
            seen.add(digest(np.take(x, order, axis)))
    assert len(seen) == 1 + 5 + 4 + 3


@pytest.mark.parametrize(
    "leaf",
    [jax.random.key(3), jnp.array(True), jnp.int4(3), jnp.complex64(1 + 2j), np.float64(2.5), jnp.zeros((0, 3))],
    ids=str,
)
def test_any_dtype_has_one(leaf):
    assert digest({"x": leaf}) == digest({"x": leaf})


def test_a_leaf_that_is_no_array_is_refused():
    with pytest.raises(MeshError, match="leaf 'x' must be an array: got float"):
        digest({"x": 1.0})
