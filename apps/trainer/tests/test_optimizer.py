"""Every optimizer by name: it moves the parameters, decays what it is told to, and follows its learning rate."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import load

from grpo_loss import init_state
from grpo_sampler import ModelConfig, abstract
from grpo_trainer.assemble.optimizer import make_optimizer
from grpo_trainer.settings.errors import ConfigError

NAMES = ("adamw", "adam", "lion", "muon", "adafactor", "rmsprop", "sgd")
MODEL = ModelConfig(
    family="qwen2",
    vocab_size=24,
    width=8,
    mlp_width=12,
    layers=2,
    query_heads=2,
    kv_heads=1,
    head_size=4,
    qkv_bias=True,
    tied=False,
)


@pytest.fixture(scope="module")
def params() -> Any:
    """Parameters as a network has them, none of them 0."""
    _, shapes = abstract(MODEL)
    return jax.tree.map(lambda leaf: jnp.linspace(0.5, 1.5, leaf.size, dtype=jnp.float32).reshape(leaf.shape), shapes)


def make(*sets: str) -> tuple[optax.GradientTransformation, optax.Schedule]:
    return make_optimizer(load([], [f"optimizer.{assignment}" for assignment in sets]))


def change(optimizer: optax.GradientTransformation, params: Any, gradient: float) -> dict[str, np.ndarray]:
    """What the first update adds to each parameter, by name."""
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return named(updates)


def named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def is_matrix(name: str) -> bool:
    """By the network's own names, spelled out."""
    vectors = ("final_norm", "layers/attn_norm", "layers/mlp_norm", "layers/q_bias", "layers/k_bias", "layers/v_bias")
    return name not in vectors


@pytest.mark.parametrize("name", NAMES)
def test_one_update_moves_every_parameter_downhill(name: str, params: Any) -> None:
    optimizer, _ = make(f"name={name}", "learning_rate=1e-2")
    for parameter, moved in change(optimizer, params, 0.1).items():
        assert np.isfinite(moved).all(), parameter
        assert moved.any(), parameter
        assert moved.sum() < 0, parameter  # all gradients are positive


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moments_are_float32(name: str, dtype: Any, params: Any) -> None:
    optimizer, _ = make(f"name={name}")
    state = init_state(jax.tree.map(lambda leaf: leaf.astype(dtype), params), optimizer)
    floats = [leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) <= {jnp.dtype(jnp.float32)}
    assert floats or name == "sgd"


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_weight_decay_is_the_rate_times_the_learning_rate(name: str, decay: str, params: Any) -> None:
    """Without a gradient, nothing but the decay moves a parameter: w becomes w - rate * learning_rate * w."""
    rate, learning_rate = 0.25, 0.125
    optimizer, _ = make(f"name={name}", f"learning_rate={learning_rate}", f"weight_decay={rate}", f"decay={decay}")
    moved, before = change(optimizer, params, 0.0), named(params)
    assert before.keys() == moved.keys()
    for parameter, difference in moved.items():
        expected = -rate * learning_rate * before[parameter]
        if decay == "matrices" and not is_matrix(parameter):
            expected = np.zeros_like(expected)
        np.testing.assert_allclose(difference, expected, rtol=1e-6, err_msg=parameter)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd"])
def test_weight_decay_of_an_optimizer_without_any_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.weight_decay is 0\.1, but {name} has no weight decay"):
        make(f"name={name}", "weight_decay=0.1")


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_an_optimizer_lacks_are_refused(name: str) -> None:
    for argument in ("learning_rate", "nonsense"):
        with pytest.raises(ConfigError, match=rf"optimizer\.arguments of {name} must be among .*: got {argument}"):
            make(f"name={name}", f"arguments={{{argument}: 1}}")


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        # The first update of Adam is -rate * g / (|g| + eps), of heavy-ball SGD -rate * g, of RMSprop
        # -rate * g / sqrt((1 - b2) * g² + eps), of Lion -rate * sign(g).
        (("name=adam",), -1.0),
        (("name=adam", "arguments={eps: 0.3}"), -0.1 / (0.1 + 0.3)),
        (("name=sgd",), -0.1),
        (("name=sgd", "arguments={momentum: 0.5, nesterov: true}"), -0.1 * 1.5),
        (("name=rmsprop", "b2=0.75", "arguments={eps: 0}"), -1 / math.sqrt(0.25)),
        (("name=lion",), -1.0),
    ],
)
def test_first_updates(sets: tuple[str, ...], expected: float) -> None:
    optimizer, _ = make("learning_rate=1", *sets)
    moved = change(optimizer, {"w": jnp.ones((2, 3))}, 0.1)
    np.testing.assert_allclose(moved["w"], np.full((2, 3), expected), rtol=1e-5)


@pytest.mark.parametrize(("name", "b1", "b2"), [("adam", 0.5, 0.75), ("lion", 0.5, 0.75)])
def test_decays_of_the_moments(name: str, b1: float, b2: float) -> None:
    """The second update, after gradients 1 and -3, by the papers' formulas."""
    optimizer, _ = make(f"name={name}", "learning_rate=1", f"b1={b1}", f"b2={b2}")
    weight = {"w": jnp.ones(1)}
    _, state = optimizer.update({"w": jnp.ones(1)}, optimizer.init(weight), weight)
    moved, _ = optimizer.update({"w": jnp.full(1, -3.0)}, state, weight)
    if name == "adam":
        first = (b1 * (1 - b1) * 1 + (1 - b1) * -3) / (1 - b1**2)
        second = (b2 * (1 - b2) * 1 + (1 - b2) * 9) / (1 - b2**2)
        expected = -first / (math.sqrt(second) + 1e-8)
    else:
        expected = -math.copysign(1, b1 * (1 - b2) * 1 + (1 - b1) * -3)
    (moved_1,) = jax.tree.leaves(moved)
    np.testing.assert_allclose(moved_1, expected, rtol=1e-5)


def schedule(*sets: str) -> list[float]:
    """Learning rates of 8 updates and the one after them."""
    rate = make_optimizer(load([], ["steps=4", "loss.epochs=2", *sets]))[1]
    return [float(jnp.asarray(rate(n))) for n in range(9)]


def test_learning_rates() -> None:
    peak = "optimizer.learning_rate=0.8"
    warm, end = "optimizer.warmup_steps=4", "optimizer.end_learning_rate=0.2"
    assert schedule(peak) == pytest.approx([0.8] * 9)
    assert schedule(peak, warm) == pytest.approx([0, 0.2, 0.4, 0.6] + [0.8] * 5)
    linear = schedule(peak, "optimizer.schedule=linear", end)
    assert linear == pytest.approx([0.8 - 0.6 * n / 8 for n in range(9)])
    linear = schedule(peak, warm, end, "optimizer.schedule=linear")
    assert linear == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.65, 0.5, 0.35, 0.2])
    cosine = schedule(peak, end, "optimizer.schedule=cosine")
    assert cosine == pytest.approx([0.2 + 0.6 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(9)])
    cosine = schedule(peak, warm, "optimizer.schedule=cosine")
    falling = [0.8 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(5)]
    assert cosine == pytest.approx([0, 0.2, 0.4, 0.6, *falling], abs=1e-7)
