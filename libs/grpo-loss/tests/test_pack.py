"""Packed rows hold every kept completion once, next to its own prompt, in the fewest rows that a group allows."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo_loss_ragged import ragged
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_loss
from grpo_contracts import TrainBatch
from grpo_loss import (
    LossError,
    PackShape,
    abstract_batch,
    iterate_minibatches,
    pack_tokens,
    split_minibatches,
    unpack_tokens,
)


def shape_for(groups, group_size, longest, *, rows=4, **sizes):
    return PackShape.for_rollout(
        sequences=groups * group_size,
        groups=groups,
        max_prompt_length=6,
        max_new_tokens=max(1, longest),
        rows=rows,
        **sizes,
    )


def check_layout(data, batch, keep_B=None):
    """Everything a consumer relies on, told from the arrays alone."""
    micro, count = batch.micro, int(batch.count)
    B, T = data.tokens_BT.shape
    keep_B = np.ones(B, bool) if keep_B is None else keep_B
    in_row = micro.segment_RT > 0
    assert not in_row[count:].any()
    target = micro.source_RT >= 0
    # Every completion token of every kept sequence, exactly once.
    place_T = np.arange(T)
    wanted_BT = (place_T >= data.prompt_length_B[:, None]) & (place_T < data.total_length_B[:, None]) & keep_B[:, None]
    np.testing.assert_array_equal(np.sort(micro.source_RT[target]), np.flatnonzero(wanted_BT))
    source = micro.source_RT[target]
    flat = data.tokens_BT.reshape(-1)
    np.testing.assert_array_equal(micro.target_RT[target], flat[source])
    np.testing.assert_array_equal(micro.tokens_RT[target], flat[source - 1])
    np.testing.assert_array_equal(micro.sequence_RT[target], source // T)
    np.testing.assert_array_equal(micro.positions_RT[target], source % T - 1)
    np.testing.assert_array_equal(micro.mask_RT[target], data.loss_mask_BT.reshape(-1)[source])
    assert not micro.mask_RT[~target].any()
    assert (micro.sequence_RT[~in_row] == -1).all()
    return in_row


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 6),
    group_size=st.integers(1, 7),
    longest=st.integers(0, 20),
    shards=st.sampled_from([1, 2, 4]),
    prompts_per_shard=st.integers(1, 2),
    slack=st.integers(0, 30),
    blocks=st.sampled_from([1, 2, 4]),
)
def test_every_kept_completion_is_there_once(
    seed, groups, group_size, longest, shards, prompts_per_shard, slack, blocks
):
    data = ragged(seed, groups, group_size, 6, longest)
    shape = shape_for(
        groups,
        group_size,
        longest,
        row_length=-(-(max(1, longest) + slack) // blocks) * blocks,
        shards=shards,
        prompts=prompts_per_shard * shards,
        blocks=blocks,
    )
    keep_B = np.random.default_rng(seed).random(len(data.group_B)) < 0.8
    batch = data.pack(shape, keep_B=keep_B)
    in_row = check_layout(data, batch, keep_B)
    micro = batch.micro
    np.testing.assert_array_equal(in_row, micro.source_RT >= 0)
    for m, r in zip(*np.nonzero(in_row.any(axis=2)), strict=True):
        # Segments 1, 2, ... in this order from the row's start, one sequence each, all of their blocks' prompt.
        segments = micro.segment_RT[m, r][in_row[m, r]]
        assert in_row[m, r, 0]
        if blocks == 1:
            assert in_row[m, r, : len(segments)].all()
        assert (np.diff(np.concatenate([[0], segments])) >= 0).all()
        assert (np.diff(np.unique(segments)) == 1).all()
        slot_T = micro.prompt_RC[m, r].repeat(shape.row_length // blocks)
        assert (slot_T // prompts_per_shard == r // (shape.rows // shards)).all()
        for b in np.unique(micro.sequence_RT[m, r][in_row[m, r]]):
            at = np.flatnonzero(micro.sequence_RT[m, r] == b)
            assert (np.diff(at) == 1).all()
            (segment,) = np.unique(micro.segment_RT[m, r, at])
            np.testing.assert_array_equal(micro.segment_RT[m, r] == segment, micro.sequence_RT[m, r] == b)
            (slot,) = np.unique(slot_T[at])
            shared = data.prompt_length_B[b] - 1
            assert micro.prompt_length_P[m, slot] == shared
            np.testing.assert_array_equal(micro.prompt_tokens_PT[m, slot, :shared], data.tokens_BT[b, :shared])


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_plain_layout_has_whole_sequences_and_no_shared_prompt(rows):
    data = ragged(3, 4, 3, 6, 9)
    batch = data.pad(rows)
    in_row = check_layout(data, batch)
    assert not batch.micro.prompt_length_P.any()
    inputs_B = np.bincount(batch.micro.sequence_RT[in_row], minlength=12)
    np.testing.assert_array_equal(inputs_B, data.total_length_B - 1)


def test_the_same_rollout_packs_the_same_way():
    first, second = (ragged(1, 5, 4, 6, 12).pack(shape_for(5, 4, 12)) for _ in range(2))
    for name, value in vars(first.micro).items():
        if value is not None:
            np.testing.assert_array_equal(value, getattr(second.micro, name))


def test_a_group_that_fits_one_micro_batch_has_its_prompt_computed_once():
    data = ragged(2, 6, 8, 6, 16, lambda rng, B: rng.integers(1, 8, B))
    shape = PackShape(row_length=16, rows=8, prompts=4, prompt_length=5, micro_batches=8)
    batch = data.pack(shape)
    pairs = {
        (m, int(batch.micro.prompt_RC[m, r, 0]))
        for m, r in zip(*np.nonzero((batch.micro.segment_RT > 0).any(axis=2)), strict=True)
    }
    assert len(pairs) == 6


def gsm8k_lengths(rng, B):
    """Completions of some 197 tokens (log-normal, spread 0.45), cut at 512."""
    return np.minimum(512, np.exp(rng.normal(np.log(178), 0.45, B)).astype(int) + 1)


@pytest.mark.parametrize(
    ("group_size", "blocks", "floor"), [(8, 1, 0.78), (8, 4, 0.88), (8, 8, 0.9), (16, 4, 0.92), (32, 1, 0.92)]
)
def test_rows_are_full_on_lengths_like_those_of_gsm8k(group_size, blocks, floor):
    used, cells = 0, 0
    for seed in range(5):
        data = ragged(seed, 16, group_size, 6, 512, gsm8k_lengths)
        shapes = [
            shape_for(16, group_size, 512, rows=4, prompts=4, row_length=length, blocks=blocks)
            for length in (512, 768, 1024)
        ]
        batch = data.pack(shapes)
        used += int((batch.micro.segment_RT > 0).sum())
        cells += int(batch.count) * batch.micro.tokens_RT[0].size
    print(f"groups of {group_size}, rows of {blocks} blocks: fill {used / cells:.1%}")
    assert used / cells >= floor


def test_of_several_shapes_the_cheapest_is_used():
    data = ragged(4, 4, 4, 6, 10, lambda rng, B: np.full(B, 10))
    narrow, wide = shape_for(4, 4, 10, row_length=10), shape_for(4, 4, 10, row_length=19)
    assert data.pack([wide, narrow]).micro.tokens_RT.shape[-1] == 10
    assert data.pack([wide]).fill == pytest.approx(10 / 19)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("per_token", [False, True])
def test_advantages_and_log_probabilities_go_into_rows_and_back(layout, per_token):
    data = ragged(5, 4, 3, 6, 9)
    B, T = data.tokens_BT.shape
    advantage = np.random.default_rng(0).normal(size=(B, T) if per_token else B).astype(np.float32)
    data = replace(data, advantage=advantage)
    micro: Any = (data.pack(shape_for(4, 3, 9)) if layout == "packed" else data.pad(5)).micro
    advantage_BT = advantage if per_token else np.repeat(advantage[:, None], T, axis=1)
    in_completion = np.arange(T) >= data.prompt_length_B[:, None]
    in_completion &= np.arange(T) < data.total_length_B[:, None]
    for packed, values_BT in (
        (micro.advantage_RT, advantage_BT),
        (micro.sampler_logp_RT, data.sampler_logp_BT),
        (micro.old_logp_RT, np.asarray(data.old_logp_BT)),
    ):
        back_BT = unpack_tokens(packed, micro.source_RT, (B, T))
        np.testing.assert_array_equal(back_BT, np.where(in_completion, values_BT, 0))
        again = pack_tokens(jnp.asarray(values_BT), jnp.asarray(micro.source_RT))
        np.testing.assert_array_equal(np.where(micro.source_RT >= 0, packed, 0), again)
    assert micro.reference_logp_RT is None


def test_numpy_jax_and_lists_are_packed_alike():
    batch = ragged(5, 4, 3, 6, 9).train_batch()
    shape = shape_for(4, 3, 9)
    expected = jax.tree.leaves(grpo_loss.pack(batch, shape=shape))

    def converted(stage: Any, convert: Any) -> Any:
        arrays = {name: convert(value) for name, value in vars(stage).items() if isinstance(value, np.ndarray)}
        return replace(stage, **arrays)

    converts: list[Any] = [jnp.asarray, np.ndarray.tolist]
    for convert in converts:
        rollout = converted(batch.scored.rollout, convert)
        other = replace(converted(batch, convert), scored=replace(converted(batch.scored, convert), rollout=rollout))
        leaves = jax.tree.leaves(grpo_loss.pack(other, shape=shape, keep_B=convert(np.ones(12, bool))))
        for actual, wanted in zip(leaves, expected, strict=True):
            assert actual.dtype == wanted.dtype
            np.testing.assert_array_equal(actual, wanted)


def test_an_unscored_sequence_is_never_packed():
    data = ragged(3, 4, 3, 6, 9, lambda rng, B: np.full(B, 9))
    scored_B, keep_B = np.arange(12) != 2, np.arange(12) < 6
    data = replace(data, scored_B=scored_B)
    for batch, kept in (
        (data.pack(shape_for(4, 3, 9)), scored_B),
        (data.pack(shape_for(4, 3, 9), keep_B=keep_B), scored_B & keep_B),
        (data.pad(4), scored_B),
    ):
        there = np.unique(batch.micro.sequence_RT)
        np.testing.assert_array_equal(there[there >= 0], np.flatnonzero(kept))


@pytest.mark.parametrize(("old", "reference"), [(False, False), (True, True)])
def test_the_abstract_batch_is_what_pack_returns(old, reference):
    data = ragged(5, 4, 3, 6, 9)
    shape = shape_for(4, 3, 9, row_length=12, blocks=2)
    logp_BT = np.zeros(data.tokens_BT.shape, np.float32)
    batch = replace(
        data.train_batch(), old_logp_BT=logp_BT if old else None, reference_logp_BT=logp_BT if reference else None
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = abstract_batch(shape, rows_sharding=device, count_sharding=device, old=old, reference=reference)
    packed = grpo_loss.pack(batch, shape=shape)
    assert jax.tree.structure(abstract) == jax.tree.structure(packed)
    for expected, leaf in zip(jax.tree.leaves(packed), jax.tree.leaves(abstract), strict=True):
        assert (expected.shape, expected.dtype, device) == (leaf.shape, leaf.dtype, leaf.sharding)


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("carried", [False, True])
def test_minibatches_carry_log_probabilities_scored_once_before_the_first(epochs, minibatches, carried):
    data = replace(ragged(8, 6, 2, 6, 9), old_logp_BT=None, scored_B=np.arange(12) != 4)
    B, T = data.tokens_BT.shape
    batch, shape, calls = data.train_batch(), shape_for(6, 2, 9), []
    known_BT = np.full((B, T), -7.0, np.float32)
    if carried:
        batch = replace(batch, old_logp_BT=known_BT, reference_logp_BT=known_BT)

    def scorer(name, sign):
        def score(packed):
            calls.append(name)
            assert packed.micro.old_logp_RT is packed.micro.reference_logp_RT is None
            # A different number for each token of the rollout, so that none can be mistaken for another.
            return jnp.asarray(sign * packed.micro.source_RT, jnp.float32)

        return score

    parts = list(
        iterate_minibatches(
            batch,
            shape=shape,
            epochs=epochs,
            minibatches=minibatches,
            seed=3,
            step=2,
            old=scorer("old", 1),
            reference=scorer("reference", -1),
        )
    )
    several = epochs * minibatches > 1
    assert calls == ([] if carried else ["old"] * several + ["reference"])
    keeps = [
        keep for e in range(epochs) for keep in split_minibatches(data.group_B, minibatches, seed=3, step=2, epoch=e)
    ]
    assert len(parts) == len(keeps) == epochs * minibatches
    for part, keep_B in zip(parts, keeps, strict=True):
        micro: Any = part.micro
        there = np.unique(micro.sequence_RT)
        np.testing.assert_array_equal(
            there[there >= 0], np.flatnonzero(keep_B & data.scored_B & (data.total_length_B > data.prompt_length_B))
        )
        token = micro.source_RT >= 0
        if carried or several:
            np.testing.assert_array_equal(micro.old_logp_RT[token], -7 if carried else micro.source_RT[token])
        else:
            assert micro.old_logp_RT is None
        np.testing.assert_array_equal(micro.reference_logp_RT[token], -7 if carried else -micro.source_RT[token])


def test_several_steps_need_old_log_probabilities():
    data = replace(ragged(8, 6, 2, 6, 9), old_logp_BT=None)
    arguments = {"shape": shape_for(6, 2, 9), "seed": 0, "step": 0}
    with pytest.raises(LossError, match="got neither old nor old_logp_BT"):
        next(iterate_minibatches(data.train_batch(), epochs=2, **arguments))
    with pytest.raises(LossError, match="What old returns must have shape"):
        next(iterate_minibatches(data.train_batch(), epochs=2, old=lambda packed: np.zeros((2, 3)), **arguments))


@pytest.mark.parametrize("whole_groups", [True, False])
def test_minibatches_are_disjoint_complete_and_repeatable(whole_groups):
    group_B = np.repeat(np.arange(10), 4)
    draw = [
        split_minibatches(group_B, 3, seed=1, step=2, epoch=epoch, whole_groups=whole_groups) for epoch in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])
    np.testing.assert_array_equal(np.sum(draw[0], axis=0), 1)
    if whole_groups:
        assert all(len(np.unique(group_B[keep])) * 4 == keep.sum() for keep in draw[0])


def test_nothing_to_pack_is_no_micro_batch():
    data = ragged(6, 2, 2, 6, 5)
    assert int(data.pack(shape_for(2, 2, 5), keep_B=np.zeros(4, bool)).count) == 0


def test_errors_say_what_to_do():
    data = ragged(7, 3, 4, 6, 9, lambda rng, B: np.full(B, 9))
    with pytest.raises(LossError, match="longest completion: got 8 for 9"):
        data.pack(PackShape(8, 4, 4, 5, 9))
    with pytest.raises(LossError, match="Raise micro_batches"):
        data.pack(PackShape(9, 4, 4, 5, 2))
    with pytest.raises(LossError, match="blocks must divide row_length=9: got 2"):
        PackShape(9, 4, 4, 5, 2, blocks=2)
    with pytest.raises(LossError, match=r"multiple of shards=4: got 6\. Use 8"):
        PackShape(9, 6, 4, 5, 2, shards=4)
    with pytest.raises(LossError, match="between 1 and the 3 groups"):
        split_minibatches(data.group_B, 4, seed=0, step=0, epoch=0)
    data.tokens_BT[5, 0] += 1
    with pytest.raises(LossError, match="sequence 5 differs from sequence 4 of group 1"):
        data.pack(PackShape(9, 4, 4, 5, 9))
    data.prompt_length_B[2] = 0
    with pytest.raises(LossError, match="sequence 2 has prompt_length 0"):
        data.pack(PackShape(9, 4, 4, 5, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage": np.ones(5, np.float32)}, "advantage must have shape"),
        ({"sampler_logp_BT": np.ones(6, np.float32)}, "logp_BT must have shape"),
        ({"loss_mask_BT": np.ones((6, 15), np.float32)}, "loss_mask_BT must be boolean"),
        ({"scored_B": np.ones(6, np.int32)}, "scored_B must be boolean"),
        ({"total_length_B": np.full(6, 99)}, "sequence 0 has prompt_length"),
    ],
)
def test_what_cannot_be_packed_is_named(change, message):
    data = replace(ragged(3, 3, 2, 6, 9), **change)
    with pytest.raises(LossError, match=message):
        data.pack(shape_for(3, 2, 9))
    with pytest.raises(LossError, match=message):
        data.pad(2)


def test_only_a_train_batch_is_packed():
    scored = ragged(3, 3, 2, 6, 9).train_batch().scored
    with pytest.raises(LossError, match="TrainBatch: got a Scored"):
        grpo_loss.pack(scored, shape=shape_for(3, 2, 9))  # pyright: ignore[reportArgumentType]
    with pytest.raises(LossError, match="keep_B must be boolean"):
        grpo_loss.pad(TrainBatch(scored, np.ones(6, np.float32)), rows=2, keep_B=np.arange(6))
    with pytest.raises(LossError, match="rows must be at least 1"):
        grpo_loss.pad(TrainBatch(scored, np.ones(6, np.float32)), rows=0)
