"""Exact audit of every estimator: the expectation of its gradient, by enumeration, beside the gradient it claims.

The policy is a table: logits for every prefix, 4 tokens of which the last one stops, at most 3 tokens; 40 sequences in
all, each with a reward. Every group of samples that can occur is drawn once and weighted by its probability, so bias
and variance below are exact up to float64 rounding. Run this file to print the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from grpo_loss_laws import values
from jax.typing import ArrayLike

VOCABULARY, LONGEST, STOP, GROUP = 4, 3, 3, 2


def _enumerate():
    sequences: list[tuple[int, ...]] = []
    frontier: list[tuple[int, ...]] = [()]
    while frontier:
        prefix = frontier.pop(0)
        for token in range(VOCABULARY):
            longer = (*prefix, token)
            (sequences if token == STOP or len(longer) == LONGEST else frontier).append(longer)
    prefixes = sorted({s[:t] for s in sequences for t in range(len(s))})
    token_NT = np.zeros((len(sequences), LONGEST), np.int32)
    prefix_NT, mask_NT = np.zeros_like(token_NT), np.zeros(token_NT.shape, bool)
    for n, s in enumerate(sequences):
        for t in range(len(s)):
            token_NT[n, t], prefix_NT[n, t], mask_NT[n, t] = s[t], prefixes.index(s[:t]), True
    return token_NT, prefix_NT, mask_NT, len(prefixes)


TOKEN_NT, PREFIX_NT, MASK_NT, PREFIXES = _enumerate()
SEQUENCES = len(TOKEN_NT)
LENGTH_N = MASK_NT.sum(axis=1)
_RNG = np.random.default_rng(0)
POLICY, OLD, REFERENCE = (_RNG.normal(0, 1, (PREFIXES, VOCABULARY)) for _ in range(3))
OLD = POLICY + 0.4 * OLD
REWARD_N = _RNG.normal(0.3, 1, SEQUENCES) + 0.3 * LENGTH_N
TUPLE_MG = np.stack(np.meshgrid(*[np.arange(SEQUENCES)] * GROUP, indexing="ij"), -1).reshape(-1, GROUP)


def logp_of(logits):
    """Log-probability of every token of every sequence, 0 in the padding."""
    return jnp.where(MASK_NT, jax.nn.log_softmax(logits)[PREFIX_NT, TOKEN_NT], 0)


def entropy_of(logits):
    """Entropy at every token of every sequence."""
    logp = jax.nn.log_softmax(logits)
    return jnp.where(MASK_NT, -(jnp.exp(logp) * logp).sum(-1)[PREFIX_NT], 0)


def probability_of(logits):
    return jnp.exp(logp_of(logits).sum(axis=1))


def reward_gradient():
    """Gradient of the expected reward."""
    return jax.grad(lambda logits: probability_of(logits) @ REWARD_N)(POLICY)


def weighted_score(weight_N, sampler=POLICY):
    """sum over x of sampler(x) weight(x) grad log policy(x)."""
    return jax.grad(lambda logits: (probability_of(sampler) * weight_N) @ logp_of(logits).sum(axis=1))(POLICY)


def weighted_tokens(weight_NT, sampler=POLICY):
    """sum over x of sampler(x) sum over t of weight(x, t) grad log policy(x_t)."""
    return jax.grad(lambda logits: (probability_of(sampler)[:, None] * weight_NT * logp_of(logits)).sum())(POLICY)


def per_prefix(divergence, sampler=POLICY):
    """Gradient of a function of (logp, reference logp) at every visited prefix, visits held at the sampler's."""

    def total(logits):
        at_prefix = divergence(jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE))
        return (probability_of(sampler)[:, None] * jnp.where(MASK_NT, at_prefix[PREFIX_NT], 0)).sum()

    return jax.grad(total)(POLICY)


def group_tokens(weight_MGT):
    """sum over groups of their probability × sum of weight(group, sample, t) grad log policy(x_t)."""
    probability_M = np.asarray(probability_of(POLICY))[TUPLE_MG].prod(axis=1)
    weight_NT = np.zeros(MASK_NT.shape)
    np.add.at(weight_NT, TUPLE_MG.reshape(-1), (probability_M[:, None, None] * weight_MGT).reshape(-1, LONGEST))
    return jax.grad(lambda logits: (weight_NT * logp_of(logits)).sum())(POLICY)


def normalised(value_MG, ddof):
    """Minus the mean of the group, over its deviation; 0 where all are equal."""
    centred_MG = value_MG - value_MG.mean(axis=1, keepdims=True)
    scaled_MG = centred_MG / (value_MG.std(axis=1, ddof=ddof, keepdims=True) + 1e-6)
    return np.where(np.ptp(value_MG, axis=1, keepdims=True) > 0, scaled_MG, 0)


