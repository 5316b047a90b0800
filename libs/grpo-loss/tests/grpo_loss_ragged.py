"""Ragged groups of completions, and a toy network in which a completion depends on all that came before it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import grpo_loss
from grpo_contracts import PolicyVersion, Rollout, SamplingParams, Scored, TrainBatch

VOCABULARY = 24
WIDTH = 8


@dataclass(frozen=True)
class Ragged:
    """What a packer needs of a train batch."""

    tokens_BT: np.ndarray
    prompt_length_B: np.ndarray
    total_length_B: np.ndarray
    group_B: np.ndarray
    loss_mask_BT: np.ndarray
    scored_B: np.ndarray
    advantage: np.ndarray
    sampler_logp_BT: np.ndarray
    old_logp_BT: np.ndarray | None

    def train_batch(self):
        """As a TrainBatch; what packing does not read is empty."""
        B = len(self.tokens_BT)
        empty_B = np.zeros(B, np.float32)
        rollout = Rollout(
            tokens_BT=self.tokens_BT,
            prompt_length_B=self.prompt_length_B,
            total_length_B=self.total_length_B,
            loss_mask_BT=self.loss_mask_BT,
            logp_BT=self.sampler_logp_BT,
            policy_logp_BT=self.sampler_logp_BT,
            finish_B=np.zeros(B, np.int8),
            prompt_id_B=self.group_B,
            sample_B=np.zeros(B, np.int32),
            group_B=self.group_B,
            group_size=1,
            sampling=SamplingParams(),
            policy=PolicyVersion(0, "00"),
            vocab_size=VOCABULARY,
            pad_id=0,
        )
        scored = Scored(rollout, empty_B[:, None], self.scored_B[:, None], ("r",), np.ones(1), empty_B, self.scored_B)
        return TrainBatch(scored, self.advantage, self.old_logp_BT)

    def pack(self, shape, **arguments):
        return grpo_loss.pack(self.train_batch(), shape=shape, **arguments)

    def pad(self, rows, **arguments):
        return grpo_loss.pad(self.train_batch(), rows=rows, **arguments)


def ragged(seed, groups, group_size, longest_prompt, longest, length_of=None, dtype=np.float32):
    """Groups with prompts of 1 to `longest_prompt` tokens; completions of 0 to `longest`, or drawn by `length_of`."""
    rng = np.random.default_rng(seed)
    B, T = groups * group_size, longest_prompt + longest
    prompt_length_B = np.repeat(rng.integers(1, longest_prompt + 1, groups), group_size)
    length_B = rng.integers(0, longest + 1, B) if length_of is None else length_of(rng, B)
    total_length_B = prompt_length_B + length_B
    tokens_BT = rng.integers(1, VOCABULARY, (B, T)).astype(np.int32)
    place_T = np.arange(T)
    leader_B = np.arange(B) // group_size * group_size
    tokens_BT = np.where(place_T < prompt_length_B[:, None], tokens_BT[leader_B], tokens_BT)
    tokens_BT = np.where(place_T < total_length_B[:, None], tokens_BT, 0)
    in_completion_BT = (place_T >= prompt_length_B[:, None]) & (place_T < total_length_B[:, None])
    loss_mask_BT = in_completion_BT & (rng.random((B, T)) < 0.9)
    group_B = np.repeat(np.arange(groups), group_size)
    targets = np.random.default_rng(11)
    advantage_B = targets.normal(size=B).astype(dtype)
    old_logp_BT = (-np.log(VOCABULARY) + 0.3 * targets.normal(size=(B, T))).astype(dtype)
    sampler_logp_BT = (old_logp_BT + 0.1 * targets.normal(size=(B, T))).astype(dtype)
    return Ragged(
        tokens_BT,
        prompt_length_B,
        total_length_B,
        group_B,
        loss_mask_BT,
        np.ones(B, bool),
        advantage_B,
        sampler_logp_BT,
        old_logp_BT,
    )


def toy_params(dtype):
    rng = np.random.default_rng(7)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.5, dtype)

    return {"embed": normal(VOCABULARY, WIDTH), "mix": normal(WIDTH, WIDTH), "unembed": normal(VOCABULARY, WIDTH)}


def toy_forward(params, micro, shards=1):
    """A recurrence without order: each token's state is the sum over its prompt and its segment so far."""
    embed_VD = params["embed"]
    slots = jnp.arange(micro.prompt_tokens_PT.shape[1])
    live_PT = slots < micro.prompt_length_P[:, None]
    age_PT = jnp.cos(slots.astype(embed_VD.dtype))
    prompt_PD = jnp.einsum("pt,ptd->pd", live_PT * age_PT, embed_VD[micro.prompt_tokens_PT])
    blocks = prompt_PD.reshape(shards, -1, WIDTH)
    rows, length = micro.tokens_RT.shape
    prompt_RT = jnp.repeat(micro.prompt_RC, length // micro.prompt_RC.shape[1], axis=1)
    local = prompt_RT.reshape(shards, -1) - jnp.arange(shards)[:, None] * blocks.shape[1]
    shared_RTD = jnp.take_along_axis(blocks, local[..., None], axis=1).reshape(rows, length, WIDTH)
    sees_RTS = (micro.segment_RT[:, :, None] == micro.segment_RT[:, None]) & jnp.tri(length, dtype=bool)
    age_RT = jnp.cos(micro.positions_RT.astype(embed_VD.dtype))
    own_RTD = jnp.einsum("rts,rs,rsd->rtd", sees_RTS.astype(embed_VD.dtype), age_RT, embed_VD[micro.tokens_RT])
    hidden_RTD = jnp.tanh((shared_RTD + own_RTD) @ params["mix"])
    return grpo_loss.token_logp(
        hidden_RTD, params["unembed"], micro.target_RT, mask_RT=micro.mask_RT, chunk=16, shards=shards
    )


def toy_loss(logp_RT, entropy_RT, micro):
    """A clipped ratio with an entropy bonus: token-mean."""
    mask_RT = micro.mask_RT
    ratio_RT = jnp.exp(jnp.where(mask_RT, logp_RT - micro.old_logp_RT, 0))
    advantage_RT = micro.advantage_RT
    surrogate_RT = jnp.minimum(ratio_RT * advantage_RT, jnp.clip(ratio_RT, 0.8, 1.2) * advantage_RT)
    value_RT = jnp.where(mask_RT, -surrogate_RT - 0.01 * entropy_RT, 0)
    count = mask_RT.sum().astype(value_RT.dtype)
    return grpo_loss.LossTerms(
        value_RT.sum(), count, {"entropy": (entropy_RT.sum(), count)}, {"ratio_max": (ratio_RT * mask_RT).max()}
    )


def tree_difference(actual, expected):
    """Largest difference, relative to the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()) for a, b in pairs)
