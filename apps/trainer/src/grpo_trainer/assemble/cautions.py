"""What a practitioner would warn of before a run begins; none of it is an error."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_trainer.settings.schema import Settings

__all__ = ["cautions"]

# For networks above so many parameters, recipes with optimizers of Adam's kind use learning rates of about 1e-6 for all
# of them, and ten to a hundred times as much for adapters; a toy that learns from scratch wants far more.
_LARGE = 300_000_000
_FULL_RATES, _ADAPTER_RATES = (1e-8, 1e-5), (1e-6, 1e-3)
_LIKE_ADAM = ("adamw", "adam", "lion")
_MANY_DROPPED = 0.05


def cautions(settings: Settings, *, parameters: int, kept: int, dropped: int) -> Iterator[str]:
    """Say in plain words what may be meant, and usually is a mistake.

    Args:
        settings: resolved.
        parameters: of the network, frozen ones too.
        kept: training problems that fit.
        dropped: training problems that are too long.

    Yields:
        Sentences that name the settings.
    """
    rollout, loss, optimizer = settings.rollout, settings.loss, settings.optimizer
    filters = (("top_k", rollout.top_k, 0), ("top_p", rollout.top_p, 1), ("min_p", rollout.min_p, 0))
    cut = [f"rollout.{name}={value:g}" for name, value, off in filters if value != off]
    if cut and loss.correction == "none":
        yield (
            f"{' and '.join(cut)} samples from fewer tokens than the policy that learns: its gradient is then that of "
            "another policy. Turn filters off, or set loss.correction=truncate"
        )
    for name, texts in (("rollout.stop", rollout.stop), ("prompt.template", (settings.prompt.template,))):
        if any("\\n" in text for text in texts):
            yield (
                f"{name} holds a backslash and an n, not a line break: in a shell, put single quotes around the "
                f"setting and double quotes around the text, as in --set 'rollout.stop=[\"\\n\\n\"]'"
            )
    low, high = _ADAPTER_RATES if settings.model.lora.rank else _FULL_RATES
    if parameters > _LARGE and optimizer.name in _LIKE_ADAM and not low <= optimizer.learning_rate <= high:
        trained = "adapters" if settings.model.lora.rank else "all parameters"
        yield (
            f"optimizer.learning_rate={optimizer.learning_rate:g} is far from what recipes use to train {trained} of a "
            f"network of {parameters:,}: {low:g} to {high:g}"
        )
    if dropped > _MANY_DROPPED * (kept + dropped):
        yield (
            f"{dropped:,} of {kept + dropped:,} training problems are longer than data.max_prompt_length="
            f"{settings.data.max_prompt_length} and were dropped: what is left may be easier. Raise the limit"
        )
