"""The embedded policy, from scratch: a small Qwen2 model, taught as `grpo_gsm8k.embedded.lessons` says, then saved."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from grpo_contracts import FinishReason, PolicyIdentity, SamplingLaw
from grpo_gsm8k import grading as reward
from grpo_gsm8k.embedded.lessons import Lessons, Teacher, lessons
from grpo_gsm8k.embedded.tokenizer import load_tokenizer, make_tokenizer
from grpo_loss import token_logp
from grpo_sampler import ModelConfig, Sampler, Transformer, merge, save, split
from grpo_trainer.data.sources import read_records
from grpo_trainer.data.stream import tokenize
from grpo_trainer.rewards.scoring import Rewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PROMPT, MAX_NEW = 48, 64  # tokens that hold every generated problem and solution


@dataclass(frozen=True)
class Recipe:
    """How the embedded policy is trained.

    Args:
        seed: of the weights.
        steps: optimizer updates.
        learning_rate: of Muon on the blocks' matrices, after a short warm-up; falls in a line to 0.
        adam_rate: the same of Adam on the embedding, norms and biases.
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
        """The model's configuration."""
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


@dataclass(frozen=True)
class Figures:
    """What a policy can do on held-out problems.

    Args:
        greedy: share of right answers, decoded greedily.
        sampled: share of right answers at temperature 1.
        pass_at_8: share of problems with a right answer among eight samples.
        mixed: share of problems whose eight samples hold right and wrong answers, from which a group learns.
        form: share of greedy completions in the right form.
    """

    greedy: float
    sampled: float
    pass_at_8: float
    mixed: float
    form: float

    def __str__(self) -> str:
        return ", ".join(f"{field.name.replace('_', ' ')} {getattr(self, field.name):.1%}" for field in fields(self))


def train(config: ModelConfig, batches: Iterator[Lessons], recipe: Recipe, *, every: int = 50) -> Any:
    """Train a model from random weights to write the solutions.

    Args:
        config: the model.
        batches: of packed solutions.
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
        logp_RT, _ = token_logp(hidden_RTD, model.unembedding, batch["target_RT"], mask_RT=batch["learn_RT"])
        return -logp_RT.sum() / batch["learn_RT"].sum()

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
            print(
                f"step {step} of {recipe.steps}: loss {float(value):.4f} nats, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return params


def measure(config: ModelConfig, params: Any, tokenizer: PreTrainedTokenizerBase, *, problems: int = 512) -> Figures:
    """Measure what a policy can do on held-out problems, greedily and in eight samples at temperature 1.

    Args:
        config: the model.
        params: its parameters.
        tokenizer: its tokenizer.
        problems: how many.

    Returns:
        The figures.
    """
    records = read_records("embedded", "test", limit=problems)
    asked = tokenize(records, tokenizer, max_length=MAX_PROMPT, vocab_size=config.vocab_size).ask(range(len(records)))
    rewards = Rewards({}, {}, 1.0, tokenizer)
    right, form = {}, {}
    for temperature, group in ((0.0, 1), (1.0, 8)):
        law = SamplingLaw(temperature=temperature, stop_ids=config.eos_ids)
        sampler = Sampler(
            config, law, max_prompt_length=MAX_PROMPT, max_new_tokens=MAX_NEW, pad_id=asked.prompts.pad_id
        )
        rollout = sampler.generate(
            params, asked.prompts, group_size=group, seed=0, step=0, policy=PolicyIdentity(0, "")
        )
        texts = rewards.texts(rollout, range(len(rollout.tokens_BT)))
        answers = [records[index].answer for index in rollout.group_B]
        right[group] = np.array(reward.answer(completions=texts, answers=answers), float).reshape(-1, group)
        ended = [reason == FinishReason.STOP for reason in rollout.finish_B]
        form[group] = np.array(reward.format(completions=texts, finished=ended), float).mean()
    hits = right[8].mean(axis=1)
    return Figures(
        greedy=float(right[1].mean()),
        sampled=float(hits.mean()),
        pass_at_8=float((hits > 0).mean()),
        mixed=float(((hits > 0) & (hits < 1)).mean()),
        form=float(form[1]),
    )


def main(_: Task, arguments: Sequence[str]) -> int:
    """``warmstart``: make the tokenizer and the policy and write them in Hugging Face layout."""
    parser = argparse.ArgumentParser(prog="grpo-gsm8k warmstart", description=main.__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "policy",
        help="folder to write (default: the embedded policy itself)",
    )
    for field in {field.name: field for field in (*fields(Recipe), *fields(Teacher))}.values():
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args(arguments))
    folder = given.pop("out")
    recipe = Recipe(**{field.name: given[field.name] for field in fields(Recipe)})
    teacher = Teacher(**{field.name: given[field.name] for field in fields(Teacher)})

    started = time.monotonic()
    vocab_size = make_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    config = recipe.model(vocab_size, cast("int", tokenizer.eos_token_id))
    params = train(config, lessons(tokenizer, teacher), recipe)
    save(folder, config, params)
    generation = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": True,
        "temperature": 1.0,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{folder}: {size:,} parameters, {time.monotonic() - started:.0f} s")
    print(f"held-out problems: {measure(config, params, tokenizer)}")
    return 0


def _rescaled(params: Any, config: ModelConfig) -> Any:
    """Initial matrices with the inverse root of their fan-in for a spread: 0.02 suits models ten times as wide."""
    residual = (2 * config.layers) ** -0.5  # two additions a block to the residual stream
    inward = config.width**-0.5
    spread = {
        "q": inward,
        "k": inward,
        "v": inward,
        "gate": inward,
        "up": inward,
        "o": residual * (config.query_heads * config.head_size) ** -0.5,
        "down": residual * config.mlp_width**-0.5,
    }
    layers = {name: leaf * (spread[name] / 0.02) if name in spread else leaf for name, leaf in params["layers"].items()}
    return params | {"layers": layers}


def _optimizer(recipe: Recipe, params: Any) -> optax.GradientTransformation:
    """Muon on the blocks' matrices, Adam on the rest: half the steps of Adam alone here.

    Source: Muon (Jordan, 2024), scaled to the size of Adam's updates as in arXiv:2502.16982.
    """

    def rate(peak: float) -> optax.Schedule:
        parts = [optax.linear_schedule(0.0, peak, 30), optax.linear_schedule(peak, 0.0, max(recipe.steps - 30, 1))]
        return optax.join_schedules(parts, [30])

    # Which axes of a stacked matrix are summed over and which come out; the leading layers' axis is a batch.
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
