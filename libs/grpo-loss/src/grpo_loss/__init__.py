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
from ._policy_loss import policy_loss
from ._returns import (
    gae,
    reinforce_plus_plus_advantage,
    reinforce_plus_plus_baseline_advantage,
    token_reward,
)
from ._terms import LossTerms
from ._token_masks import drop_truncated, top_entropy_mask
from ._whiten import Moments, moments, whiten

__all__ = [
    "LossError",
    "LossTerms",
    "Moments",
    "aggregate",
    "clip_advantage",
    "drop_truncated",
    "gae",
    "gdpo_advantage",
    "group_advantage",
    "groups_with_signal",
    "importance_weight",
    "kl_estimate",
    "moments",
    "overlong_penalty",
    "policy_loss",
    "reinforce_plus_plus_advantage",
    "reinforce_plus_plus_baseline_advantage",
    "rloo_advantage",
    "token_reward",
    "top_entropy_mask",
    "whiten",
]
