"""What to change in a run that does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_loss import logit_chunks
from grpo_mesh import bytes_per_device
from grpo_mesh.preflight import Verdict, format_bytes, larger_slice
from grpo_sampler import decoding_sizes
from grpo_trainer.assemble.blueprint import Blueprint

__all__ = ["advice"]


def advice(plan: Blueprint, verdict: Verdict) -> list[str]:
    """Say what would make a run smaller on each device.

    Args:
        plan: the run.
        verdict: on its programs.

    Returns:
        Settings and what each does, the cheapest first; empty if the run fits.
    """
    if verdict.fits:
        return []
    return [*_smaller_programs(plan, verdict.fullest.phase), *_other_layouts(plan, verdict)]


def _smaller_programs(plan: Blueprint, phase: str) -> Iterator[str]:
    settings, shards = plan.settings, plan.shards
    if phase in ("update", "scoring"):
        if not settings.model.remat:
            yield "model.remat=true: keep one activation a layer instead of all of them"
        if (rows := settings.loss.rows) > shards:
            fewer = max(shards, rows // 2 // shards * shards)
            yield f"loss.rows={fewer}: smaller micro-batches, the same update"
        tokens, vocabulary = plan.pack_shape.rows // shards * settings.row_length, plan.model.vocab_size
        if logit_chunks(tokens, vocabulary, settings.loss.chunk or None) < logit_chunks(tokens, vocabulary):
            yield "loss.chunk=0: logits of fewer tokens at once, the same update"
        shortest = settings.rollout.max_new_tokens
        shortest += -shortest % settings.loss.blocks
        if settings.row_length > shortest:
            yield f"loss.row_length={shortest}: shorter rows, the same update"
    elif phase in ("rollout", "evaluation"):
        own, shards = phase == "evaluation" and plan.evaluator is not plan.sampler, plan.rollout_shards
        if (slots := (plan.evaluator if own else plan.sampler).slots) > shards:
            key = "eval.slots" if own else "rollout.slots"
            yield f"{key}={max(shards, slots // 2)}: fewer sequences at once, a smaller KV cache"
    if settings.model.compute_dtype == "float32":
        yield "model.compute_dtype=bfloat16: half the bytes of activations, decoding weights and cache"


def _other_layouts(plan: Blueprint, verdict: Verdict) -> Iterator[str]:
    target, tensor, decoding = verdict.target, plan.tensor, plan.rollout_mesh.shape["tp"]
    wider = next((size for size in decoding_sizes(plan.model, target.chips) if size > decoding), None)
    if wider:
        now = f"1/{decoding}" if decoding > 1 else "all of them"
        yield f"rollout.mesh=dp:-1,tp:{wider}: decoding holds 1/{wider} of the weights a device instead of {now}"
    if plan.mesh.shape["dp"] > 1:
        yield f"mesh=dp:1,fsdp:-1,tp:{tensor}: no second copy of parameters and optimizer state"
    usable = target.chip.usable_bytes
    if larger := larger_slice(target, verdict.peak / usable):
        settled = bytes_per_device(plan.state) + bytes_per_device(plan.reference)
        yield (
            f"--slice {larger}: parameters and optimizer take {format_bytes(settled)} of a device here, and "
            f"{format_bytes(verdict.peak - usable)} are missing"
        )
