"""Change a sign, a mask, a stop-gradient or a normaliser in a copy of the library: the laws notice, every time."""

import importlib
import shutil
import sys
from pathlib import Path

import grpo_loss_laws as laws
import jax
import pytest

import grpo_loss

# (what is wrong, file, text, replacement, the law that catches it: a check, or a case of `check_policy_loss`).
MUTATIONS = [
    ("sign of the objective", "_policy_loss.py", "loss_RT = -parts.objective_RT", "loss_RT = parts.objective_RT", {}),
    (
        "sign of the entropy bonus",
        "_policy_loss.py",
        "loss_RT - entropy_coefficient",
        "loss_RT + entropy_coefficient",
        {"entropy_coefficient": 0.2},
    ),
    (
        "sign of the KL term",
        "_policy_loss.py",
        "loss_RT + kl.coefficient",
        "loss_RT - kl.coefficient",
        {"kl_coefficient": 0.3},
    ),
    (
        "KL computed and thrown away",
        "_policy_loss.py",
        "loss_RT = loss_RT + kl.coefficient",
        "_ = loss_RT + kl.coefficient",
        {"kl_coefficient": 0.3},
    ),
    (
        "KL always times the ratio",
        "_policy_loss.py",
        "if kl.ratio else kl_RT)",
        "if True else kl_RT)",
        {"kl_coefficient": 0.3},
    ),
    (
        "ratio in KL without gradient",
        "_policy_loss.py",
        "kl_RT * bounded_exp(log_ratio_RT)",
        "kl_RT * stop_gradient(bounded_exp(log_ratio_RT))",
        {"kl_coefficient": 0.3, "kl_ratio": True},
    ),
    (
        "ratio upside down",
        "_policy_loss.py",
        "log_ratio_RT = logp_RT - start_logp_RT",
        "log_ratio_RT = start_logp_RT - logp_RT",
        {},
    ),
    (
        "padding not masked",
        "_policy_loss.py",
        "return jnp.where(mask_RT, array_RT.astype(dtype), 0)",
        "return array_RT.astype(dtype)",
        {},
    ),
    (
        "old log-probabilities without stop-gradient",
        "_policy_loss.py",
        "stop_gradient(logp_RT if old_logp_RT is None",
        "(logp_RT if old_logp_RT is None",
        "check_first_update",
    ),
    (
        "token weights left out",
        "_policy_loss.py",
        "LossTerms(jnp.sum(loss_RT * token_weight_RT)",
        "LossTerms(jnp.sum(loss_RT)",
        {"aggregation": "sequence-mean-token-mean", "clip_low": 0.1, "clip_high": 0.3},
    ),
    (
        "ratios without a bound",
        "_objectives.py",
        "jax.lax.clamp(-bound, log_ratio_RT, bound)",
        "log_ratio_RT",
        "check_far_off_policy",
    ),
    (
        "correction against the current policy upside down",
        "_policy_loss.py",
        "loss_RT = loss_RT * weight_RT",
        "loss_RT = loss_RT / weight_RT",
        {"correction": "truncate", "correction_high": 1.2, "kl_coefficient": 0.3},
    ),
    (
        "metrics divided by rows",
        "_policy_loss.py",
        "tokens = mask_RT.sum()",
        "tokens = mask_RT.shape[0] * jnp.ones(())",
        "check_metrics",
    ),
    ("signed gap to the sampler", "_policy_loss.py", "gap_RT = jnp.abs(", "gap_RT = (", "check_metrics"),
    (
        "clipping inverted for negative advantages",
        "_objectives.py",
        "(ratio_RT < low) & (advantage_RT < 0)",
        "(ratio_RT > high) & (advantage_RT < 0)",
        {},
    ),
    (
        "clipping whatever the advantage's sign",
        "_objectives.py",
        "(ratio_RT > high) & (advantage_RT > 0)",
        "(ratio_RT > high)",
        {},
    ),
    (
        "low and high exchanged",
        "_objectives.py",
        "return 1 - clip_low, 1 + clip_high",
        "return 1 - clip_high, 1 + clip_low",
        {"clip_low": 0.1, "clip_high": 0.3, "aggregation": "sequence-mean-token-mean"},
    ),
    (
        "dual clip for positive advantages",
        "_objectives.py",
        "(ratio_RT > dual_clip) & (advantage_RT < 0)",
        "(ratio_RT > dual_clip) & (advantage_RT > 0)",
        {"dual_clip": 1.3, "aggregation": "fixed", "horizon": 11},
    ),
    (
        "CISPO without stop-gradient",
        "_objectives.py",
        "stop_gradient(bounded_RT) * tokens.advantage_RT",
        "bounded_RT * tokens.advantage_RT",
        {"kind": "cispo"},
    ),
    (
        "GSPO-token without stop-gradient",
        "_objectives.py",
        "stop_gradient(mean_RT) + (logp_RT",
        "mean_RT + (logp_RT",
        {"kind": "gspo-token", "clip_low": 0.1, "clip_high": 0.1, "aggregation": "sequence-mean-token-sum"},
    ),
    (
        "GSPO with the product of ratios",
        "_sequences.py",
        "total_RS / jnp.maximum(count_RS, 1)",
        "total_RS",
        {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1},
    ),
    (
        "sequence mean over all positions",
        "_sequences.py",
        "count_RS = sequence_sum(mask_RT, segment_RT)",
        "count_RS = sequence_sum(jnp.ones_like(mask_RT), segment_RT)",
        {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1},
    ),
    (
        "packed sequences mixed up",
        "_sequences.py",
        "if segment_RT is None:\n        return",
        "if True:\n        return",
        {"aggregation": "sequence-mean-token-mean", "clip_low": 0.1, "clip_high": 0.3},
    ),
    ("SAPO normaliser", "_objectives.py", "* 4 / temperature_RT", "* 2 / temperature_RT", {"kind": "sapo"}),
    (
        "SAPO temperatures exchanged",
        "_objectives.py",
        "jnp.where(advantage_RT > 0, positive, negative)",
        "jnp.where(advantage_RT > 0, negative, positive)",
        {"kind": "sapo"},
    ),
    (
        "token-mean over all positions",
        "_aggregate.py",
        "return mask_RT, mask_RT.sum()",
        "return mask_RT, jnp.asarray(1.0 * mask_RT.size)",
        {},
    ),
    (
        "empty sequences counted",
        "_aggregate.py",
        "(count_RS > 0).sum()",
        "(count_RS >= 0).sum()",
        {"aggregation": "sequence-mean-token-mean", "clip_low": 0.1, "clip_high": 0.3},
    ),
    (
        "horizon left out",
        "_aggregate.py",
        "mask_RT) * horizon",
        "mask_RT)",
        {"dual_clip": 1.3, "aggregation": "fixed", "horizon": 11},
    ),
    (
        "sign of k3",
        "_kl.py",
        "jnp.expm1(-difference_RT) + difference_RT",
        "jnp.expm1(difference_RT) - difference_RT",
        "check_kl_gradient_kinds",
    ),
    (
        "gradient to the reference",
        "_kl.py",
        "logp_RT - jax.lax.stop_gradient(reference_logp_RT)",
        "logp_RT - reference_logp_RT",
        "check_kl_gradient_kinds",
    ),
    (
        "straight-through without stop-gradient",
        "_kl.py",
        "return jax.lax.stop_gradient(value_RT) + (half",
        "return value_RT + (half",
        "check_kl_gradient_kinds",
    ),
    (
        "k2 without its half",
        "_kl.py",
        "jnp.square(difference_RT) / 2",
        "jnp.square(difference_RT)",
        "check_kl_gradient_kinds",
    ),
    (
        "importance weight upside down",
        "_importance.py",
        "logp_RT - sampler_logp_RT",
        "sampler_logp_RT - logp_RT",
        {"correction": "truncate", "correction_high": 1.2, "kl_coefficient": 0.3},
    ),
    (
        "masked weights clipped instead",
        "_importance.py",
        "ratio_RT <= high), ratio_RT, 0)",
        "ratio_RT <= high), ratio_RT, high)",
        {"correction": "mask", "correction_low": 0.7, "correction_high": 1.3},
    ),
    (
        "sequence weight from padding too",
        "_importance.py",
        'if level == "sequence":',
        'if level != "sequence":',
        {"correction": "truncate", "correction_high": 1.2, "kl_coefficient": 0.3},
    ),
    (
        "unscored rewards in the mean",
        "_advantages.py",
        "jnp.where(self.scored_B, value_B, 0)",
        "value_B",
        "check_group_advantages",
    ),
    (
        "unscored members get an advantage",
        "_advantages.py",
        "self.varied(reward_B) & self.scored_B",
        "self.varied(reward_B)",
        "check_group_advantages",
    ),
    (
        "equal groups keep rounding noise",
        "_advantages.py",
        "jnp.where(self.varied(reward_B) & self.scored_B, reward_B - mean_B, 0)",
        "jnp.where(self.scored_B, reward_B - mean_B, 0)",
        "check_group_advantages",
    ),
    (
        "population for sample deviation",
        "_advantages.py",
        '(scale == "sample")',
        '(scale == "never")',
        "check_group_advantages",
    ),
    (
        "RLOO normaliser",
        "_advantages.py",
        "* groups.count_B / jnp.maximum(groups.count_B - 1, 1)",
        "* groups.count_B / jnp.maximum(groups.count_B, 1)",
        "check_group_advantages",
    ),
    (
        "epsilon under the root",
        "_whiten.py",
        "jnp.sqrt(variance) + epsilon",
        "jnp.sqrt(variance + epsilon)",
        "check_group_advantages",
    ),
    ("equal numbers whitened to their rounding", "_whiten.py", "mask & differ", "mask", "check_group_advantages"),
    ("variance about zero", "_whiten.py", "jnp.square(kept - mean)", "jnp.square(kept)", "check_group_advantages"),
    (
        "parts put together without the gap of their means",
        "_whiten.py",
        "+ jnp.square(gap) * self.count * share",
        "",
        "check_group_advantages",
    ),
    (
        "whitening reads the padding",
        "_whiten.py",
        "kept = jnp.where(mask, array",
        "kept = jnp.where(True, array",
        "check_group_advantages",
    ),
    (
        "sign of the reward's KL penalty",
        "_returns.py",
        "reward_BT - kl_coefficient",
        "reward_BT + kl_coefficient",
        "check_other_advantages",
    ),
    (
        "reward on the first token",
        "_returns.py",
        "jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1]",
        "jnp.cumsum(mask_BT, axis=1)",
        "check_other_advantages",
    ),
    (
        "GAE steps into the padding",
        "_returns.py",
        "jnp.where(mask_B, value_B, next_value_B)",
        "value_B",
        "check_other_advantages",
    ),
    (
        "GAE without the trace",
        "_returns.py",
        "discount * trace * next_advantage_B",
        "discount * next_advantage_B",
        "check_other_advantages",
    ),
    (
        "overlong penalty of the wrong sign",
        "_advantages.py",
        "room_B = max_tokens - buffer_tokens - jnp",
        "room_B = -(max_tokens - buffer_tokens) + jnp",
        "check_other_advantages",
    ),
    (
        "lowest entropies kept",
        "_token_masks.py",
        "entropy_BT >= threshold",
        "entropy_BT <= threshold",
        "check_token_masks",
    ),
    (
        "truncated completions kept instead",
        "_token_masks.py",
        "& ~jnp.asarray(truncated_B)",
        "& jnp.asarray(truncated_B)",
        "check_token_masks",
    ),
    ("maxima added", "_terms.py", "jax.tree.map(jnp.maximum", "jax.tree.map(jnp.add", "check_adds_up"),
    (
        "denominators averaged",
        "_terms.py",
        "self.denominator + other.denominator",
        "(self.denominator + other.denominator) / 2",
        "check_adds_up",
    ),
]


