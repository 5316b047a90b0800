"""Which settings contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import TYPE_CHECKING

from grpo_trainer.settings.paths import path_faults

if TYPE_CHECKING:
    from grpo_trainer.settings.schema import Settings

__all__ = ["contradictions"]


def contradictions(settings: Settings) -> Iterator[str]:
    """Combinations that would silently do nothing, or cannot work.

    Args:
        settings: each section valid by itself.

    Yields:
        Sentences that name the keys, what came, and what to do.
    """
    rollout, loss, optimizer = settings.rollout, settings.loss, settings.optimizer
    yield from path_faults(settings)
    if loss.kl_coefficient > 0 and loss.reference == "none":
        yield (
            f"loss.kl_coefficient is {loss.kl_coefficient:g} but loss.reference is `none`, so there is nothing to "
            "measure the KL against: set loss.reference=initial, or loss.kl_coefficient=0"
        )
    if loss.kl_coefficient == 0 and loss.reference != "none":
        yield (
            f"loss.reference is {loss.reference!r} but loss.kl_coefficient is 0, so it would do nothing: "
            "set loss.kl_coefficient (0.001 to 0.1 are usual), or loss.reference=none"
        )
    if loss.advantage in ("grpo", "dr-grpo", "rloo", "gdpo", "reinforce++-baseline") and rollout.group_size < 2:
        yield (
            f"rollout.group_size must be at least 2 for loss.advantage={loss.advantage}: a group of one has no "
            "other sample to be compared with, so every advantage would be 0"
        )
    yield from _of_the_objective(settings)
    if rollout.temperature == 0:
        yield (
            "rollout.temperature must be above 0: greedy samples of a group are all the same, so every advantage "
            "would be 0 (evaluation is greedy anyway)"
        )
    if rollout.top_k == 1:
        yield "rollout.top_k must not be 1: samples of a group would all be the same; use 0 for all tokens"
    for name in ("temperature", "top_p"):
        if getattr(settings.eval, name) is not None and not settings.eval.samples:
            yield f"eval.{name} does nothing for greedy decoding, and eval.samples is 0: set eval.samples"
    lora = settings.model.lora
    if not lora.rank and (lora.alpha or lora.rank_stabilized or lora.adapter):
        yield "model.lora.rank is 0, so the rest of model.lora would do nothing: set model.lora.rank (8 to 64)"
    if lora.rank and (not lora.targets or len(set(lora.targets)) < len(lora.targets)):
        yield f"model.lora.targets must name at least one matrix, and each once: got {list(lora.targets)}"
    if lora.rank and loss.reference not in ("none", "initial"):
        yield (
            f"loss.reference must be `initial` or `none` with model.lora, whose reference is the policy without "
            f"what its adapters learn: got {loss.reference!r}"
        )
    yield from _of_the_filter(settings)
    prompt = settings.prompt
    if prompt.template and "{prompt}" not in prompt.template:
        yield f"prompt.template must hold {{prompt}}, where the question goes: got {prompt.template!r}"
    if prompt.template and prompt.arguments:
        yield "prompt.arguments are those of the chat template, which prompt.template replaces: set one of the two"
    if not _is_date(prompt.date):
        yield f"prompt.date must be a day of the calendar as YYYY-MM-DD: got {prompt.date!r}"
    if prompt.examples and prompt.examples_file:
        yield "prompt.examples and prompt.examples_file must not both be set: take examples from one place"
    if rollout.prompts % loss.minibatches:
        yield (
            f"loss.minibatches must divide rollout.prompts (groups are kept whole): got {loss.minibatches} for "
            f"{rollout.prompts} prompts"
        )
    if 0 < loss.row_length < rollout.max_new_tokens:
        yield (
            f"loss.row_length must be 0 or at least rollout.max_new_tokens={rollout.max_new_tokens}, so that the "
            f"longest completion fits a row: got {loss.row_length}"
        )
    if settings.row_length % loss.blocks:
        yield (
            f"loss.blocks must divide loss.row_length={loss.row_length}: got {loss.blocks}. "
            f"Use rows of {settings.row_length + -settings.row_length % loss.blocks} tokens"
        )
    if loss.sizes > 1 and loss.prompt_sizes > 1:
        yield (
            f"loss.sizes={loss.sizes} and loss.prompt_sizes={loss.prompt_sizes} must not both be above 1: sizes of "
            "micro-batches differ in their prompt slots too. Set loss.prompt_sizes=1"
        )
    updates = settings.updates
    if optimizer.warmup_steps >= updates:
        yield (
            f"optimizer.warmup_steps must be below the run's {updates} optimizer updates (steps x loss.epochs x "
            f"loss.minibatches): got {optimizer.warmup_steps}; the learning rate would never reach its peak"
        )
    if optimizer.decay == "matrices" and not optimizer.weight_decay:
        yield "optimizer.decay=matrices does nothing while optimizer.weight_decay is 0: set it, or optimizer.decay=all"
    if optimizer.end_learning_rate and optimizer.schedule == "constant":
        yield (
            "optimizer.end_learning_rate does nothing for optimizer.schedule=constant: set it to 0, or choose linear "
            "or cosine"
        )
    if settings.cpu_devices > 0 and settings.slices:
        yield (
            f"cpu_devices={settings.cpu_devices} forces CPU devices but slices=[{', '.join(settings.slices)}] names "
            "TPU slices: set cpu_devices=0, or slices=[]"
        )


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _of_the_filter(settings: Settings) -> Iterator[str]:
    chosen, rate = settings.data.filter, settings.data.filter.pass_rate
    bounds = [f"data.filter.{name}" for name in ("min", "max") if getattr(chosen, name) is not None]
    if (bounds or chosen.values) and not chosen.column:
        yield f"{(bounds or ['data.filter.values'])[0]} does nothing without a column: set data.filter.column"
    if chosen.column and not (bounds or chosen.values):
        yield "data.filter.column keeps every problem: set data.filter.min, data.filter.max or data.filter.values too"
    if bounds and chosen.values:
        yield f"data.filter.values and {bounds[0]} must not both be set: keep problems by one of the two"
    if chosen.min is not None and chosen.max is not None and chosen.min > chosen.max:
        yield f"data.filter.min must be at most data.filter.max: got {chosen.min:g} and {chosen.max:g}"
    if rate.min > rate.max:
        yield f"data.filter.pass_rate.min must be at most data.filter.pass_rate.max: got {rate.min:g} and {rate.max:g}"
    if rate.records and (rate.min, rate.max) == (0, 1):
        yield "data.filter.pass_rate keeps every measured problem: set its min and max (0.1 and 0.9 are usual)"
    if not rate.records and (rate.min, rate.max) != (0, 1):
        yield (
            "data.filter.pass_rate.min and max do nothing without measured rates: set data.filter.pass_rate.records to "
            "a file of `eval --split train`"
        )


def _of_the_objective(settings: Settings) -> Iterator[str]:
    loss, rollout = settings.loss, settings.rollout
    if (loss.clip_low is None) != (loss.clip_high is None):
        yield (
            f"loss.clip_low and loss.clip_high must both be set or both be null: got {loss.clip_low} and "
            f"{loss.clip_high}"
        )
    if loss.clip_low is not None and loss.kind in ("sapo", "reinforce"):
        yield f"loss.clip_low and loss.clip_high do nothing for loss.kind={loss.kind}: set them to null"
    if loss.dual_clip is not None and loss.kind != "ppo":
        yield f"loss.dual_clip does nothing for loss.kind={loss.kind}: set it to null, or loss.kind=ppo"
    for name in ("sapo_positive", "sapo_negative"):
        if getattr(loss, name) is not None and loss.kind != "sapo":
            yield f"loss.{name} does nothing for loss.kind={loss.kind}: set it to null, or loss.kind=sapo"
    if loss.horizon and loss.aggregation != "fixed":
        yield f"loss.horizon does nothing for loss.aggregation={loss.aggregation}: set it to 0"
    if loss.kl == "k1" and loss.kl_in == "loss":
        yield (
            "loss.kl=k1 has no useful gradient as a term of the loss: use k1-straight-through, k2 or k3, or set "
            "loss.kl_in=reward"
        )
    if loss.kl_ratio and (loss.kl_in == "reward" or not loss.kl_coefficient):
        yield "loss.kl_ratio needs a KL in the loss: set loss.kl_coefficient and loss.kl_in=loss, or turn it off"
    if loss.kl_in == "reward" and not loss.kl_coefficient:
        yield "loss.kl_in=reward needs loss.kl_coefficient above 0: set it, or loss.kl_in=loss"
    if loss.advantage == "gdpo" and loss.kl_in == "reward":
        yield "loss.advantage=gdpo normalises each reward function apart and has no place for a KL: set loss.kl_in=loss"
    for name in ("correction_level", "correction_low", "correction_high"):
        if getattr(loss, name) is not None and loss.correction == "none":
            yield f"loss.{name} does nothing for loss.correction=none: set it to null, or choose a correction"
    if loss.correction_low == 1 and loss.correction_high == 1:
        yield "loss.correction_low must be below loss.correction_high: got 1 and 1, which makes every weight 1 or 0"
    if settings.reward.overlong_buffer > rollout.max_new_tokens:
        yield (
            f"reward.overlong_buffer must be at most rollout.max_new_tokens={rollout.max_new_tokens}: got "
            f"{settings.reward.overlong_buffer}"
        )
    if rollout.refills and loss.kl_coefficient:
        yield (
            "rollout.refills replaces groups without signal, which a KL term would learn from: set "
            "loss.kl_coefficient=0, or rollout.refills=0"
        )
