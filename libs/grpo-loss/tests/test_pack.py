"""Packed rows hold every kept completion once, next to its own prompt, in the fewest rows that a group allows."""

import jax.numpy as jnp
import numpy as np
import pytest
from grpo_loss_ragged import ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_loss import LossError, PackShape, pack_tokens, split_minibatches, unpack_tokens


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
        if name != "data":
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


def test_tokens_go_into_rows_and_back():
    data = ragged(5, 4, 3, 6, 9)
    values_BT = np.random.default_rng(0).normal(size=data.tokens_BT.shape).astype(np.float32)
    batch = data.pack(shape_for(4, 3, 9)).with_tokens(value=values_BT).with_sequences(row=np.arange(12))
    source = batch.micro.source_RT
    packed = batch.micro.data["value"]
    np.testing.assert_array_equal(packed, np.asarray(pack_tokens(jnp.asarray(values_BT), jnp.asarray(source))))
    in_completion = np.arange(values_BT.shape[1]) >= data.prompt_length_B[:, None]
    in_completion &= np.arange(values_BT.shape[1]) < data.total_length_B[:, None]
    np.testing.assert_array_equal(unpack_tokens(packed, source, values_BT.shape), np.where(in_completion, values_BT, 0))
    np.testing.assert_array_equal(batch.micro.data["row"], np.maximum(batch.micro.sequence_RT, 0))


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
