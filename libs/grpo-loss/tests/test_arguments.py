"""What a function cannot mean is refused in the library's own words; numpy, lists and jax arrays are taken alike."""

# Arguments of wrong types are what these tests are about.
# pyright: reportArgumentType=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_loss import (
    KL,
    LossError,
    aggregate,
    cispo,
    drop_truncated,
    fixed,
    gae,
    gdpo_advantage,
    group_advantage,
    groups_with_signal,
    gspo,
    gspo_token,
    init_state,
    kl_estimate,
    make_update,
    moments,
    overlong_penalty,
    pack_tokens,
    policy_loss,
    ppo,
    reinforce,
    reinforce_plus_plus_advantage,
    reinforce_plus_plus_baseline_advantage,
    rloo_advantage,
    sapo,
    split_minibatches,
    token_logp,
    token_reward,
    top_entropy_mask,
    truncate,
    unpack_tokens,
    whiten,
)

NAN = float("nan")
REWARD_B = [1.0, 0.0, 0.0, 1.0]
X_RT = np.array([[0.5, -1.0, 2.0], [0.1, 0.2, 0.3]], np.float32)
MASK_RT = np.array([[True, True, False], [True, True, True]])
HIDDEN_RTD = np.ones((2, 3, 4), np.float32)
UNEMBED_VD = np.ones((11, 4), np.float32)
TARGET_RT = np.ones((2, 3), np.int32)
SOURCE_RT = np.array([[0, 1, -1], [3, 4, 5]])


def loss(logp_RT=X_RT, old_logp_RT=X_RT, advantage_RT=X_RT, mask_RT=MASK_RT, **options):
    return policy_loss(logp_RT, old_logp_RT=old_logp_RT, advantage_RT=advantage_RT, mask_RT=mask_RT, **options).loss()


