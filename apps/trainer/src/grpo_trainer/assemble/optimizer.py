"""The optimizer and its learning rate."""

from __future__ import annotations

import optax

from grpo_trainer.settings.schema import Settings

__all__ = ["make_optimizer"]


def make_optimizer(settings: Settings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run.

    Args:
        settings: the section `optimizer`, and what decides how many updates there will be.

    Returns:
        The optimizer, and its learning rate as a function of the updates applied.
    """
    given = settings.optimizer
    updates = settings.steps * settings.loss.epochs * settings.loss.minibatches
    start = 0.0 if given.warmup_steps else given.learning_rate
    if given.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(start, given.learning_rate, given.warmup_steps, updates)
    else:
        schedule = optax.warmup_constant_schedule(start, given.learning_rate, given.warmup_steps)
    return optax.adamw(schedule, b1=given.b1, b2=given.b2, weight_decay=given.weight_decay), schedule
