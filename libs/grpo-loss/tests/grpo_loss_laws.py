"""What the losses and advantages must satisfy, as checks of a module handed in, so that mutants can be checked too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from grpo_loss_plain import packed, padded, plain_policy_loss, random_sequences

CASES = [
    {},
    {"clip_low": 0.1, "clip_high": 0.3, "aggregation": "sequence-mean-token-mean"},
    {"dual_clip": 1.3, "aggregation": "fixed", "horizon": 11},
    {"kind": "gspo", "aggregation": "sequence-mean-token-mean"},
    {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1},
    {"kind": "gspo-token", "clip_low": 0.1, "clip_high": 0.1, "aggregation": "sequence-mean-token-sum"},
    {"kind": "cispo"},
    {"kind": "cispo", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "fixed", "horizon": 7},
    {"kind": "sapo"},
    {"kind": "reinforce", "aggregation": "sequence-mean-token-sum"},
    {"kl_coefficient": 0.3},
    {"kl_coefficient": 0.3, "kl": "k2", "aggregation": "sequence-mean-token-mean"},
    {"kl_coefficient": 0.3, "kl": "k1-straight-through"},
    {"kl_coefficient": 0.3, "kl": "k3-straight-through"},
    {"kl_coefficient": 0.3, "kl_ratio": True},
    {"entropy_coefficient": 0.2, "aggregation": "sequence-mean-token-mean"},
    {"weighted": True, "kl_coefficient": 0.3, "entropy_coefficient": 0.2},
    {"weighted": True, "dual_clip": 1.3, "aggregation": "sequence-mean-token-mean"},
    {"weighted": True, "kind": "gspo-token", "clip_low": 0.1, "clip_high": 0.1},
    {"weighted": True, "kind": "cispo"},
    {"weighted": True, "kind": "sapo"},
    {"weighted": True, "kind": "reinforce"},
    {"correction": "truncate", "correction_high": 1.2, "kl_coefficient": 0.3},
    {"correction": "mask", "correction_low": 0.7, "correction_high": 1.3},
    {"kind": "reinforce", "correction": "truncate", "correction_level": "sequence", "correction_low": 0.5},
    {"kind": "cispo", "correction": "mask", "correction_level": "sequence", "correction_high": 1.5},
]


def values(
    library,
    *,
    kind="ppo",
    sapo_temperatures=(),
    aggregation="token-mean",
    horizon=None,
    kl="k3",
    kl_coefficient=None,
    kl_ratio=False,
    entropy_coefficient=0.0,
    correction=None,
    **rest,
):
    """What the plain loops and the stored references are told, as the library's values."""
    bounds = {name: rest.pop(name) for name in ("clip_low", "clip_high", "dual_clip") if name in rest}
    limits = {name: rest.pop(f"correction_{name}") for name in ("high", "low", "level") if f"correction_{name}" in rest}
    assert not rest, f"unknown: {rest}"
    corrections = {"truncate": library.truncate, "mask": library.drop_outside}
    return {
        "objective": getattr(library, kind.replace("-", "_"))(*sapo_temperatures, **bounds),
        "aggregation": library.fixed(horizon) if horizon else getattr(library, aggregation.replace("-", "_")),
        "kl": None if kl_coefficient is None else library.KL(kl, kl_coefficient, ratio=kl_ratio),
        "entropy_coefficient": entropy_coefficient,
        "correction": None if correction is None else corrections[correction](**limits),
    }


def evaluate(library, sequences, layout, width=16, dtype=np.float64, weighted=False, **arguments):
    """The library's terms and its numerator's derivatives, taken back to one array a sequence."""
    arrays, mask, segment, place = layout(sequences, width)
    arrays = {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    compiled = _compiled(library, weighted, tuple(sorted(arguments.items())))
    gradients, terms = compiled(arrays, jnp.asarray(mask), None if segment is None else jnp.asarray(segment))
    by_logp, by_entropy = ([np.asarray(g)[row, span] for row, span in place] for g in gradients)
    outside = np.ones(mask.shape, bool)
    for row, span in place:
        outside[row, span] = False
    assert not np.asarray(gradients[0])[outside].any(), "a gradient reaches the padding"
    return terms, by_logp, by_entropy


@functools.cache
def _compiled(library, weighted, arguments):
    @jax.jit
    def compiled(arrays, mask, segment):
        def numerator(logp, entropy):
            terms = library.policy_loss(
                logp,
                old_logp_RT=arrays["old"],
                # Every objective is proportional to the advantage's size: a token's weight is a factor on it.
                advantage_RT=arrays["advantage"] * (arrays["weight"] if weighted else 1),
                mask_RT=mask,
                segment_RT=segment,
                reference_logp_RT=arrays["reference"],
                entropy_RT=entropy,
                sampler_logp_RT=arrays["sampler"],
                **values(library, **dict(arguments)),
            )
            return terms.numerator, terms

        return jax.grad(numerator, argnums=(0, 1), has_aux=True)(arrays["logp"], arrays["entropy"])

    return compiled


def close(actual, expected, rtol=1e-10, atol=1e-12):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), rtol=rtol, atol=atol)