def whitened_tokens(value_MG):
    """Every token with its sequence's value, whitened over the tokens of the group, and divided by their number."""
    mask_MGT = MASK_NT[TUPLE_MG]
    tokens_M = mask_MGT.sum(axis=(1, 2), keepdims=True)
    varied_M = np.ptp(value_MG, axis=1)[:, None, None] > 0
    value_MGT = np.where(mask_MGT, value_MG[:, :, None], 0)
    mean_M = value_MGT.sum(axis=(1, 2), keepdims=True) / tokens_M
    gap_MGT = np.where(mask_MGT & varied_M, value_MGT - mean_M, 0)
    return gap_MGT / (np.sqrt((gap_MGT**2).sum(axis=(1, 2), keepdims=True) / tokens_M) + 1e-6) / tokens_M


def effective_reward(advantage_MG):
    """E[advantage of a sample | the sample]: the reward that a group estimator acts on."""
    probability_N = np.asarray(probability_of(POLICY))
    effective_N = np.zeros(SEQUENCES)
    np.add.at(effective_N, TUPLE_MG[:, 0], probability_N[TUPLE_MG[:, 1:]].prod(axis=1) * advantage_MG[:, 0])
    return effective_N


@dataclass(frozen=True)
class Estimator:
    """A published estimator, what its documentation says it expects, and the arguments that make it.

    Attributes:
        advantage: (rewards of a group [G], masks [G, T], sequence numbers [G]) -> advantages [G, T].
        loss: arguments of `grpo_loss_laws.values`, and which arrays `policy_loss` is given.
        target: the claimed expectation of minus the loss's gradient.
        claim: the same in words.
        sampler: logits that the group is drawn from.
        old: logits of old_logp; None: none is given.
    """

    name: str
    advantage: Callable[..., jax.Array]
    loss: dict[str, Any]
    target: ArrayLike
    claim: str
    sampler: np.ndarray | None = None
    old: np.ndarray | None = None


def expectation(library, estimator):
    """Exact mean and total variance of an estimator's descent direction over all groups."""
    sampler = POLICY if estimator.sampler is None else estimator.sampler
    loss = dict(estimator.loss)
    needs = {name: loss.pop(name, False) for name in ("reference", "entropy", "from_sampler")}

    def direction(tuple_G):
        mask = jnp.asarray(MASK_NT)[tuple_G]
        advantage = estimator.advantage(library, jnp.asarray(REWARD_N)[tuple_G], mask, tuple_G)

        def objective(logits):
            terms = library.policy_loss(
                logp_of(logits)[tuple_G],
                old_logp_RT=None if estimator.old is None else logp_of(estimator.old)[tuple_G],
                advantage_RT=jnp.broadcast_to(advantage, mask.shape),
                mask_RT=mask,
                reference_logp_RT=logp_of(REFERENCE)[tuple_G] if needs["reference"] else None,
                entropy_RT=entropy_of(logits)[tuple_G] if needs["entropy"] else None,
                sampler_logp_RT=logp_of(sampler)[tuple_G] if needs["from_sampler"] else None,
                **values(library, **loss),
            )
            return -terms.loss()

        return jax.grad(objective)(POLICY)

    probability_M = jnp.prod(probability_of(sampler)[TUPLE_MG], axis=1)
    direction_M = jax.jit(jax.vmap(direction))(jnp.asarray(TUPLE_MG)).reshape(len(TUPLE_MG), -1)
    mean = probability_M @ direction_M
    variance = probability_M @ jnp.square(direction_M).sum(axis=1) - jnp.square(mean).sum()
    return np.asarray(mean).reshape(POLICY.shape), float(variance)


def _column(function):
    return lambda library, reward, mask, tuple_G: function(library, reward)[:, None]


def _raw(library, reward, mask, tuple_G):
    return reward[:, None]


def _none(library, reward, mask, tuple_G):
    return jnp.zeros((GROUP, 1))


def _values():
    """Expected reward before each token, exactly."""
    probability_N, visit = np.asarray(probability_of(POLICY)), {}
    for n in range(SEQUENCES):
        for t in range(LENGTH_N[n]):
            weight, total = visit.get(PREFIX_NT[n, t], (0.0, 0.0))
            visit[PREFIX_NT[n, t]] = (weight + probability_N[n], total + probability_N[n] * REWARD_N[n])
    return np.array([visit[p][1] / visit[p][0] for p in range(PREFIXES)])[PREFIX_NT]


