"""What grpo-loss computes: every advantage, every objective with its gradient, every average, and where tokens go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_numbers import integers, wave

import grpo_loss as gl
from grpo_contracts import PolicyVersion, Rollout, SamplingParams, Scored, TrainBatch

ROWS, TIME = 6, 5
_LENGTH_R = np.array([5, 1, 3, 4, 2, 5])
_MASK_RT = np.arange(TIME) < _LENGTH_R[:, None]
_SCORED_B = np.array([True, True, True, True, False, True])
_REWARD_B = np.array([1.0, 0.0, 0.5, 0.25, 0.0, 2.0], np.float32)
_LOGP_RT = (-1.5 + wave(ROWS, TIME)) * _MASK_RT
_OLD_RT = (-1.5 + wave(ROWS, TIME, phase=0.3)) * _MASK_RT
_REFERENCE_RT = (-1.5 + wave(ROWS, TIME, phase=0.6)) * _MASK_RT
_ADVANTAGE_RT = wave(ROWS, TIME, phase=5.0) * _MASK_RT

LOSSES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo dual clip": {"objective": gl.ppo(0.2, 0.28, dual_clip=3.0)},
    "gspo": {"objective": gl.gspo(0.1, 0.1), "aggregation": gl.sequence_mean_token_mean},
    "gspo-token": {"objective": gl.gspo_token(0.1, 0.1)},
    "cispo": {"objective": gl.cispo()},
    "sapo": {"objective": gl.sapo()},
    "reinforce": {"objective": gl.reinforce()},
    "first update": {"old_logp_RT": None},
    "kl": {"reference_logp_RT": _REFERENCE_RT, "kl": gl.KL("k3", 0.1)},
    "kl ratio": {"reference_logp_RT": _REFERENCE_RT, "kl": gl.KL("k3", 0.1, ratio=True)},
    "entropy": {"entropy_RT": 1 + wave(ROWS, TIME, phase=9.0), "entropy_coefficient": 0.01},
    "truncate": {"sampler_logp_RT": _REFERENCE_RT, "correction": gl.truncate()},
    "mask": {"sampler_logp_RT": _REFERENCE_RT, "correction": gl.drop_outside(level="sequence")},
}
AVERAGES = {
    "token-mean": gl.token_mean,
    "sequence-mean-token-mean": gl.sequence_mean_token_mean,
    "sequence-mean-token-sum": gl.sequence_mean_token_sum,
    "fixed": gl.fixed(8),
}


def _compiled(cases: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """One compiled program a part: dozens of small ones would take far longer."""
    return lambda: jax.jit(cases)()


def _advantages() -> dict[str, Any]:
    mask_BT, groups = _MASK_RT, {"scored_B": _SCORED_B, "group_size": 3}
    cases: dict[str, Any] = {
        f"group_advantage {scale}": gl.group_advantage(_REWARD_B, scale=scale, **groups)
        for scale in ("sample", "population", "batch", "none")
    }
    cases["group_advantage of shuffled groups"] = gl.group_advantage(_REWARD_B, group_B=np.array([2, 7, 2, 7, 2, 7]))
    cases["group_advantage without signal"] = gl.group_advantage(np.full(6, 0.3, np.float32), group_size=3)
    cases["rloo_advantage"] = gl.rloo_advantage(_REWARD_B, **groups)
    reward_BN = np.stack([_REWARD_B, wave(6, phase=1.0)], 1)
    cases["gdpo_advantage"] = gl.gdpo_advantage(reward_BN, np.array([1.0, 0.5], np.float32), group_size=3)
    cases["groups_with_signal"] = gl.groups_with_signal(np.array([1, 1, 1, 0, 1, 1], np.float32), group_size=3)
    cases["overlong_penalty"] = gl.overlong_penalty(np.arange(10), max_tokens=8, buffer_tokens=4)
    cases["token_reward"] = gl.token_reward(
        _REWARD_B, mask_BT, logp_BT=_LOGP_RT, reference_logp_BT=_REFERENCE_RT, kl_coefficient=0.1
    )
    rewards_BT = wave(ROWS, TIME, phase=2.0)
    cases["gae advantage"], cases["gae return"] = gl.gae(rewards_BT, wave(ROWS, TIME), mask_BT, discount=0.9)
    cases["reinforce_plus_plus_advantage"] = gl.reinforce_plus_plus_advantage(rewards_BT, mask_BT, discount=0.9)
    cases["reinforce_plus_plus_baseline_advantage"] = gl.reinforce_plus_plus_baseline_advantage(
        _REWARD_B, mask_BT, **groups
    )
    cases["whiten"] = gl.whiten(_ADVANTAGE_RT, mask_BT)
    return cases


def _losses() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for name, options in LOSSES.items():

        def numerator(logp_RT: jax.Array, options: dict[str, Any] = options) -> tuple[jax.Array, gl.LossTerms]:
            given = {"old_logp_RT": _OLD_RT, "advantage_RT": _ADVANTAGE_RT, "mask_RT": jnp.asarray(_MASK_RT)}
            terms = gl.policy_loss(logp_RT, **(given | options))
            return terms.numerator, terms

        (_, terms), gradient_RT = jax.value_and_grad(numerator, has_aux=True)(jnp.asarray(_LOGP_RT))
        cases[f"policy_loss {name}: numerator"] = terms.numerator
        cases[f"policy_loss {name}: denominator"] = terms.denominator
        cases[f"policy_loss {name}: gradient"] = gradient_RT
        for metric, value in terms.means().items():
            cases[f"policy_loss {name}: {metric}"] = value
    return cases


def _averages() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    value_RT, mask_RT = jnp.asarray(wave(ROWS, TIME)), jnp.asarray(_MASK_RT)
    segment_RT = jnp.asarray(np.array([[1, 1, 2, 2, 0]] * ROWS))
    for average, aggregation in AVERAGES.items():
        for name, segments in (("", None), (" of packed rows", segment_RT)):
            kept_RT = mask_RT if segments is None else mask_RT & (segments > 0)
            numerator, denominator = gl.aggregate(value_RT, kept_RT, aggregation, segment_RT=segments)
            cases[f"aggregate {average}{name}"] = jnp.stack([numerator, denominator])
    for kl in ("k1", "k2", "k3"):
        cases[f"kl_estimate {kl}"] = gl.kl_estimate(jnp.asarray(_LOGP_RT), jnp.asarray(_REFERENCE_RT), kl)
    return cases


def _fused() -> dict[str, Any]:
    hidden_RTD, unembed_VD = jnp.asarray(wave(2, 4, 8)), jnp.asarray(3 * wave(19, 8, phase=1.0))
    logp_RT, entropy_RT = gl.token_logp(hidden_RTD, unembed_VD, jnp.asarray(integers(2, 4, below=19)), temperature=0.8)
    return {"token_logp": logp_RT, "token_logp entropy": entropy_RT}


def _train_batch(tokens_BT: np.ndarray, prompt_length_B: np.ndarray, total_length_B: np.ndarray) -> TrainBatch:
    """Two groups of two whose completion tokens all count."""
    B = len(tokens_BT)
    zero_BT = np.zeros(tokens_BT.shape, np.float32)
    rollout = Rollout(
        tokens_BT=tokens_BT,
        prompt_length_B=prompt_length_B,
        total_length_B=total_length_B,
        loss_mask_BT=np.ones(tokens_BT.shape, bool),
        logp_BT=zero_BT,
        policy_logp_BT=zero_BT,
        finish_B=np.zeros(B, np.int8),
        prompt_id_B=np.array([0, 0, 1, 1], np.int32),
        sample_B=np.array([0, 1, 0, 1], np.int32),
        group_B=np.array([0, 0, 1, 1], np.int32),
        group_size=2,
        sampling=SamplingParams(),
        policy=PolicyVersion(0, "00"),
        vocab_size=17,
        pad_id=0,
    )
    return TrainBatch(Scored.from_rewards(rollout, {"r": [0.0] * B}), wave(B, phase=4.0))


def _packing() -> dict[str, Any]:
    """Which token lies where is a meaning too: the network's shared prompts depend on it."""
    prompt_B, new_B = np.array([3, 3, 2, 2]), np.array([4, 2, 5, 1])
    total_B = prompt_B + new_B
    tokens_BT = integers(4, 9, below=17)
    tokens_BT[1, :3], tokens_BT[3, :2] = tokens_BT[0, :3], tokens_BT[2, :2]
    shape = gl.PackShape(row_length=6, rows=2, prompts=2, prompt_length=3, micro_batches=2)
    packed = gl.pack(_train_batch(tokens_BT, prompt_B.astype(np.int32), total_B.astype(np.int32)), shape=shape)
    leaves = jax.tree_util.tree_leaves_with_path(packed)
    cases = {f"pack {jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    # Stored by 0.1.0, in which a row was one block.
    cases["pack .micro.prompt_R"] = cases["pack .micro.prompt_RC"][..., 0]
    for index, keep_B in enumerate(
        gl.split_minibatches(np.array([0, 0, 1, 1, 2, 2], np.int32), 3, seed=5, step=2, epoch=1)
    ):
        cases[f"split_minibatches {index}"] = keep_B
    return cases


PARTS = {
    "advantages": _compiled(_advantages),
    "losses": _compiled(_losses),
    "averages": _compiled(_averages),
    "log-probabilities": _compiled(_fused),
    "packing": _packing,
}
