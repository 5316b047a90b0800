"""A small Qwen2 policy, trained from random weights on examples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from grpo_loss import token_logp
from grpo_sampler import ModelConfig, Transformer, merge, split
from grpo_trainer.assemble.teach.examples import SupervisedBatch

__all__ = ["Recipe", "train_policy"]

_WARMUP = 30  # steps


@dataclass(frozen=True)
class Recipe:
    """How a policy is trained.

    Args:
        seed: of the initial weights.
        steps: optimizer updates.
        learning_rate: peak rate of Muon, which updates the blocks' matrices; falls linearly to 0 after a warm-up.
        adam_rate: peak rate of Adam, which updates embedding, norms and biases; the same schedule.
        width, mlp_width, layers, query_heads, kv_heads, head_size: the model.
    """

    seed: int = 0
    steps: int = 1_200
    learning_rate: float = 1.2e-2
    adam_rate: float = 3e-3
    width: int = 128
    mlp_width: int = 512
    layers: int = 4
    query_heads: int = 4
    kv_heads: int = 2
    head_size: int = 32

    def model(self, vocab_size: int, end_id: int) -> ModelConfig:
        """The configuration of the model, for a tokenizer with this vocabulary and end token."""
        return ModelConfig(
            family="qwen2",
            vocab_size=vocab_size,
            width=self.width,
            mlp_width=self.mlp_width,
            layers=self.layers,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            tied=True,
            qkv_bias=True,
            max_positions=1024,
            eos_ids=(end_id,),
        )


def train_policy(
    config: ModelConfig, batches: Iterator[SupervisedBatch], recipe: Recipe, *, every: int = 50
) -> dict[str, Any]:
    """Train a model from random weights to write the examples' completions.

    Args:
        config: the model.
        batches: at least ``recipe.steps`` of them.
        recipe: steps and learning rates.
        every: steps between printed lines.

    Returns:
        The parameters.
    """
    graphdef, params = split(Transformer(config, rngs=nnx.Rngs(recipe.seed)))
    params = _rescaled(params, config)
    optimizer = _optimizer(recipe, params)

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = merge(graphdef, params)
        hidden_RTD = model(batch["tokens_RT"], batch["positions_RT"], batch["segment_RT"])
        logp_RT, _ = token_logp(hidden_RTD, model.unembedding, batch["target_RT"], mask_RT=batch["mask_RT"])
        return -logp_RT.sum() / batch["mask_RT"].sum()

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    state = optimizer.init(params)
    started = time.monotonic()
    for step, batch in enumerate(islice(batches, recipe.steps), 1):
        params, state, value = update(params, state, vars(batch))
        if step % every == 0 or step == recipe.steps:
            seconds = time.monotonic() - started
            print(f"step {step} of {recipe.steps}: loss {float(value):.4f} nats, {seconds:.0f} s", flush=True)
    return params


def _rescaled(params: Any, config: ModelConfig) -> Any:
    """Draw each matrix with a standard deviation of 1/sqrt(fan-in); the network's 0.02 suits models ten times wider."""
    residual = (2 * config.layers) ** -0.5  # each block adds to the residual stream twice
    inward = config.width**-0.5
    deviation = {
        "q": inward,
        "k": inward,
        "v": inward,
        "gate": inward,
        "up": inward,
        "o": residual * (config.query_heads * config.head_size) ** -0.5,
        "down": residual * config.mlp_width**-0.5,
    }
    layers = {
        name: leaf * (deviation[name] / 0.02) if name in deviation else leaf for name, leaf in params["layers"].items()
    }
    return params | {"layers": layers}


def _optimizer(recipe: Recipe, params: Any) -> optax.GradientTransformation:
    """Muon for the blocks' matrices and Adam for the rest, which needs half the steps of Adam alone.

    Source: Muon (Jordan, 2024), scaled to the size of Adam's updates as in arXiv:2502.16982.
    """

    def rate(peak: float) -> optax.Schedule:
        decay = max(recipe.steps - _WARMUP, 1)
        parts = [optax.linear_schedule(0.0, peak, _WARMUP), optax.linear_schedule(peak, 0.0, decay)]
        return optax.join_schedules(parts, [_WARMUP])

    # Input and output axes of each stacked matrix; the leading axis, the layers, is a batch.
    inward, outward = MuonDimensionNumbers((1,), (2, 3)), MuonDimensionNumbers((1, 2), (3,))
    plain = MuonDimensionNumbers((1,), (2,))
    axes = {"q": inward, "k": inward, "v": inward, "o": outward, "gate": plain, "up": plain, "down": plain}
    numbers: Any = dict.fromkeys(params) | {"layers": {name: axes.get(name) for name in params["layers"]}}
    return muon(
        rate(recipe.learning_rate),
        adam_learning_rate=rate(recipe.adam_rate),
        weight_decay=0.05,
        adam_weight_decay=0.0,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=0.2,
    )