def check_policy_loss(library, case):
    """Value, denominator, both gradients and the metrics equal the loops', packed; padded where it matters."""
    sequences = random_sequences(np.random.default_rng(7), 9, 12)
    plain = plain_policy_loss(sequences, **case)
    by_sequence = "gspo" in case.get("kind", "") or "aggregation" in case or "correction_level" in case
    for layout in (padded, packed) if by_sequence else (packed,):
        terms, by_logp, by_entropy = evaluate(library, sequences, layout, **case)
        close(terms.numerator, plain.numerator)
        close(terms.denominator, plain.denominator)
        close(np.concatenate(by_logp), np.concatenate(plain.by_logp))
        close(np.concatenate(by_entropy), np.concatenate(plain.by_entropy))
        close(terms.loss(), plain.numerator / plain.denominator)
        means = terms.means()
        for name in set(plain.sums) & set(means):
            close(means[name], plain.sums[name])


def check_metrics(library):
    """Means over counted tokens, and maxima, of what was given."""
    sequences = random_sequences(np.random.default_rng(3), 6, 9)
    everything = {
        name: np.concatenate([getattr(s, name)[s.mask] for s in sequences])
        for name in ("logp", "old", "sampler", "entropy")
    }
    means = evaluate(library, sequences, packed)[0].means()
    gap = np.abs(everything["old"] - everything["sampler"])
    ratio = np.exp(everything["logp"] - everything["old"])
    close(means["sampling_logp_difference/mean"], gap.mean())
    close(means["sampling_logp_difference/max"], gap.max())
    close(means["importance_ratio/max"], ratio.max())
    close(means["entropy"], everything["entropy"].mean())
    close(means["clip_ratio/region"], means["clip_ratio/low"] + means["clip_ratio/high"])


def check_adds_up(library):
    """Terms and gradients of parts, added, are those of the whole; an empty part adds nothing."""
    sequences = random_sequences(np.random.default_rng(5), 8, 10)
    arguments = {"kl_coefficient": 0.1, "entropy_coefficient": 0.1, "aggregation": "sequence-mean-token-mean"}
    whole, gradient, _ = evaluate(library, sequences, padded, **arguments)
    parts = [evaluate(library, sequences[a:b], packed, **arguments) for a, b in ((0, 1), (1, 2), (2, 5), (5, 8))]
    total = parts[0][0] + parts[1][0] + parts[2][0] + parts[3][0]
    close(total.loss(), whole.loss())
    for name, value in whole.means().items():
        close(total.means()[name], value)
    close(np.concatenate([g for part in parts for g in part[1]]), np.concatenate(gradient))


def check_first_update(library):
    """old_logp None is old_logp equal to logp: every ratio 1, the gradient REINFORCE's, for every kind with ratios."""
    sequences = random_sequences(np.random.default_rng(9), 5, 8)
    arrays, mask, _, _ = padded(sequences, 8)
    mask = jnp.asarray(mask)
    logp, advantage = jnp.asarray(arrays["logp"]), jnp.asarray(arrays["advantage"])

    def gradient(**arguments):
        old = arguments.pop("old")
        return jax.grad(
            lambda x: (
                library.policy_loss(
                    x, old_logp_RT=old, advantage_RT=advantage, mask_RT=mask, **values(library, **arguments)
                ).numerator
            )
        )(logp)

    expected = jnp.where(mask, -advantage, 0)
    for kind in ("ppo", "cispo", "sapo", "reinforce", "gspo", "gspo-token"):
        close(gradient(kind=kind, old=None), expected)
        close(gradient(kind=kind, old=logp), expected)
    close(gradient(clip_low=0.0, clip_high=0.0, old=None), expected)


