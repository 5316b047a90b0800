"""What one update computes: the network's log-probabilities of a packed micro-batch, and the loss they enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from grpo_loss import (
    KL,
    Aggregation,
    Correction,
    Loss,
    Objective,
    cispo,
    drop_outside,
    fixed,
    gspo,
    gspo_token,
    make_loss,
    ppo,
    reinforce,
    sapo,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_logp,
    token_mean,
    truncate,
)
from grpo_sampler import join_adapters, merge
from grpo_trainer.settings.schema import LossSettings, Settings

__all__ = ["idle_aggregation", "make_forward", "make_policy_loss"]


def make_forward(graphdef: Any, settings: Settings, *, shards: int) -> Callable[..., tuple[Array, Array]]:
    """The training forward: each prompt once, its packed completions after it, never a [batch, time, vocabulary] array.

    Args:
        graphdef: static part of the network, from `grpo_sampler.split`.
        settings: completions are scored at the temperature they are drawn at.
        shards: parts that the rows of a micro-batch are spread over (dp times fsdp).

    Returns:
        `(params, micro) -> (logp_RT, entropy_RT)` in nats; with adapters `(adapters, micro, base)`.
    """

    def forward(params: Any, micro: Any, *base: Any) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
        model = merge(graphdef, join_adapters(base[0], params) if base else params)
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
            temperature=settings.rollout.temperature,
            mask_RT=micro.mask_RT,
            chunk=settings.loss.chunk or None,
            shards=shards,
        )

    return forward


def make_policy_loss(settings: Settings) -> Loss:
    """The policy loss of the settings, over one micro-batch.

    Args:
        settings: the section `loss`.

    Returns:
        `(logp_RT, entropy_RT, micro) -> LossTerms`.
    """
    loss = settings.loss
    return make_loss(
        objective=_objective(loss),
        aggregation=_aggregation(settings),
        kl=KL(loss.kl, loss.kl_coefficient, ratio=loss.kl_ratio) if _kl_in_loss(loss) else None,
        entropy_coefficient=loss.entropy_coefficient,
        correction=_correction(loss),
    )


def idle_aggregation(settings: Settings) -> Aggregation | None:
    """How sequences without an advantage count in the denominator; they are not computed.

    Args:
        settings: the section `loss`.

    Returns:
        The loss's aggregation; None where a KL or entropy term learns from every sequence.
    """
    needed = _kl_in_loss(settings.loss) or settings.loss.entropy_coefficient
    return None if needed else _aggregation(settings)


def _kl_in_loss(loss: LossSettings) -> bool:
    return loss.kl_in == "loss" and loss.kl_coefficient > 0


def _objective(loss: LossSettings) -> Objective:
    clip: Any = {} if loss.clip_low is None else {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
    match loss.kind:
        case "ppo":
            return ppo(**clip, dual_clip=loss.dual_clip)
        case "gspo":
            return gspo(**clip)
        case "gspo-token":
            return gspo_token(**clip)
        case "cispo":
            return cispo(**clip)
        case "sapo":
            return sapo(**_given(positive=loss.sapo_positive, negative=loss.sapo_negative))
        case "reinforce":
            return reinforce()


def _aggregation(settings: Settings) -> Aggregation:
    match settings.loss.aggregation:
        case "token-mean":
            return token_mean
        case "sequence-mean-token-mean":
            return sequence_mean_token_mean
        case "sequence-mean-token-sum":
            return sequence_mean_token_sum
        case "fixed":
            return fixed(settings.loss.horizon or settings.rollout.max_new_tokens)


def _correction(loss: LossSettings) -> Correction | None:
    if loss.correction == "none":
        return None
    given = _given(level=loss.correction_level, low=loss.correction_low, high=loss.correction_high)
    return truncate(**given) if loss.correction == "truncate" else drop_outside(**given)


def _given(**arguments: Any) -> dict[str, Any]:
    """Those that are not null: the library's defaults stand for the others."""
    return {name: value for name, value in arguments.items() if value is not None}