def _mutant(folder, file, text, replacement):
    """A copy of the library under another name, with one change."""
    source = Path(grpo_loss.__file__).parent
    name = f"grpo_loss_mutant_{abs(hash((file, text, replacement)))}"
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / name / file
    original = module.read_text()
    assert original.count(text) >= 1, f"{file} no longer contains {text!r}: bring the mutation up to date"
    module.write_text(original.replace(text, replacement))
    for part in (folder / name).glob("*.py"):
        part.write_text(part.read_text().replace("from grpo_loss.", f"from {name}."))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def _apply(library, law):
    if isinstance(law, str):
        getattr(laws, law)(library)
    else:
        laws.check_policy_loss(library, law)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "file", "text", "replacement", "law"), MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_mutation_is_caught(tmp_path, what, file, text, replacement, law):
    mutant = _mutant(tmp_path, file, text, replacement)
    with jax.enable_x64(True), pytest.raises(AssertionError):
        _apply(mutant, law)


@pytest.mark.slow
def test_an_unchanged_copy_passes(tmp_path):
    copy = _mutant(tmp_path, "_kl.py", '"""Estimators', '"""Estimators')
    with jax.enable_x64(True):
        for law in [{}, "check_kl_gradient_kinds", "check_group_advantages"]:
            _apply(copy, law)