def check_far_off_policy(library):
    """A ratio beyond float32 leaves every gradient finite, 0 for a clipped token, and the other tokens' as they are."""
    # An ordinary token; far above with either sign of the advantage; far below; the largest ratio without a bound.
    log_ratio = jnp.array([[0.1], [100.0], [100.0], [-100.0], [19.5]], jnp.float32)
    advantage = jnp.array([[1.0], [1.0], [-1.0], [1.0], [-1.0]], jnp.float32)
    kinds = ("ppo", "gspo", "gspo-token", "cispo", "sapo", "reinforce")
    cases = [{"kind": kind, "kl_coefficient": 0.1, "kl_ratio": ratio} for kind in kinds for ratio in (False, True)]
    cases.append({"dual_clip": 3.0})

    @jax.jit
    def gradients(log_ratio, advantage):
        def numerator(x, case):
            return library.policy_loss(
                x,
                old_logp_RT=jnp.zeros_like(x),
                advantage_RT=advantage,
                mask_RT=jnp.ones(x.shape, bool),
                reference_logp_RT=x,
                **values(library, **case),
            ).numerator

        return [jax.grad(lambda x, case=case: numerator(x, case))(log_ratio)[:, 0] for case in cases]

    all_together, all_alone = gradients(log_ratio, advantage), gradients(log_ratio[:1], advantage[:1])
    for case, together, alone in zip(cases, all_together, all_alone, strict=True):
        assert np.isfinite(together).all(), f"{case}: {together}"
        close(together[0], alone[0], rtol=1e-6)
        if case.get("kind") in ("ppo", "gspo", "gspo-token"):
            assert together[1] == 0, f"{case}: a clipped token has a gradient"
            close(together[4], np.exp(19.5), rtol=1e-6)
    assert all_together[-1][2] == 0, "the dual clip leaves a gradient"


def check_group_advantages(library):
    """Means and deviations over scored members only, groups of any size and order, exact zero without signal."""
    reward = np.array([1.0, 0.1, 5.0, 0.1, 3.0, 0.1, -2.0, 9.0, 4.0])
    group = np.array([4, -1, 4, -1, 4, -1, 7, 2, 7])
    scored = np.array([True, True, True, True, False, True, True, True, True])
    batch = reward[scored].std()
    expected = {
        "none": [-2.0, 0, 2.0, 0, 0, 0, -3.0, 0, 3.0],
        "population": [-1.0, 0, 1.0, 0, 0, 0, -1.0, 0, 1.0],
        "sample": [-np.sqrt(0.5), 0, np.sqrt(0.5), 0, 0, 0, -np.sqrt(0.5), 0, np.sqrt(0.5)],
        "batch": np.array([-2.0, 0, 2.0, 0, 0, 0, -3.0, 0, 3.0]) / batch,
    }
    for scale, values in expected.items():
        actual = library.group_advantage(reward, scored_B=scored, group_B=group, scale=scale, epsilon=0.0)
        close(actual, values)
        assert not np.asarray(actual)[np.asarray(values) == 0].any()
    for scale in ("sample", "population", "batch", "none"):
        equal = library.group_advantage(np.full(3, 0.1, np.float32), group_size=3, scale=scale, epsilon=1e-6)
        assert np.array_equal(np.asarray(equal), np.zeros(3)), "an all-equal group must give exactly zero"
    close(
        library.group_advantage(reward[:2], group_size=2, epsilon=0.5), np.array([0.45, -0.45]) / (np.sqrt(0.405) + 0.5)
    )
    rloo = library.rloo_advantage(
        np.array([1.0, 2.0, 6.0, 5.0]), scored_B=np.array([True, True, True, False]), group_size=4
    )
    close(rloo, [1 - 4.0, 2 - 3.5, 6 - 1.5, 0])
    keep = library.groups_with_signal(reward, scored_B=scored, group_B=group)
    assert np.asarray(keep).tolist() == [True, False, True, False, False, False, True, False, True]
    parts = library.moments(reward[:4], scored[:4]) + library.moments(reward[4:], scored[4:])
    close(parts.mean, reward[scored].mean())
    close(parts.variance(), reward[scored].var())
    equal = library.whiten(np.full(7, 0.1, np.float32), np.ones(7, bool))
    assert not np.asarray(equal).any(), "equal numbers must be whitened to exactly zero"
    close(
        library.group_advantage(reward[:4], scored_B=scored[:4], group_B=group[:4], scale="batch", batch_moments=parts),
        np.array([-2.0, 0, 2.0, 0]) / (batch + 1e-6),
    )


