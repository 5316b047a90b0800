"""The layouts that grpo-loss packs, under the TPU attention kernels of grpo-sampler."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_contracts import PolicyVersion, Rollout, SamplingParams, Scored, TrainBatch
from grpo_loss import MicroBatch, PackShape, pack
from grpo_sampler import _tiles
from grpo_sampler._packed import plan_attention
from grpo_sampler._packed_attention import packed_attention, plan_packed
from grpo_sampler._tiles import plan_tiles, tile_sizes

SHAPES = [
    PackShape(row_length=300, rows=4, prompts=4, prompt_length=150, micro_batches=8),
    PackShape(row_length=600, rows=2, prompts=2, prompt_length=40, micro_batches=8, blocks=2),
    PackShape(row_length=600, rows=3, prompts=5, prompt_length=150, micro_batches=8, blocks=4),
]


def first_micro_batch(shape: PackShape, seed: int, longest: int) -> MicroBatch:
    """Packs four groups of four completions."""
    random = np.random.default_rng(seed)
    B, T = 16, shape.prompt_length + 1 + longest
    prompt_length_B = random.integers(1, shape.prompt_length + 2, 4).repeat(4)
    total_length_B = prompt_length_B + random.integers(1, longest + 1, B)
    at = np.arange(T)
    group_B, nothing_B, everything_B = np.arange(4).repeat(4), np.zeros(B, np.float32), np.ones(B, bool)
    mask_BT = (at >= prompt_length_B[:, None]) & (at < total_length_B[:, None])
    rollout = Rollout(
        tokens_BT=np.where(at < total_length_B[:, None], 1, 0).astype(np.int32),
        prompt_length_B=prompt_length_B,
        total_length_B=total_length_B,
        loss_mask_BT=mask_BT,
        logp_BT=np.zeros((B, T), np.float32),
        policy_logp_BT=np.zeros((B, T), np.float32),
        finish_B=np.zeros(B, np.int8),
        prompt_id_B=group_B,
        sample_B=np.zeros(B, np.int32),
        group_B=group_B,
        group_size=4,
        sampling=SamplingParams(),
        policy=PolicyVersion(0, "00"),
        vocab_size=8,
        pad_id=0,
    )
    scored = Scored(rollout, nothing_B[:, None], everything_B[:, None], ("r",), np.ones(1), nothing_B, everything_B)
    packed = pack(TrainBatch(scored, np.ones(B, np.float32)), shape=shape)
    return jax.tree.map(lambda leaf: leaf[0], packed.micro)


def seen(micro: MicroBatch) -> np.ndarray:
    """Which of a row's tokens each of its tokens sees."""
    segment_RT = micro.segment_RT
    same = (segment_RT[:, :, None] == segment_RT[:, None]) & (segment_RT > 0)[:, None]
    return same & np.tri(segment_RT.shape[1], dtype=bool)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("longest", [30, 300])
def test_no_tile_without_a_visible_key_is_visited(shape: PackShape, longest: int, monkeypatch) -> None:
    monkeypatch.setattr(_tiles, "_KEYS", 128)
    block = shape.row_length // shape.blocks
    sizes = tile_sizes(block=block, prompt=shape.prompt_length, group=2)
    plan_of = jax.jit(partial(plan_tiles, sizes=sizes, group=2))
    for seed in range(10):
        micro = first_micro_batch(shape, seed, longest)
        inside = np.flatnonzero(np.arange(sizes.block * shape.blocks) % sizes.block < block)
        R, T = shape.rows, sizes.block * shape.blocks
        segment_RT, sees = np.zeros((R, T), np.int32), np.zeros((R, T, T), bool)
        segment_RT[:, inside] = micro.segment_RT
        sees[:, inside[:, None], inside] = seen(micro)
        plan = plan_of(*(jnp.asarray(x) for x in (segment_RT, micro.prompt_RC, micro.prompt_length_P)))
        tiles = T // sizes.queries, T // sizes.keys
        sees_NJ = sees.reshape(R, tiles[0], sizes.queries, tiles[1], sizes.keys).any((2, 4)).reshape(-1, tiles[1])
        place = np.arange(tiles[1])
        visited = (place >= plan.first_N[:, None]) & (place < (plan.first_N + plan.row_tiles_N)[:, None])
        np.testing.assert_array_equal(visited, sees_NJ)
        np.testing.assert_array_equal(plan.row_count_J, sees_NJ.reshape(R, *tiles).sum(1).reshape(-1))
        length_N = micro.prompt_length_P[micro.prompt_RC.repeat(sizes.block // sizes.queries, axis=1)].reshape(-1)
        live_N = sees_NJ.any(1)
        np.testing.assert_array_equal(plan.prompt_tiles_N, -(-length_N // sizes.prompt_keys) * live_N)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_plain_attention(shape: PackShape, monkeypatch) -> None:
    monkeypatch.setattr(_tiles, "_KEYS", 128)
    micro = jax.tree.map(jnp.asarray, first_micro_batch(shape, 0, 200))
    random = np.random.default_rng(0)
    array = lambda *sizes: jnp.asarray(random.standard_normal(sizes), jnp.float32)  # noqa: E731
    rows, prompts = (shape.rows, shape.row_length), (shape.prompts, shape.prompt_length)
    arrays = (
        (array(*prompts, 2, 8), array(*prompts, 2, 8)),
        (array(*rows, 4, 8), array(*rows, 2, 8), array(*rows, 2, 8)),
    )
    weight = array(*rows, 4, 8) * (micro.segment_RT > 0)[..., None, None]
    layout = micro.segment_RT, micro.prompt_RC, micro.prompt_length_P
    sizes = {"prompt_length": shape.prompt_length, "group": 2, "shards": 1, "mesh": None}

    def run(attend):
        def loss(arrays):
            out = attend(*arrays) * weight
            return out.sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return jax.tree.leaves((out, gradients))

    ours = run(partial(packed_attention, plan_packed(*layout, **sizes, interpret=True)))
    for a, b in zip(ours, run(plan_attention("xla", *layout, **sizes)), strict=True):
        assert float(jnp.abs(a - b).max()) <= 1e-5 * float(jnp.abs(b).max())
