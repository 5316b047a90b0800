"""The losses again, by loops over ragged sequences with hand-written derivatives: what the tests compare with."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sequence:
    """One completion: arrays over its tokens; `mask` says which count."""

    logp: np.ndarray
    old: np.ndarray
    advantage: np.ndarray
    mask: np.ndarray
    reference: np.ndarray
    entropy: np.ndarray
    sampler: np.ndarray
    weight: np.ndarray


@dataclass
class Plain:
    """Numerator, denominator, and the numerator's derivatives by token."""

    numerator: float = 0.0
    denominator: float = 0.0
    by_logp: list[np.ndarray] = field(default_factory=list)
    by_entropy: list[np.ndarray] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)


def random_sequences(rng: np.random.Generator, count: int, longest: int) -> list[Sequence]:
    """Ragged sequences far enough off-policy that every bound binds somewhere; one has no counted token."""
    sequences = []
    for index in range(count):
        size = int(rng.integers(1, longest + 1))
        logp = -rng.exponential(1.0, size)
        mask = rng.random(size) < 0.85
        mask[0] = True
        if index == 1:
            mask[:] = False
        sequences.append(
            Sequence(
                logp=logp,
                old=logp + rng.normal(0, 0.5, size),
                advantage=np.full(size, rng.normal()),
                mask=mask,
                reference=logp + rng.normal(0, 0.5, size),
                entropy=rng.exponential(1.0, size),
                sampler=logp + rng.normal(0, 0.5, size),
                weight=rng.random(size),
            )
        )
    return sequences


def plain_policy_loss(
    sequences,
    *,
    kind="ppo",
    clip_low=None,
    clip_high=None,
    dual_clip=None,
    aggregation="token-mean",
    horizon=0,
    weighted=False,
    kl="k3",
    kl_coefficient=0.0,
    kl_ratio=False,
    entropy_coefficient=0.0,
    correction="none",
    correction_level="token",
    correction_low=0.0,
    correction_high=2.0,
):
    """The loss of `sequences`; `grpo_loss_laws.values` turns the other arguments into the library's."""
    defaults = {"ppo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "gspo-token": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
    low, high = defaults.get(kind, (0, 0)) if clip_low is None or clip_high is None else (clip_low, clip_high)
    out = Plain(sums={"clip_ratio/low": 0.0, "clip_ratio/high": 0.0, "kl": 0.0, "importance_ratio/mean": 0.0})
    tokens = sum(int(s.mask.sum()) for s in sequences)
    for s in sequences:
        size, counted = len(s.logp), int(s.mask.sum())
        share = np.zeros(size)
        if counted:
            share = s.mask / (counted if aggregation == "sequence-mean-token-mean" else 1.0)
            if aggregation == "fixed":
                out.denominator += horizon
            elif aggregation != "token-mean":
                out.denominator += 1
        by_logp, by_entropy = np.zeros(size), np.zeros(size)
        log_ratio = s.logp - s.old
        whole = log_ratio[s.mask].mean() if counted else 0.0
        corrections = np.ones(size)
        if correction != "none":
            gap = s.old - s.sampler
            gap = np.full(size, gap[s.mask].sum()) if correction_level == "sequence" else gap
            corrections = np.exp(gap)
            inside = (corrections >= correction_low) & (corrections <= correction_high)
            corrections = (
                np.clip(corrections, correction_low, correction_high)
                if correction == "truncate"
                else corrections * inside
            )
        for t in range(size):
            if not s.mask[t]:
                continue
            advantage = s.advantage[t]
            ratio = np.exp(whole if kind.startswith("gspo") else log_ratio[t])
            bounded = min(max(ratio, 1 - low), 1 + high)
            if kind in ("ppo", "gspo", "gspo-token"):
                objective = min(ratio * advantage, bounded * advantage)
                slope = ratio * advantage if ratio * advantage <= bounded * advantage else 0.0
                out.sums["clip_ratio/low"] += advantage < 0 and ratio < 1 - low
                is_high = advantage > 0 and ratio > 1 + high
                if dual_clip is not None and advantage < 0 and dual_clip * advantage > objective:
                    objective, slope, is_high = dual_clip * advantage, 0.0, True
                out.sums["clip_ratio/high"] += is_high
            elif kind == "cispo":
                objective, slope = bounded * advantage * s.logp[t], bounded * advantage
                out.sums["clip_ratio/low"] += ratio < 1 - low
                out.sums["clip_ratio/high"] += ratio > 1 + high
            elif kind == "sapo":
                heat = 1.0 if advantage > 0 else 1.05
                gate = 1 / (1 + np.exp(-heat * (ratio - 1)))
                objective, slope = 4 / heat * gate * advantage, 4 * gate * (1 - gate) * ratio * advantage
            else:
                objective, slope = advantage * s.logp[t], advantage
            scale = share[t] * corrections[t] * (s.weight[t] if weighted else 1.0)
            out.numerator -= scale * objective
            if kind == "gspo":
                by_logp[s.mask] -= scale * slope / counted
            else:
                by_logp[t] -= scale * slope
            d = s.logp[t] - s.reference[t]
            value = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[kl[:2]]
            gradient = d if "-" in kl or kl == "k2" else 1 - np.exp(-d)
            out.sums["kl"] += value
            if kl_ratio:
                r = np.exp(log_ratio[t])
                value, gradient = r * value, r * value + r * gradient
            out.numerator += share[t] * kl_coefficient * value
            by_logp[t] += share[t] * kl_coefficient * gradient
            out.numerator -= share[t] * entropy_coefficient * s.entropy[t]
            by_entropy[t] -= share[t] * entropy_coefficient
            out.sums["importance_ratio/mean"] += ratio
        out.by_logp.append(by_logp)
        out.by_entropy.append(by_entropy)
    if aggregation == "token-mean":
        out.denominator = float(tokens)
    out.sums = {name: total / tokens for name, total in out.sums.items()}
    return out


def padded(sequences, width):
    """Arrays [R, T], one sequence a row, padding filled with NaN; no segments."""
    arrays = {name: np.full((len(sequences), width), np.nan) for name in _NAMES}
    mask = np.zeros((len(sequences), width), bool)
    place = []
    for row, s in enumerate(sequences):
        place.append((row, slice(0, len(s.logp))))
        for name in _NAMES:
            arrays[name][place[-1]] = getattr(s, name)
        mask[place[-1]] = s.mask
    return arrays, mask, None, place


def packed(sequences, width):
    """Arrays [R, T], sequences one after another with a gap of padding before some, and their segments."""
    rows, cursor, place, segments = 0, width, [], []
    for index, s in enumerate(sequences):
        size, gap = len(s.logp), index % 3 == 2
        if cursor + gap + size > width:
            rows, cursor, gap = rows + 1, 0, 0
            segments.append(0)
        segments[-1] += 1
        start = cursor + gap
        place.append((rows - 1, slice(start, start + size), segments[-1]))
        cursor = start + size
    arrays = {name: np.full((rows, width), np.nan) for name in _NAMES}
    mask, segment = np.zeros((rows, width), bool), np.zeros((rows, width), np.int32)
    for s, (row, span, number) in zip(sequences, place, strict=True):
        for name in _NAMES:
            arrays[name][row, span] = getattr(s, name)
        mask[row, span], segment[row, span] = s.mask, number
    return arrays, mask, segment, [where[:2] for where in place]


_NAMES = ("logp", "old", "advantage", "reference", "entropy", "sampler", "weight")