def check_other_advantages(library):
    """GDPO, whitening, the overlong penalty, returns and GAE against sums written out."""
    reward = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 0.0], [0.0, 3.0]])
    raw = library.gdpo_advantage(
        reward, np.array([1.0, 2.0]), group_size=2, scale="population", epsilon=0.0, whitened=False
    )
    close(raw, [-1.0, 1.0, -2.0, 2.0])
    scored = np.array([[True, True], [True, True], [False, True], [False, True]])
    white = library.gdpo_advantage(reward, np.array([1.0, 2.0]), scored_BN=scored, group_size=2, epsilon=1e-9)
    close(white, np.array([-1.0, 1.0, -2.0, 2.0]) / np.sqrt(2.5), rtol=1e-6)
    unscored = np.array([[True, True], [True, True], [False, False], [True, True]])
    part = library.gdpo_advantage(reward, np.array([1.0, 2.0]), scored_BN=unscored, group_size=2, epsilon=1e-9)
    close(part, np.array([-1, 1, 0, 0]) / np.sqrt(2 / 3), rtol=1e-6)
    close(
        library.overlong_penalty(np.array([1, 60, 70, 80, 100, 130]), max_tokens=100, buffer_tokens=40),
        [0, 0, -0.25, -0.5, -1, -1],
    )
    mask = np.array([[True, True, False, True, False], [True, False, False, False, False]])
    logp, reference = np.full((2, 5), -1.0), np.full((2, 5), -1.5)
    rewards = library.token_reward(
        np.array([2.0, 7.0]), mask, logp_BT=logp, reference_logp_BT=reference, kl_coefficient=0.1
    )
    close(rewards, [[-0.05, -0.05, 0, 1.95, 0], [6.95, 0, 0, 0, 0]])
    returns = library.reinforce_plus_plus_advantage(rewards, mask, discount=0.5, whitened=False)
    close(returns, [[-0.05 - 0.025 + 0.4875, -0.05 + 0.975, 0, 1.95, 0], [6.95, 0, 0, 0, 0]])
    values = np.asarray(returns)[mask]
    whitened = library.reinforce_plus_plus_advantage(rewards, mask, discount=0.5, epsilon=0.0)
    close(np.asarray(whitened)[mask], (values - values.mean()) / values.std())
    assert not np.asarray(whitened)[~mask].any()
    value = np.array([[0.5, 0.2, 9.0, 0.4, 9.0], [1.0, 9.0, 9.0, 9.0, 9.0]])
    advantage, target = library.gae(np.asarray(rewards), value, mask, discount=0.9, trace=0.8)
    last = 1.95 - 0.4
    second = -0.05 + 0.9 * 0.4 - 0.2 + 0.72 * last
    first = -0.05 + 0.9 * 0.2 - 0.5 + 0.72 * second
    close(advantage, [[first, second, 0, last, 0], [5.95, 0, 0, 0, 0]])
    close(target, [[first + 0.5, second + 0.2, 0, 1.95, 0], [6.95, 0, 0, 0, 0]])
    baseline = library.reinforce_plus_plus_baseline_advantage(
        np.array([1.0, 3.0]), mask, group_size=2, scored_B=np.array([True, True]), epsilon=0.0
    )
    tokens = np.array([-1.0, -1, -1, 1])
    close(np.asarray(baseline)[mask], (tokens - tokens.mean()) / tokens.std())


def check_token_masks(library):
    """The highest entropies of the batch, and no truncated completion."""
    mask = np.array([[True, True, True], [True, True, False]])
    entropy = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 5.0]])
    assert np.asarray(library.top_entropy_mask(entropy, mask, fraction=0.4)).tolist() == [
        [False, True, False],
        [True, False, False],
    ]
    assert np.asarray(library.drop_truncated(mask, np.array([True, False]))).tolist() == [
        [False] * 3,
        [True, True, False],
    ]


def check_kl_gradient_kinds(library):
    """Straight-through forms have their own value and k2's gradient; nothing flows to the reference."""
    logp, reference = jnp.array([-1.0, -2.0, -0.3]), jnp.array([-1.5, -1.0, -0.3])

    def both(kl):
        return jax.value_and_grad(lambda x, y: library.kl_estimate(x[None], y[None], kl).sum(), argnums=(0, 1))(
            logp, reference
        )

    d = np.asarray(logp - reference)
    for kl, value, slope in (
        ("k1", d, np.ones(3)),
        ("k2", d**2 / 2, d),
        ("k3", np.exp(-d) - 1 + d, 1 - np.exp(-d)),
        ("k1-straight-through", d, d),
        ("k3-straight-through", np.exp(-d) - 1 + d, d),
    ):
        actual, (by_logp, by_reference) = both(kl)
        close(actual, value.sum())
        close(by_logp, slope)
        assert not np.asarray(by_reference).any()


CHECKS = [
    check_metrics,
    check_adds_up,
    check_first_update,
    check_far_off_policy,
    check_group_advantages,
    check_other_advantages,
    check_token_masks,
    check_kl_gradient_kinds,
]
