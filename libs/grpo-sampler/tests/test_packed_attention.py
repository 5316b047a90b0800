"""The TPU kernels of packed rows beside plain XLA attention, which stores every logit."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_sampler import _tiles
from grpo_sampler._packed import plan_attention
from grpo_sampler._packed_attention import packed_attention, plan_packed
from grpo_sampler._tiles import plan_tiles, tile_sizes


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 128 positions, so that short rows have many."""
    monkeypatch.setattr(_tiles, "_KEYS", 128)


def rows(blocks):
    """Segments of three rows of 600 tokens: short completions, one that crosses blocks, and nothing but padding."""
    segment_RT = np.zeros((3, 600), np.int32)
    for start, end, segment in ((0, 130, 1), (130, 131, 2), (131, 190, 3), (200, 399, 4), (400, 600, 5)):
        segment_RT[0, start:end] = segment
    segment_RT[1, :550] = 1
    prompt_RC = np.asarray([[2, 1, 0], [0, 0, 0], [3, 3, 3]], np.int32)[:, :blocks]
    return jnp.asarray(segment_RT), jnp.asarray(prompt_RC)


def inputs(heads, dtype, random, *, rows=3, length=600):
    array = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)  # noqa: E731
    (H, K), E, P, Tp, R, T = heads, 8, 4, 200, rows, length
    return (array(P, Tp, K, E), array(P, Tp, K, E)), (array(R, T, H, E), array(R, T, K, E), array(R, T, K, E))


def values_and_gradients(attend, inputs, weight):
    """Mixed values of tokens, and the gradients of a sum over them."""

    def loss(inputs):
        out = attend(*inputs).astype(jnp.float32) * weight
        return jnp.square(out).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves((out, gradients))]