def _grpo_effective(scale):
    return effective_reward(normalised(REWARD_N[TUPLE_MG], ddof=1 if scale == "sample" else 0))


def _token_mean(weight_N):
    """E[sum of weight × score over the group / tokens of the group]."""
    probability_N = np.asarray(probability_of(POLICY))
    share_N = (probability_N[None] / (LENGTH_N[:, None] + LENGTH_N[None])).sum(axis=1) * GROUP
    return weighted_score(weight_N * share_N)


SUM = {"aggregation": "sequence-mean-token-sum"}
MEAN = {"aggregation": "sequence-mean-token-mean"}
WIDE = {"clip_low": 1.0, "clip_high": 1e6}


def estimators():
    """Every estimator of the library with its claim."""
    grad = reward_gradient()
    clean = {"sampler": OLD, "old": OLD}
    ratio_NT = np.exp(np.asarray(logp_of(POLICY) - logp_of(OLD)))
    whole_N = ratio_NT.prod(axis=1)
    mean_ratio_N = whole_N ** (1 / LENGTH_N)
    reward_NT = np.broadcast_to(REWARD_N[:, None], MASK_NT.shape)
    positive_NT = reward_NT > 0
    unclipped_NT = np.where(positive_NT, ratio_NT <= 1.2, ratio_NT >= 0.8)
    dual_NT = unclipped_NT & (positive_NT | (ratio_NT <= 1.25))
    open_N = np.where(REWARD_N > 0, mean_ratio_N <= 1.1, mean_ratio_N >= 0.9)
    heat_NT = np.where(positive_NT, 1.0, 1.05)
    gate_NT = 1 / (1 + np.exp(-heat_NT * (ratio_NT - 1)))
    reverse = per_prefix(lambda p, q: (jnp.exp(p) * (p - q)).sum(-1))
    reverse_old = per_prefix(lambda p, q: (jnp.exp(p) * (p - q)).sum(-1), OLD)
    forward = per_prefix(lambda p, q: (jnp.exp(q) * (q - p)).sum(-1))
    entropy = per_prefix(lambda p, q: -(jnp.exp(p) * p).sum(-1))

    def kl_objective(logits):
        gap_N = (logp_of(logits) - logp_of(REFERENCE)).sum(axis=1)
        return probability_of(logits) @ (REWARD_N - 0.5 * gap_N)

    def penalised(library, reward, mask, tuple_G):
        logp, reference = logp_of(POLICY)[tuple_G], logp_of(REFERENCE)[tuple_G]
        tokens = library.token_reward(reward, mask, logp_BT=logp, reference_logp_BT=reference, kl_coefficient=0.5)
        return library.rloo_advantage(tokens.sum(axis=1), group_size=GROUP)[:, None]

    def traced(trace):
        def advantage(library, reward, mask, tuple_G):
            return library.gae(library.token_reward(reward, mask), jnp.asarray(VALUE_NT)[tuple_G], mask, trace=trace)[0]

        return advantage

    VALUE_NT = _values()
    plain, rloo = {"kind": "reinforce", **SUM}, _column(lambda lib, r: lib.rloo_advantage(r, group_size=GROUP))
    none = _column(lambda lib, r: lib.group_advantage(r, group_size=GROUP, scale="none"))
    sample = _column(lambda lib, r: lib.group_advantage(r, group_size=GROUP))
    kl = {"kind": "reinforce", "reference": True, "kl_coefficient": 1.0, **SUM}
    corrected = {"kind": "reinforce", "from_sampler": True, **SUM}

    reward_MG, mask_MGT = REWARD_N[TUPLE_MG], MASK_NT[TUPLE_MG]
    sample_MGT = normalised(reward_MG, 1)[:, :, None] * mask_MGT / mask_MGT.sum(axis=(1, 2), keepdims=True)
    objectives_MG = normalised(reward_MG, 1) + 2 * normalised(1.0 * LENGTH_N[TUPLE_MG], 1)
    gdpo_MGT = normalised(objectives_MG, 0)[:, :, None] * mask_MGT / GROUP

    def gdpo(library, reward, mask, tuple_G):
        both = jnp.stack([reward, 1.0 * jnp.asarray(LENGTH_N)[tuple_G]], axis=1)
        return library.gdpo_advantage(both, np.array([1.0, 2.0]), group_size=GROUP)[:, None]

    def scaled(scale):
        return _column(lambda lib, r: lib.group_advantage(r, group_size=GROUP, scale=scale))

    def returns(library, reward, mask, tuple_G):
        return library.reinforce_plus_plus_advantage(library.token_reward(reward, mask), mask)

    def baseline(library, reward, mask, tuple_G):
        return library.reinforce_plus_plus_baseline_advantage(reward, mask, group_size=GROUP)

    population = weighted_score(_grpo_effective("population"))
    held = "grad E[a(x)], a(x) = E[A | x] held"
    tokens = "E[sum of A grad log p / tokens of the group], A as documented"
    more = [
        Estimator("GRPO, token-mean (the default)", sample, {"kind": "ppo"}, group_tokens(sample_MGT), tokens),
        Estimator("population deviation", scaled("population"), plain, population, held),
        Estimator("batch deviation, one group", scaled("batch"), plain, population, held),
        Estimator("REINFORCE++", returns, {"kind": "ppo"}, group_tokens(whitened_tokens(reward_MG)), tokens),
        Estimator(
            "REINFORCE++-baseline",
            baseline,
            {"kind": "ppo"},
            group_tokens(whitened_tokens(reward_MG - reward_MG.mean(axis=1, keepdims=True))),
            tokens,
        ),
        Estimator("GDPO, reward and length", gdpo, plain, group_tokens(gdpo_MGT), "E[sum of A grad log p / G]"),
    ]
    capped_N, inside_N = np.minimum(whole_N, 1.5), whole_N * (whole_N <= 1.5)
    return [
        *more,
        Estimator("REINFORCE", _raw, plain, grad, "grad E[R]"),
        Estimator("RLOO", rloo, plain, grad, "grad E[R]"),
        Estimator(
            "Dr.GRPO",
            none,
            {"aggregation": "fixed", "horizon": LONGEST},
            grad * (GROUP - 1) / GROUP / LONGEST,
            "(G-1)/G/horizon grad E[R]",
        ),
        Estimator(
            "GRPO, sequence-mean",
            sample,
            MEAN,
            weighted_score(_grpo_effective("sample") / LENGTH_N),
            "grad E[a(x)/|x|], a(x) = E[A | x] held",
        ),
        Estimator(
            "GRPO, token sums",
            sample,
            SUM,
            weighted_score(_grpo_effective("sample")),
            "grad E[a(x)], a(x) = E[A | x] held",
        ),
        Estimator(
            "token-mean, raw reward",
            _raw,
            {"kind": "ppo"},
            _token_mean(REWARD_N),
            "sum of R grad log p over tokens of the group",
        ),
        Estimator(
            "sequence-mean, raw reward",
            _raw,
            {"kind": "ppo", **MEAN},
            weighted_score(REWARD_N / LENGTH_N),
            "grad E[R/|x|]",
        ),
        Estimator(
            "REINFORCE++ returns",
            lambda lib, r, m, i: lib.reinforce_plus_plus_advantage(lib.token_reward(r, m), m, whitened=False),
            plain,
            grad,
            "grad E[R]",
        ),
        Estimator("GAE 1, exact values", traced(1.0), plain, grad, "grad E[R]"),
        Estimator("GAE 0.5, exact values", traced(0.5), plain, grad, "grad E[R]"),
        Estimator(
            "KL k1 in the reward (RLOO)",
            penalised,
            plain,
            jax.grad(kl_objective)(POLICY),
            "grad (E[R] - 0.5 KL(policy||reference))",
        ),
        Estimator(
            "KL k2 in the loss", _none, {**kl, "kl": "k2"}, -reverse, "-grad KL(policy||reference) at visited prefixes"
        ),
        Estimator(
            "KL k1-straight-through",
            _none,
            {**kl, "kl": "k1-straight-through"},
            -reverse,
            "-grad KL(policy||reference) at visited prefixes",
        ),
        Estimator("KL k3 in the loss", _none, kl, -forward, "-grad KL(reference||policy) at visited prefixes"),
        Estimator(
            "KL k3 with ratio, off-policy",
            _none,
            {**kl, "kl_ratio": True},
            -reverse_old,
            "-grad KL(policy||reference) at the sampler's prefixes",
            **clean,
        ),
        Estimator(
            "entropy bonus",
            _none,
            {"kind": "reinforce", "entropy": True, "entropy_coefficient": 1.0, **SUM},
            entropy,
            "grad entropy at visited prefixes",
        ),
        Estimator(
            "PPO, wide clip, off-policy",
            _raw,
            {**WIDE, **SUM},
            weighted_tokens(ratio_NT * reward_NT, OLD),
            "E_old[sum r_t R grad log p_t]",
            **clean,
        ),
        Estimator(
            "PPO 0.2, off-policy",
            _raw,
            SUM,
            weighted_tokens(ratio_NT * reward_NT * unclipped_NT, OLD),
            "the same over unclipped tokens",
            **clean,
        ),
        Estimator(
            "PPO dual clip 1.25, off-policy",
            _raw,
            {**SUM, "dual_clip": 1.25},
            weighted_tokens(ratio_NT * reward_NT * dual_NT, OLD),
            "and without r > c where A < 0",
            **clean,
        ),
        Estimator(
            "GSPO 0.1, off-policy",
            _raw,
            {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1, **MEAN},
            weighted_score(REWARD_N * mean_ratio_N * open_N / LENGTH_N, OLD),
            "E_old[s R mean grad log p], unclipped",
            **clean,
        ),
        Estimator(
            "GSPO-token 0.1, off-policy",
            _raw,
            {"kind": "gspo-token", "clip_low": 0.1, "clip_high": 0.1, **MEAN},
            weighted_score(REWARD_N * mean_ratio_N * open_N / LENGTH_N, OLD),
            "the same",
            **clean,
        ),
        Estimator(
            "CISPO cap 1.2, off-policy",
            _raw,
            {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.2, **SUM},
            weighted_tokens(np.minimum(ratio_NT, 1.2) * reward_NT, OLD),
            "E_old[sum min(r_t, c) R grad log p_t]",
            **clean,
        ),
        Estimator(
            "SAPO, off-policy",
            _raw,
            {"kind": "sapo", **SUM},
            weighted_tokens(4 * gate_NT * (1 - gate_NT) * ratio_NT * reward_NT, OLD),
            "E_old[sum 4 g (1-g) r_t R grad log p_t]",
            **clean,
        ),
        Estimator("SAPO, on-policy", _raw, {"kind": "sapo", **SUM}, grad, "grad E[R]"),
        Estimator(
            "correction: sequence, no bound",
            _raw,
            {**corrected, "correction": "truncate", "correction_level": "sequence", "correction_high": 1e9},
            grad,
            "grad E[R]",
            sampler=OLD,
        ),
        Estimator(
            "correction: sequence, cap 1.5",
            _raw,
            {**corrected, "correction": "truncate", "correction_level": "sequence", "correction_high": 1.5},
            weighted_score(capped_N * REWARD_N, OLD),
            "E_sampler[min(w, c) R grad log p]",
            sampler=OLD,
        ),
        Estimator(
            "correction: sequence, mask 1.5",
            _raw,
            {**corrected, "correction": "mask", "correction_level": "sequence", "correction_high": 1.5},
            weighted_score(inside_N * REWARD_N, OLD),
            "E_sampler[w 1(w <= c) R grad log p]",
            sampler=OLD,
        ),
        Estimator(
            "correction: token, cap 1.5",
            _raw,
            {**corrected, "correction": "truncate", "correction_high": 1.5},
            weighted_tokens(np.minimum(ratio_NT, 1.5) * reward_NT, OLD),
            "E_sampler[sum min(w_t, c) R grad log p_t]",
            sampler=OLD,
        ),
        Estimator("no correction", _raw, plain, weighted_score(REWARD_N, OLD), "E_sampler[R grad log p]", sampler=OLD),
    ]


