"""Micro-batches of several sizes: the same loss, gradient and log-probabilities from fewer computed positions."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grpo_loss_ragged import ragged, toy_forward, toy_loss, toy_params, tree_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_loss import (
    LossError,
    MicroSize,
    PackShape,
    accumulate,
    computed_positions,
    init_state,
    make_score,
    make_update,
    unpack_tokens,
)


def shape_for(groups, group_size, longest, *, longest_prompt=6, rows=4, **sizes):
    return PackShape.for_rollout(
        sequences=groups * group_size,
        groups=groups,
        max_prompt_length=longest_prompt,
        max_new_tokens=max(1, longest),
        rows=rows,
        **sizes,
    )


def of_every_size(shape):
    """The shape with many sizes that its arrays hold."""
    step, shards = shape.blocks, shape.shards
    smaller = (
        MicroSize(rows, length, prompts, prompt)
        for rows in (shards, shape.rows)
        for length in range(step, shape.row_length + 1, 4 * step)
        for prompts in {shards, shape.prompts}
        for prompt in {1, shape.prompt_length}
    )
    return replace(shape, smaller=tuple(smaller), micro_batches=4 * shape.micro_batches)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 6),
    group_size=st.integers(1, 6),
    longest=st.integers(0, 20),
    shards=st.sampled_from([1, 2]),
    prompts_per_shard=st.integers(1, 3),
    slack=st.integers(0, 20),
    blocks=st.sampled_from([1, 2, 4]),
    kept=st.sampled_from([0.5, 1.0]),
)
def test_every_token_lies_inside_the_size_of_its_micro_batch(
    seed, groups, group_size, longest, shards, prompts_per_shard, slack, blocks, kept
):
    data = ragged(seed, groups, group_size, 6, longest)
    row_length = -(-(max(1, longest) + slack) // blocks) * blocks
    plain = shape_for(
        groups, group_size, longest, row_length=row_length, shards=shards, prompts=prompts_per_shard * shards,
        blocks=blocks,
    )  # fmt: skip
    keep_B = np.random.default_rng(seed).random(len(data.group_B)) < kept
    batch = data.pack(of_every_size(plain), keep_B=keep_B)
    micro, count = batch.micro, int(batch.count)
    # Every completion token of every kept sequence, exactly once.
    place_T = np.arange(data.tokens_BT.shape[1])
    wanted_BT = (place_T >= data.prompt_length_B[:, None]) & (place_T < data.total_length_B[:, None]) & keep_B[:, None]
    np.testing.assert_array_equal(np.sort(micro.source_RT[micro.source_RT >= 0]), np.flatnonzero(wanted_BT))
    assert not (micro.segment_RT[count:] > 0).any()
    for m, size in enumerate(batch.live_sizes):
        rows, slots = plain.rows // shards, plain.prompts // shards
        one_slot = size.prompts == shards
        block = size.row_length // (1 if one_slot else blocks)
        for r, t in zip(*np.nonzero(micro.segment_RT[m]), strict=True):
            assert r % rows < size.rows // shards
            assert t < size.row_length
            slot, b = int(micro.prompt_RC[m, r, t // block]), int(micro.sequence_RT[m, r, t])
            assert slot // slots == r // rows
            assert slot % slots < size.prompts // shards
            shared = data.prompt_length_B[b] - 1
            assert micro.prompt_length_P[m, slot] == shared <= size.prompt_length
            np.testing.assert_array_equal(micro.prompt_tokens_PT[m, slot, :shared], data.tokens_BT[b, :shared])
    # Fewer positions than with the largest size alone, up to what a micro-batch costs besides.
    alone = data.pack(plain, keep_B=keep_B)
    fixed = plain.largest.positions / 16
    assert batch.positions[0] + fixed * count <= alone.positions[0] + fixed * int(alone.count)


@pytest.mark.parametrize(
    ("dtype", "bound", "shards", "blocks"),
    [("float32", 1e-6, 2, 4), ("float64", 1e-12, 1, 1), ("float64", 1e-12, 2, 4)],
)
def test_loss_gradient_and_scores_are_those_of_one_size(dtype, bound, shards, blocks):
    with jax.enable_x64(dtype == "float64"):
        length_G = np.array([40, 12, 30, 5, 22, 40, 9])
        data = ragged(3, 7, 4, 9, 40, lambda rng, B: np.repeat(length_G, 4) - rng.integers(0, 5, B), getattr(np, dtype))
        sizes = {"rows": 8, "row_length": 80, "prompts": 4, "shards": shards, "blocks": blocks}
        plain = shape_for(7, 4, 40, longest_prompt=9, **sizes)
        smaller = (MicroSize(4, 48, 2, 8), MicroSize(6, 64, 4, 6))
        several = replace(plain, smaller=smaller, micro_batches=20)
        params, forward = toy_params(dtype), partial(toy_forward, shards=shards)
        results = []
        for batch in (data.pack(plain), data.pack(several)):
            gradient, terms = jax.jit(partial(accumulate, forward, toy_loss))(params, batch)
            logp_MRT, entropy_MRT = make_score(forward)(params, batch)
            back = [unpack_tokens(x, batch.micro.source_RT, data.tokens_BT.shape) for x in (logp_MRT, entropy_MRT)]
            results.append((gradient, terms.numerator, terms.denominator, terms.means(), *back))
        assert len(set(batch.live_sizes)) > 1
        assert tree_difference(*reversed(results)) <= bound


def test_one_program_serves_every_size():
    shape = shape_for(6, 4, 24, rows=4, row_length=48, blocks=2, sizes=3)
    update = make_update(toy_forward, toy_loss, optax.sgd(1e-2))
    state, seen = init_state(toy_params("float32"), optax.sgd(1e-2)), set()
    for seed in range(8):
        data = ragged(seed, 6, 4, 6, 24)
        batch = data.pack(shape, keep_B=data.group_B < 1 + seed % 6)
        state, metrics = update(state, jax.tree.map(jnp.asarray, batch))
        assert metrics["finite"] == 1
        seen |= set(batch.live_sizes)
    assert len(seen) > 1
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def gsm8k(seed, groups):
    """Completions like those of GSM8K: log-normal, mean 130, deviation 60, cut at 300; prompts of 70 to 150 tokens."""
    spread = np.sqrt(np.log(1 + (60 / 130) ** 2))

    def length_of(rng, B):
        return np.clip(np.exp(rng.normal(np.log(130) - spread**2 / 2, spread, B)).astype(int), 1, 300)

    data = ragged(seed, groups, 8, 150, 300, length_of)
    return data, np.random.default_rng(seed).integers(70, 151, groups)


@pytest.mark.parametrize(("groups", "rows"), [(4, 4), (8, 4), (8, 8)])
def test_at_most_a_fifth_more_than_needed_is_computed_on_lengths_like_those_of_gsm8k(groups, rows):
    totals = {}
    for sizes in (1, 5):
        shape = shape_for(groups, 8, 300, longest_prompt=256, rows=rows, row_length=600, blocks=4, sizes=sizes)
        parts = []
        for seed in range(12):
            data, prompt_P = gsm8k(seed, groups)
            # Longer prompts in front of the same completions.
            more_B = np.repeat(prompt_P, 8) - data.prompt_length_B
            data = _with_longer_prompts(data, more_B)
            parts.append(computed_positions(data.pack(shape), vocabulary=49_152))
        totals[sizes] = {name: np.sum([part[name] for part in parts], axis=0) for name in ("rows", "prompts", "head")}
    ratio = {
        sizes: (total["rows"] + total["prompts"])[0] / (total["rows"] + total["prompts"])[1]
        for sizes, total in totals.items()
    }
    print(f"{groups} groups, {rows} rows: " + ", ".join(f"{n} sizes {value:.3f}" for n, value in ratio.items()))
    assert ratio[5] <= 1.2 < ratio[1]


def _with_longer_prompts(data, more_B):
    """The same completions after prompts that are `more_B` tokens longer (or shorter)."""
    prompt_length_B = data.prompt_length_B + more_B
    B, T = data.tokens_BT.shape
    tokens_BT, mask_BT = np.ones((B, T), np.int32), np.zeros((B, T), bool)
    total_length_B = data.total_length_B + more_B
    place_T = np.arange(T)
    mask_BT = (place_T >= prompt_length_B[:, None]) & (place_T < total_length_B[:, None])
    return replace(
        data,
        tokens_BT=tokens_BT,
        prompt_length_B=prompt_length_B,
        total_length_B=total_length_B,
        loss_mask_BT=mask_BT,
    )


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("sizes", [1, 5])
def test_computed_positions_are_counted_one_by_one(shards, sizes):
    data = ragged(2, 5, 4, 6, 30)
    shape = shape_for(5, 4, 30, rows=4, row_length=64, prompts=4, shards=shards, sizes=sizes)
    batch = data.pack(shape)
    micro, found = batch.micro, computed_positions(batch, vocabulary=24)
    rows, prompts, head = [0, 0], [0, 0], [0, 0]
    seen = set()
    for m in range(int(batch.count)):
        size = shape.largest if batch.size_M is None else batch.sizes[batch.size_M[m]]
        rows[0] += size.rows * size.row_length
        prompts[0] += size.prompts * size.prompt_length
        head[0] += size.rows * size.row_length  # one chunk: fewer than 512 tokens a shard
        rows[1] += int((micro.segment_RT[m] > 0).sum())
        head[1] += int(micro.mask_RT[m].sum())
        seen |= {int(data.group_B[b]) for b in np.unique(micro.sequence_RT[m]) if b >= 0}
    prompts[1] = sum(int(data.prompt_length_B[data.group_B == group][0]) - 1 for group in seen)
    assert found == {"rows": tuple(rows), "prompts": tuple(prompts), "head": tuple(head)}
    assert batch.positions[0] == rows[0] + prompts[0]
    assert batch.fill == pytest.approx(rows[1] / rows[0])


def test_head_positions_are_whole_chunks():
    data = ragged(2, 1, 3, 6, 600, lambda rng, B: np.array([500, 300, 10]))
    data = replace(data, loss_mask_BT=data.loss_mask_BT | (data.loss_mask_BT.cumsum(1) > 0))
    batch = data.pack(PackShape(row_length=600, rows=3, prompts=1, prompt_length=5, micro_batches=1))
    live = int(batch.micro.mask_RT.sum())
    # 1,800 positions are two chunks of 1,024 where a chunk has at most 1,280: 2**26 logits of 49,152.
    assert computed_positions(batch, vocabulary=49_152)["head"] == (1024, live)
    assert live <= 1024
    assert computed_positions(batch, vocabulary=49_152, chunk=400)["head"] == (-(-live // 400) * 400, live)
    assert computed_positions(batch, vocabulary=49_152, chunk=5000)["head"] == (1800, live)


def full_rows(rows_G, length):
    """Groups whose completions take one whole row each, after prompts of the same length."""
    size = max(rows_G)
    data = ragged(0, len(rows_G), size, 6, length, lambda rng, B: np.full(B, length))
    data = _with_longer_prompts(data, 6 - data.prompt_length_B)
    return data, np.arange(size)[None, :].repeat(len(rows_G), 0).ravel() < np.repeat(rows_G, size)


def test_groups_that_just_fit_are_spread_over_shards():
    """One shard after the other, 5 + 4 and 3 + 3 + 3 rows leave no ten rows for the last group."""
    data, keep_B = full_rows([5, 4, 3, 3, 3, 2], 8)
    shape = PackShape(row_length=8, rows=40, prompts=12, prompt_length=5, micro_batches=8, shards=2)
    batch = data.pack(replace(shape, smaller=(MicroSize(20, 8, 12, 5),)), keep_B=keep_B)
    assert batch.live_sizes == [MicroSize(20, 8, 12, 5)]


def test_the_first_micro_batch_is_chosen_for_what_it_leaves():
    """The largest one holds groups of 6, 5 and 1 without a hole, but then the last takes as much as the first alone."""
    data, keep_B = full_rows([6, 5, 5, 1], 8)
    largest, middle, small = (MicroSize(rows, 8, 4, 5) for rows in (12, 11, 6))
    shape = PackShape(8, 12, 4, 5, micro_batches=8, smaller=(middle, small))
    assert sorted(data.pack(shape, keep_B=keep_B).live_sizes) == [small, middle]
    assert data.pack(replace(shape, smaller=(small,)), keep_B=keep_B).live_sizes == [largest, small]


def test_a_step_of_short_completions_computes_a_quarter_of_many_rows():
    """16 rows a shard are room for completions at their limit of 1,024 tokens; these have 190, four to a row of 768."""
    data = ragged(1, 16, 8, 150, 1024, lambda rng, B: np.full(B, 190))
    for sizes, positions in ((1, 128 * 1024), (3, 40 * 768)):
        shape = shape_for(16, 8, 1024, longest_prompt=200, rows=128, row_length=1024, shards=8, sizes=sizes)
        batch = data.pack(shape)
        assert batch.count == 1
        assert computed_positions(batch, vocabulary=50)["rows"] == (positions, 16 * 8 * 190)


def test_empty_completions_lose_no_others():
    data = ragged(0, 3, 1, 6, 5, lambda rng, B: np.array([5, 0, 4]))
    shape = PackShape(row_length=5, rows=1, prompts=1, prompt_length=5, micro_batches=6)
    batch = data.pack(replace(shape, smaller=(MicroSize(1, 4, 1, 5),)))
    assert int((batch.micro.source_RT >= 0).sum()) == 9


def test_a_micro_batch_has_no_more_prompt_slots_than_a_rollout_has_prompts():
    for groups, shards, slots in ((16, 8, 16), (17, 8, 24), (64, 8, 64), (200, 8, 64), (1, 1, 1)):
        assert shape_for(groups, 2, 8, rows=16 * shards, shards=shards).prompts == min(slots, 8 * shards)


def test_sizes_that_cannot_be_are_refused():
    plain = PackShape(row_length=16, rows=4, prompts=2, prompt_length=5, micro_batches=3, shards=2, blocks=4)
    for wrong in ((6, 16, 2, 5), (4, 16, 2, 6), (4, 10, 2, 5), (3, 16, 2, 5), (4, 16, 1, 5), (4, 0, 2, 5)):
        with pytest.raises(LossError, match=r"PackShape\.smaller must hold sizes of at most"):
            replace(plain, smaller=(MicroSize(*wrong),))
    for sizes in (0, 8):
        with pytest.raises(LossError, match=f"sizes must be between 1 and 7: got {sizes}"):
            shape_for(2, 2, 9, sizes=sizes)