def distance(a, b):
    """The largest difference of two arrays, relative to the largest value of the second."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def attention(kernel, segment_RT, prompt_RC, length_P, *, heads):
    """Attention by the kernel, the TPU's being interpreted. It plans inside jit, which compiles faster."""
    sizes = {"prompt_length": 200, "group": heads[0] // heads[1], "shards": 1, "mesh": None}

    def attend(*arrays):
        if kernel == "xla":
            return plan_attention("xla", segment_RT, prompt_RC, length_P, **sizes)(*arrays)
        plan = plan_packed(segment_RT, prompt_RC, length_P, **sizes, interpret=True)
        return packed_attention(plan, *arrays)

    return attend


@pytest.mark.parametrize(
    ("heads", "blocks", "part", "tiles"),
    [
        pytest.param((2, 1), 1, (slice(0, 1), slice(100, 300)), (128, 1024), id="small"),
        pytest.param((4, 2), 3, (), (128, 1024), marks=pytest.mark.slow),
        pytest.param((3, 1), 1, (), (128, 1024), marks=pytest.mark.slow),
        pytest.param((4, 2), 1, (), (256, 256), marks=pytest.mark.slow, id="more keys than queries"),
    ],
)
def test_values_and_gradients_are_those_of_plain_attention(heads, blocks, part, tiles, monkeypatch):
    monkeypatch.setattr(_tiles, "_KEYS", tiles[0])
    monkeypatch.setattr(_tiles, "_QUERIES", tiles[1])
    segment_RT, prompt_RC = rows(blocks)
    segment_RT, prompt_RC = segment_RT[part], prompt_RC[part[:1]]
    length_P = jnp.asarray([200, 1, 129, 0], jnp.int32)
    R, T = segment_RT.shape
    arrays = inputs(heads, jnp.float32, np.random.default_rng(0), rows=R, length=T)
    weight = (segment_RT > 0)[:, :, None, None]
    plain, ours = (
        values_and_gradients(attention(kernel, segment_RT, prompt_RC, length_P, heads=heads), arrays, weight)
        for kernel in ("xla", "splash")
    )
    for a, b in zip(ours, plain, strict=True):
        assert distance(a, b) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_in_bf16_the_error_is_that_of_plain_attention_in_bf16():
    segment_RT, prompt_RC = rows(3)
    length_P = jnp.asarray([200, 1, 129, 0], jnp.int32)
    low = inputs((4, 2), jnp.bfloat16, np.random.default_rng(0))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    weight = (segment_RT > 0)[:, :, None, None]

    def run(kernel, arrays):
        attend = attention(kernel, segment_RT, prompt_RC, length_P, heads=(4, 2))
        return values_and_gradients(attend, arrays, weight)

    for truth, plain, ours in zip(run("xla", exact), run("xla", low), run("splash", low), strict=True):
        error = lambda x, truth=truth: float(np.sqrt(np.mean(np.square(x - truth))))  # noqa: E731
        assert 0 < error(ours) < 1.2 * error(plain)


@pytest.mark.parametrize("lengths", [[200, 1, 129, 0], [0, 0, 0, 0]])
def test_padding_has_neither_values_nor_gradients(lengths):
    """A query that sees nothing mixes nothing, and nothing in its place is NaN, whatever stands there."""
    segment_RT, prompt_RC = rows(3)
    arrays = inputs((4, 2), jnp.float32, np.random.default_rng(0))
    attend = attention("splash", segment_RT, prompt_RC, jnp.asarray(lengths, jnp.int32), heads=(4, 2))
    out, *gradients = values_and_gradients(attend, arrays, 1.0)
    assert all(np.isfinite(leaf).all() for leaf in (out, *gradients))
    assert not out[2].any()
    for leaf in gradients[2:]:
        assert not leaf[2].any()


@pytest.mark.parametrize(
    ("length", "padded", "tile"),
    [(1, 128, 128), (512, 512, 512), (640, 768, 384), (1152, 1152, 384), (4097, 4608, 512)],
)
def test_tiles_are_few_and_equal(length, padded, tile):
    sizes = tile_sizes(block=length, prompt=length, group=8)
    assert (sizes.block, sizes.keys, sizes.prompt, sizes.prompt_keys) == (padded, tile, padded, tile)
    assert sizes.queries == 128


def test_only_tiles_with_something_to_see_are_visited():
    random = np.random.default_rng(0)
    sizes = _tiles.TileSizes(block=256, keys=64, queries=32, prompt=192, prompt_keys=64)
    plan_of = jax.jit(partial(plan_tiles, sizes=sizes, group=2))
    for _ in range(20):
        segment_RT = np.zeros((2, 512), np.int32)
        for row in segment_RT:
            at, segment = 0, 0
            while (at := at + random.integers(0, 80)) < 512:
                segment += 1
                end = at + random.integers(1, 300)
                row[at:end], at = segment, end
        slot_RC, length_P = random.integers(0, 3, (2, 2)), random.integers(0, 193, 3)
        plan = plan_of(*(jnp.asarray(x, jnp.int32) for x in (segment_RT, slot_RC, length_P)))
        at = np.arange(512)
        mask = (segment_RT[:, :, None] == segment_RT[:, None]) & (segment_RT > 0)[:, None] & (at[:, None] >= at)
        sees_NJ = mask.reshape(2, 16, 32, 8, 64).any((2, 4)).reshape(32, 8)
        visited = (np.arange(8) >= plan.first_N[:, None]) & (np.arange(8) < (plan.first_N + plan.row_tiles_N)[:, None])
        np.testing.assert_array_equal(visited, sees_NJ)
        first_RJ, count_RJ = plan.row_first_J.reshape(2, 8, 1), plan.row_count_J.reshape(2, 8, 1)
        visitors = (np.arange(32) >= first_RJ) & (np.arange(32) < first_RJ + count_RJ)
        np.testing.assert_array_equal(visitors.any(0).T, sees_NJ)
        live_N = (segment_RT.reshape(32, 32) > 0).any(1)
        slot_N = slot_RC.repeat(8, axis=1).reshape(-1)
        np.testing.assert_array_equal(plan.prompt_tiles_N, np.where(live_N, -(-length_P[slot_N] // 64), 0))
        for place, (first, count) in enumerate(zip(plan.prompt_first_J, plan.prompt_count_J, strict=True)):
            slot, tile = divmod(place, 3)
            users = np.flatnonzero(live_N & (slot_N == slot)) if tile * 64 < length_P[slot] else []
            np.testing.assert_array_equal(np.sort(plan.order_N[first : first + count]), users)


@pytest.mark.slow
def test_on_a_mesh_values_and_gradients_are_those_of_one_device():
    """Rows with their own prompts, rows with prompts of other devices, and fewer heads than devices to split them."""
    script = Path(__file__).with_name("packed_attention_on_eight_devices.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert all(case["worst"] <= 5e-6 for case in report.values()), report
    assert report["own"]["gathers"] == 0, report
