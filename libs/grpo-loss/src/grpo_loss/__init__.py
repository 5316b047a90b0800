"""Advantages, policy losses, fused log-probabilities and the update step of GRPO, in JAX."""

from ._advantages import (
    clip_advantage,
    gdpo_advantage,
    group_advantage,
    groups_with_signal,
    overlong_penalty,
    rloo_advantage,
)
from ._aggregate import aggregate
from ._errors import LossError
from ._importance import importance_weight
from ._kl import kl_estimate
from ._layout import MicroBatch, PackedBatch, pack_tokens, unpack_tokens
from ._pack import pack, pad, split_minibatches
from ._plan import PackShape
from ._policy_loss import policy_loss
from ._returns import (
    gae,
    reinforce_plus_plus_advantage,
    reinforce_plus_plus_baseline_advantage,
    token_reward,
)
from ._terms import LossTerms
from ._token_logp import token_logp
from ._token_masks import drop_truncated, top_entropy_mask
from ._update import TrainState, accumulate, constant, init_state, make_score, make_update, warmup_cosine
from ._whiten import Moments, moments, whiten

__all__ = [
    "LossError",
    "LossTerms",
    "MicroBatch",
    "Moments",
    "PackShape",
    "PackedBatch",
    "TrainState",
    "accumulate",
    "aggregate",
    "clip_advantage",
    "constant",
    "drop_truncated",
    "gae",
    "gdpo_advantage",
    "group_advantage",
    "groups_with_signal",
    "importance_weight",
    "init_state",
    "kl_estimate",
    "make_score",
    "make_update",
    "moments",
    "overlong_penalty",
    "pack",
    "pack_tokens",
    "pad",
    "policy_loss",
    "reinforce_plus_plus_advantage",
    "reinforce_plus_plus_baseline_advantage",
    "rloo_advantage",
    "split_minibatches",
    "token_logp",
    "token_reward",
    "top_entropy_mask",
    "unpack_tokens",
    "warmup_cosine",
    "whiten",
]
