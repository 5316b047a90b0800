"""What one update computes: the network's log-probabilities of a packed micro-batch, and the loss they enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from grpo_trainer.settings.schema import Config
from grpo_loss import (
    LossTerms,
    MicroBatch,
    policy_loss,
    token_logp,
)
from grpo_sampler import merge


def make_forward(graphdef: Any, config: Config, *, shards: int) -> Callable[[Any, MicroBatch], tuple[Array, Array]]:
    """The training forward: each prompt once, its packed completions after it, never a [batch, time, vocabulary] array.

    Args:
        graphdef: static part of the network, from `grpo_sampler.split`.
        config: the run's; the temperature that completions are drawn at is the one they are scored at.
        shards: blocks that the rows of a micro-batch are spread over (dp times fsdp).

    Returns:
        `(params, micro) -> (logp_RT, entropy_RT)` in nats.
    """

    def forward(params: Any, micro: Any) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
        model = merge(graphdef, params)
        hidden_RTD = model.with_prompts(
            micro.prompt_tokens_PT,
            micro.prompt_length_P,
            micro.tokens_RT,
            micro.positions_RT,
            micro.segment_RT,
            micro.prompt_RC,
            shards=shards,
        )
        return token_logp(
            hidden_RTD,
            model.unembedding,
            micro.target_RT,
            temperature=config.rollout.temperature,
            mask_RT=micro.mask_RT,
            shards=shards,
        )

    return forward


def make_loss(config: Config) -> Callable[[Array, Array, MicroBatch], LossTerms]:
    """The policy loss of the config, over one micro-batch.

    Args:
        config: the run's.

    Returns:
        `(logp_RT, entropy_RT, micro) -> LossTerms`. It reads from `micro.data`: `advantage`, `sampler_logp`, `old_logp`
        when a rollout is used for several updates, and `reference_logp` when there is a KL term.
    """
    settings = config.loss

    def loss(logp_RT: Array, entropy_RT: Array, micro: Any) -> LossTerms:
        return policy_loss(
            logp_RT,
            old_logp_RT=micro.data.get("old_logp"),  # None: one update a rollout, so the old policy is this one
            advantage_RT=micro.data["advantage"],
            mask_RT=micro.mask_RT,
            segment_RT=micro.segment_RT,
            kind=settings.kind,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            aggregation=settings.aggregation,
            horizon=config.rollout.max_new_tokens if settings.aggregation == "fixed" else None,
            reference_logp_RT=micro.data.get("reference_logp"),
            kl_coefficient=settings.kl_coefficient,
            entropy_RT=entropy_RT,
            entropy_coefficient=settings.entropy_coefficient,
            sampler_logp_RT=micro.data["sampler_logp"],
        )

    return loss
