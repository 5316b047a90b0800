"""The least that a step can take, by arithmetic and before anything is compiled.

Counted are matrix products, weights and live keys and values read from memory once for each use, and the collectives
that a mesh cannot do without; not activations, logits, or what a compiler adds. Every completion runs to its limit.
Weights are taken to be larger than a chip's on-chip memory, which could keep those of a toy from step to step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from grpo_loss import logit_chunks
from grpo_mesh import Chip, Slice
from grpo_mesh.preflight import Phase, Work
from grpo_sampler import ModelConfig
from grpo_trainer.settings.schema import Settings

__all__ = ["least_activations", "least_rollout", "least_update"]


@dataclass(frozen=True)
class _Matrices:
    """Parameters of all layers, of their down projections alone, and of the unembedding."""

    layers: int
    down: int
    head: int

    @classmethod
    def of(cls, model: ModelConfig) -> _Matrices:
        queries, keys = model.query_heads * model.head_size, model.kv_heads * model.head_size
        down = model.width * model.mlp_width
        layer = 2 * model.width * (queries + keys) + 3 * down
        return cls(model.layers * layer, model.layers * down, model.vocab_size * model.width)


def least_rollout(settings: Settings, model: ModelConfig, target: Slice, *, tp: int) -> Phase:
    """What sampling the completions of a step takes at least.

    Args:
        settings: sections `data`, `model` and `rollout`.
        model: dimensions of the policy.
        target: the slice.
        tp: devices that split each product of decoding; the others spread the sequences.

    Returns:
        Work of one device and its seconds.
    """
    rollout, prompt, size = settings.rollout, settings.data.max_prompt_length - 1, _itemsize(settings)
    weights, shards = _Matrices.of(model), target.chips // tp
    sequences = rollout.prompts * rollout.group_size
    slots = min(rollout.slots or sequences, sequences)
    waves = math.ceil(math.ceil(sequences / shards) / math.ceil(slots / shards))
    steps, tokens = rollout.max_new_tokens * waves, sequences * rollout.max_new_tokens
    keys = prompt + rollout.max_new_tokens / 2  # of a token, on average
    live = slots / shards * (prompt / rollout.group_size + rollout.max_new_tokens / 2)  # a group shares its prompt
    kv_heads = math.lcm(model.kv_heads, tp) // tp
    flops = (
        2 * (weights.layers + weights.head) * tokens
        + 2 * weights.layers * _unless_last(model, rollout.prompts * prompt)
        + 4 * model.layers * model.query_heads * model.head_size * keys * tokens
    )
    cache = 2 * model.layers * kv_heads * model.head_size * live
    sums = 2 * model.layers * model.width * slots / shards if tp > 1 else 0
    return _phase(
        "rollout",
        target.chip,
        flops / target.chips,
        steps * size * ((weights.layers + weights.head) / tp + cache),
        steps * size * sums,
    )


def least_update(settings: Settings, model: ModelConfig, target: Slice, *, dp: int, fsdp: int, tp: int) -> Phase:
    """What the optimizer updates of a step take at least.

    Args:
        settings: sections `data`, `loss`, `model` and `rollout`.
        model: dimensions of the policy.
        target: the slice.
        dp, fsdp, tp: sizes of the training mesh's axes.

    Returns:
        Work of one device and its seconds.
    """
    rollout, loss, prompt, size = (
        settings.rollout,
        settings.loss,
        settings.data.max_prompt_length - 1,
        _itemsize(settings),
    )
    weights, shards = _Matrices.of(model), dp * fsdp
    full, again = not settings.model.lora.rank, settings.model.remat
    rows = rollout.prompts * math.ceil(rollout.group_size / (settings.row_length // rollout.max_new_tokens))
    updates = loss.epochs * loss.minibatches
    micro = updates * math.ceil(rows / loss.minibatches / loss.rows)
    tokens = loss.epochs * rollout.prompts * rollout.group_size * rollout.max_new_tokens
    prompts = loss.epochs * rollout.prompts * prompt
    pairs = tokens * (prompt + rollout.max_new_tokens / 2)
    chunked = logit_chunks(loss.rows // shards * settings.row_length, model.vocab_size, loss.chunk or None) > 1
    # Forward, and backward to inputs and weights. What is recomputed stops short of the product that ends a layer.
    flops = (
        2
        * (tokens + _unless_last(model, prompts))
        * ((2 + full) * weights.layers + again * (weights.layers - weights.down))
        + 2 * tokens * (2 + full + chunked) * weights.head
        + (12 + 4 * again) * pairs * model.layers * model.query_heads * model.head_size
    )
    held = (weights.layers + weights.head) / (fsdp * tp)
    moments = 8 if settings.optimizer.name in ("adam", "adamw") else 0  # bytes of a parameter; others keep fewer
    state = jnp.dtype(settings.model.dtype).itemsize + moments
    optimizer = updates * 2 * state * held if full else 0
    traffic = micro * size * ((2 + again) * weights.layers + 2 * weights.head) / tp + optimizer
    # Layers forward and backward, and their gradients; the unembedding is the same for all micro-batches of an update.
    gathers = size * (micro * (2 + full) * weights.layers + updates * weights.head) / tp if fsdp > 1 else 0
    sums = (4 + again) * model.layers * model.width * size * tokens / shards if tp > 1 else 0
    return _phase("update", target.chip, flops / target.chips, traffic, gathers + sums)


def least_activations(settings: Settings, model: ModelConfig, *, shards: int, tp: int) -> float:
    """Bytes that the forward pass of a micro-batch leaves on a device for the backward pass, at least.

    Args:
        settings: sections `loss`, `model` and `rollout`.
        model: dimensions of the policy.
        shards: that rows are spread over.
        tp: devices that split each product.

    Returns:
        With remat the input of every layer, without it what its products need.
    """
    kept: float = model.width
    if not settings.model.remat:
        kept += model.width + 2 * (model.query_heads * model.head_size + model.mlp_width) / tp
    return settings.loss.rows / shards * settings.row_length * model.layers * kept * _itemsize(settings)


def _phase(name: str, chip: Chip, flops: float, traffic: float, network: float) -> Phase:
    work = Work(flops, traffic, {"all": (0, network)})
    return Phase(name, work, flops / chip.flops, traffic / chip.hbm_bandwidth, network / chip.ici_bandwidth)


def _unless_last(model: ModelConfig, prompts: float) -> float:
    """Tokens of prompts over all layers but the last, in which only their keys and values are needed."""
    return prompts * (model.layers - 1) / model.layers


def _itemsize(settings: Settings) -> int:
    return jnp.dtype(settings.model.compute_dtype).itemsize