def audit(library):
    """Rows (name, claim, relative error against the claim, relative bias and cosine to grad E[R], total variance)."""
    grad = np.asarray(reward_gradient())
    rows = []
    for estimator in estimators():
        mean, variance = expectation(library, estimator)
        target = np.asarray(estimator.target)
        error = np.linalg.norm(mean - target) / np.linalg.norm(target)
        bias = np.linalg.norm(mean - grad) / np.linalg.norm(grad)
        # Scale is the learning rate's business: 1 - cosine is the bias that no multiple of the estimate can mend.
        cosine = (mean * grad).sum() / np.linalg.norm(mean) / np.linalg.norm(grad)
        rows.append((estimator.name, estimator.claim, error, bias, cosine, variance / (mean**2).sum()))
    return rows


def main():
    import grpo_loss

    with jax.enable_x64(True):
        print("| estimator | its expectation is | error against that | bias to grad E[R] | cosine | variance / mean² |")
        print("|---|---|---|---|---|---|")
        for name, claim, error, bias, cosine, noise in audit(grpo_loss):
            # What aims at a divergence or at entropy has no bias against the reward's gradient.
            aim = "– | –" if "KL(" in claim or "entropy" in claim else f"{bias:.3f} | {cosine:.3f}"
            claim = claim.replace("|", "\\|")
            print(f"| {name} | {claim} | {error:.0e} | {aim} | {noise:.2f} |")


if __name__ == "__main__":
    main()
