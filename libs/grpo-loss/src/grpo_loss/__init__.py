"""Advantages, policy losses, fused log-probabilities and the update step of GRPO, in JAX."""

from grpo_loss._advantages import (
    gdpo_advantage,
    group_advantage,
    groups_with_signal,
    overlong_penalty,
    rloo_advantage,
)
from grpo_loss._aggregate import (
    Aggregation,
    aggregate,
    fixed,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
)
from grpo_loss._errors import LossError
from grpo_loss._importance import Correction, drop_outside, importance_weight, truncate
from grpo_loss._kl import KL, kl_estimate
from grpo_loss._layout import Forward, MicroBatch, MicroSize, PackedBatch, pack_tokens, unpack_tokens
from grpo_loss._minibatches import iterate_minibatches, split_minibatches
from grpo_loss._objectives import (
    Objective,
    Surrogate,
    TokenTerms,
    cispo,
    gspo,
    gspo_token,
    ppo,
    reinforce,
    sapo,
)
from grpo_loss._pack import abstract_batch, pack, pad
from grpo_loss._padding import computed_positions
from grpo_loss._policy_loss import make_loss, policy_loss
from grpo_loss._returns import (
    gae,
    reinforce_plus_plus_advantage,
    reinforce_plus_plus_baseline_advantage,
    token_reward,
)
from grpo_loss._shape import PackShape
from grpo_loss._terms import Loss, LossTerms
from grpo_loss._token_logp import logit_chunks, token_logp
from grpo_loss._token_masks import drop_truncated, top_entropy_mask
from grpo_loss._update import Score, TrainState, Update, accumulate, init_state, make_score, make_update
from grpo_loss._whiten import Moments, moments, whiten

__all__ = [
    "KL",
    "Aggregation",
    "Correction",
    "Forward",
    "Loss",
    "LossError",
    "LossTerms",
    "MicroBatch",
    "MicroSize",
    "Moments",
    "Objective",
    "PackShape",
    "PackedBatch",
    "Score",
    "Surrogate",
    "TokenTerms",
    "TrainState",
    "Update",
    "abstract_batch",
    "accumulate",
    "aggregate",
    "cispo",
    "computed_positions",
    "drop_outside",
    "drop_truncated",
    "fixed",
    "gae",
    "gdpo_advantage",
    "group_advantage",
    "groups_with_signal",
    "gspo",
    "gspo_token",
    "importance_weight",
    "init_state",
    "iterate_minibatches",
    "kl_estimate",
    "logit_chunks",
    "make_loss",
    "make_score",
    "make_update",
    "moments",
    "overlong_penalty",
    "pack",
    "pack_tokens",
    "pad",
    "policy_loss",
    "ppo",
    "reinforce",
    "reinforce_plus_plus_advantage",
    "reinforce_plus_plus_baseline_advantage",
    "rloo_advantage",
    "sapo",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "split_minibatches",
    "token_logp",
    "token_mean",
    "token_reward",
    "top_entropy_mask",
    "truncate",
    "unpack_tokens",
    "whiten",
]