REFUSED = {
    "reward: text": lambda: group_advantage("abc", group_size=3),
    "reward: None": lambda: group_advantage([1, None, 0, 1], group_size=2),
    "reward: NaN": lambda: group_advantage([1, NAN, 0, 1], group_size=2),
    "reward: complex": lambda: rloo_advantage([1j, 0, 0, 1], group_size=2),
    "reward: ragged": lambda: group_advantage([[1, 0], [1]], group_size=2),
    "reward: two axes": lambda: groups_with_signal([[1, 0], [0, 1]], group_size=2),
    "group_size: a float": lambda: group_advantage(REWARD_B, group_size=2.0),
    "group_size: True": lambda: group_advantage(REWARD_B, group_size=True),
    "group_B: floats": lambda: group_advantage(REWARD_B, group_B=[0.0, 0.0, 1.5, 1.0]),
    "scored_B: integers": lambda: group_advantage(REWARD_B, group_size=2, scored_B=[1, 1, 0, 0]),
    "scored_B: floats": lambda: group_advantage(REWARD_B, group_size=2, scored_B=[1.0, 0.5, 0.0, 0.0]),
    "epsilon: negative": lambda: group_advantage(REWARD_B, group_size=2, epsilon=-1.0),
    "epsilon: NaN": lambda: whiten(X_RT, MASK_RT, epsilon=NAN),
    "batch_moments: a number": lambda: group_advantage(REWARD_B, group_size=2, scale="batch", batch_moments=3),
    "weight_N: NaN": lambda: gdpo_advantage([[1, 0], [0, 1]], [NAN, 1], group_size=2),
    "weight_N: too many": lambda: gdpo_advantage([[1, 0], [0, 1]], [1, 1, 1], group_size=2),
    "length_B: floats": lambda: overlong_penalty([1.5, 2], max_tokens=4, buffer_tokens=2),
    "length_B: text": lambda: overlong_penalty(["a"], max_tokens=4, buffer_tokens=2),
    "max_tokens: None": lambda: overlong_penalty([1], max_tokens=None, buffer_tokens=2),
    "target: outside": lambda: token_logp(HIDDEN_RTD, UNEMBED_VD, TARGET_RT * 99),
    "target: negative": lambda: token_logp(HIDDEN_RTD, UNEMBED_VD, -TARGET_RT),
    "target: floats": lambda: token_logp(HIDDEN_RTD, UNEMBED_VD, TARGET_RT * 1.0),
    "hidden: two axes": lambda: token_logp(HIDDEN_RTD[0], UNEMBED_VD, TARGET_RT),
    "hidden: integers": lambda: token_logp(HIDDEN_RTD.astype(int), UNEMBED_VD, TARGET_RT),
    "unembedding: transposed": lambda: token_logp(HIDDEN_RTD, UNEMBED_VD.T, TARGET_RT),
    "mask: floats": lambda: loss(mask_RT=MASK_RT * 0.5),
    "mask: another shape": lambda: loss(mask_RT=MASK_RT[:1]),
    "advantage: one axis": lambda: loss(advantage_RT=X_RT[:, 0]),
    "logp: one axis": lambda: loss(*[X_RT[0]] * 3, mask_RT=MASK_RT[0]),
    "logp: text": lambda: loss(logp_RT="logp"),
    "entropy_coefficient: text": lambda: loss(entropy_coefficient="1"),
    "objective: a name": lambda: loss(objective="ppo"),
    "objective: not called": lambda: loss(objective=ppo),
    "clip_low: text": lambda: ppo("a", 0.2),
    "clip_low: NaN": lambda: ppo(NAN, 0.2),
    "clip_low: None": lambda: gspo(None, 0.2),
    "temperature: 0": lambda: sapo(0.0),
    "horizon: 0": lambda: fixed(0),
    "high: text": lambda: truncate("2"),
    "range: without 1": lambda: truncate(high=0.5),
    "kl coefficient: NaN": lambda: KL("k3", NAN),
    "kl coefficient: text": lambda: KL("k3", "0.1"),
    "kl: shapes that would broadcast": lambda: kl_estimate(X_RT, X_RT[:1]),
    "aggregate: float mask": lambda: aggregate(X_RT, MASK_RT * 1.0),
    "whiten: float mask": lambda: whiten(X_RT, MASK_RT * 1.0),
    "whiten: NaN": lambda: whiten(X_RT * NAN, MASK_RT),
    "moments: shapes that would broadcast": lambda: moments(X_RT, MASK_RT[:1]),
    "top entropy: 0": lambda: top_entropy_mask(X_RT, MASK_RT, fraction=0.0),
    "top entropy: float mask": lambda: top_entropy_mask(X_RT, MASK_RT * 1.0, fraction=0.5),
    "truncated: floats": lambda: drop_truncated(MASK_RT, [0.0, 1.0]),
    "token reward: wrong rows": lambda: token_reward([1, 2, 3], MASK_RT),
    "token reward: float mask": lambda: token_reward([1, 2], MASK_RT * 1.0),
    "gae: float mask": lambda: gae(X_RT, X_RT, MASK_RT * 1.0),
    "gae: discount above 1": lambda: gae(X_RT, X_RT, MASK_RT, discount=1.5),
    "reinforce++: text": lambda: reinforce_plus_plus_advantage("ab", MASK_RT),
    "reinforce++-baseline: NaN": lambda: reinforce_plus_plus_baseline_advantage([NAN, 1], MASK_RT, group_size=2),
    "minibatches: a float": lambda: split_minibatches([0, 0, 1, 1], 1.5, seed=0, step=0, epoch=0),
    "minibatches: a negative seed": lambda: split_minibatches([0, 0, 1, 1], 2, seed=-1, step=0, epoch=0),
    "minibatches: float groups": lambda: split_minibatches([0.5, 0.5], 1, seed=0, step=0, epoch=0),
    "pack_tokens: too short": lambda: pack_tokens(np.ones(4), SOURCE_RT),
    "pack_tokens: float indices": lambda: pack_tokens(np.ones(6), SOURCE_RT * 1.0),
    "unpack_tokens: too small": lambda: unpack_tokens(np.ones((2, 3)), SOURCE_RT, (2, 2)),
    "unpack_tokens: another shape": lambda: unpack_tokens(np.ones((2, 2)), SOURCE_RT, (2, 3)),
    "state: of integers": lambda: init_state({"a": jnp.ones(3, int)}, None),
    "update: max_grad_norm 0": lambda: make_update(None, None, None, max_grad_norm=0),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_meant_is_refused(how):
    with pytest.raises(LossError) as caught:
        REFUSED[how]()
    assert len(str(caught.value)) < 500


# Functions of an argument whose values only the device knows inside `jit`, one that cannot be, and what is said of it.
KNOWN_OUTSIDE_JIT = {
    "target": (lambda x: token_logp(HIDDEN_RTD, UNEMBED_VD, x), TARGET_RT * 99, r"got 99 at \[0, 0\]"),
    "reward": (lambda x: group_advantage(x, group_size=2), np.array([1, NAN, 0, 1], np.float32), "reward"),
    "reward of rloo": (lambda x: rloo_advantage(x, group_size=2), np.array([1, NAN, 0, 1], np.float32), "reward"),
    "weight": (lambda x: gdpo_advantage([[1, 0], [0, 1]], x, group_size=2), np.array([NAN, 1], np.float32), "weight_N"),
    "value": (lambda x: whiten(x, MASK_RT), X_RT * np.float32(NAN), "finite"),
    "source": (lambda x: pack_tokens(np.ones(4), x), SOURCE_RT, "must index the 4 values of array_BT: got 5"),
}


@pytest.mark.parametrize("name", KNOWN_OUTSIDE_JIT)
def test_what_passes_inside_jit_is_found_without_it(name):
    function, argument, words = KNOWN_OUTSIDE_JIT[name]
    jitted = jax.jit(function)
    jax.block_until_ready(jitted(argument))
    with jax.disable_jit(), pytest.raises(LossError, match=words):
        jitted(argument)


TAKEN = {
    "group_advantage": lambda a: group_advantage(a(REWARD_B), scored_B=a([True] * 4), group_B=a([0, 0, 1, 1])),
    "booleans as rewards": lambda a: group_advantage(a([True, False, False, True]), group_size=2),
    "gdpo_advantage": lambda a: gdpo_advantage(a([[1.0, 0.0], [0.0, 1.0]]), a([1.0, 0.5]), group_size=2),
    "overlong_penalty": lambda a: overlong_penalty(a([1, 3]), max_tokens=4, buffer_tokens=2),
    "token_logp": lambda a: token_logp(a(HIDDEN_RTD), a(UNEMBED_VD), a(TARGET_RT), mask_RT=a(MASK_RT)),
    "policy_loss": lambda a: loss(
        *map(a, (X_RT, X_RT - 0.1, X_RT, MASK_RT)), reference_logp_RT=a(X_RT), kl=KL("k3", 1)
    ),
    "kl_estimate": lambda a: kl_estimate(a(X_RT), a(X_RT + 1)),
    "aggregate": lambda a: aggregate(a(X_RT), a(MASK_RT)),
    "whiten": lambda a: whiten(a(X_RT), a(MASK_RT)),
    "top_entropy_mask": lambda a: top_entropy_mask(a(X_RT), a(MASK_RT), fraction=0.5),
    "drop_truncated": lambda a: drop_truncated(a(MASK_RT), a([True, False])),
    "gae": lambda a: gae(a(X_RT), a(X_RT), a(MASK_RT)),
    "token_reward": lambda a: token_reward(
        a([1.0, 2.0]), a(MASK_RT), logp_BT=a(X_RT), reference_logp_BT=a(X_RT), kl_coefficient=0.1
    ),
    "pack_tokens": lambda a: pack_tokens(a(np.arange(6.0, dtype=np.float32)), a(SOURCE_RT)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_numpy_lists_and_jax_arrays_are_taken_alike(name):
    given = [TAKEN[name](kind) for kind in (np.asarray, jnp.asarray, lambda value: np.asarray(value).tolist())]
    first, *others = ([np.asarray(leaf) for leaf in jax.tree.leaves(result)] for result in given)
    for other in others:
        for one, same in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, same)


OBJECTIVES = {
    "ppo": ppo(0.2, 0.2),
    "dual clip": ppo(0.2, 0.2, dual_clip=3.0),
    "gspo": gspo(0.2, 0.2),
    "gspo_token": gspo_token(0.2, 0.2),
    "cispo": cispo(),
    "sapo": sapo(),
    "reinforce": reinforce(),
}


def gradient(objective, gap, advantage):
    """Of the loss where the log-probability of every token has grown by `gap` nats."""

    def of(logp_RT):
        return loss(logp_RT, X_RT - gap, np.full_like(X_RT, advantage), objective=OBJECTIVES[objective])

    return np.asarray(jax.grad(of)(jnp.asarray(X_RT)))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gap", [-1000.0, -100.0, 100.0, 1000.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_ratio_beyond_all_bounds_gives_no_nan(objective, gap, advantage):
    assert not np.isnan(gradient(objective, gap, advantage)).any()


@pytest.mark.parametrize("objective", ["ppo", "dual clip", "gspo", "gspo_token"])
@pytest.mark.parametrize(("gap", "advantage"), [(100.0, 1.0), (-100.0, -1.0), (1000.0, 1.0)])
def test_a_clipped_token_has_no_gradient(objective, gap, advantage):
    assert not gradient(objective, gap, advantage).any()
