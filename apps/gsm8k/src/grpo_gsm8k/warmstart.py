"""The embedded policy, from scratch: a small Qwen2 model whose unreliable teacher left it something to learn.

Reinforcement learning sharpens what a policy can do now and then. So the teacher here works every problem with right
arithmetic, but on the templates marked ``hard`` it follows the common mistake (stops a step early, adds what is to be
taken away) more often than the right procedure, and now and then it forgets the ``####`` line. A policy trained on that
makes the mistake when decoded greedily and finds the right way in some of its samples: what rewards can teach in a few
dozen steps, without a single worked solution.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from flax import nnx

from grpo_contracts import PolicyIdentity, SamplingLaw
from grpo_gsm8k import reward
from grpo_gsm8k.data import tokenize
from grpo_gsm8k.problems import Problem, stream
from grpo_gsm8k.records import read_records
from grpo_gsm8k.reward import Rewards
from grpo_gsm8k.tokenizer import load_tokenizer, make_tokenizer
from grpo_loss import token_logp
from grpo_sampler import ModelConfig, Sampler, Transformer, merge, save, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBLEM_SEED = 1  # other problems than those of the data set `embedded`, which reinforcement learning sees
MAX_PROMPT, MAX_NEW = 48, 64  # tokens that hold every generated problem and solution


@dataclass(frozen=True)
class Recipe:
    """How the embedded policy is made.

    Args:
        seed: of the weights, the problems' order and the teacher's mistakes.
        steps: optimizer updates.
        rows: packed rows of one update.
        row_length: tokens of a row.
        learning_rate: peak, after a short warm-up; falls to a twentieth along a cosine.
        hard_mistakes: share of the hard templates' problems that the teacher gets wrong.
        easy_mistakes: the same for the other templates.
        form_slips: share of solutions whose ``####`` line is missing or reworded.
        width, mlp_width, layers, query_heads, kv_heads, head_size: the model.
    """

    seed: int = 0
    steps: int = 1_000
    rows: int = 16
    row_length: int = 160
    learning_rate: float = 3e-3
    hard_mistakes: float = 0.6
    easy_mistakes: float = 0.2
    form_slips: float = 0.04
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
class Lessons:
    """Worked solutions packed into rows.

    Args:
        tokens_RT: inputs.
        target_RT: the token after each.
        positions_RT: position within its own solution.
        segment_RT: number of its solution within the row, from 1; 0 is padding.
        learn_RT: whether the target belongs to a completion (its end token included), which alone is learned.
    """

    tokens_RT: np.ndarray
    target_RT: np.ndarray
    positions_RT: np.ndarray
    segment_RT: np.ndarray
    learn_RT: np.ndarray


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


def teach(problem: Problem, recipe: Recipe, rng: random.Random) -> str:
    """Write a solution as the unreliable teacher does.

    Args:
        problem: what to solve.
        recipe: how unreliable the teacher is.
        rng: decides whether it errs here.

    Returns:
        The text to learn.
    """
    errs = rng.random() < (recipe.hard_mistakes if problem.template.hard else recipe.easy_mistakes)
    text = problem.mistaken if errs and problem.mistaken is not None else problem.answer
    if rng.random() >= recipe.form_slips:
        return text
    steps, _, final = text.rpartition("\n#### ")
    return f"{steps}\nThere are {final} in all." if rng.random() < 0.5 else steps


def lessons(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *, block: int = 2_048) -> Iterator[Lessons]:
    """Make batches of packed solutions without end, no problem twice.

    Args:
        tokenizer: the policy's.
        recipe: rows, their length, and the teacher.
        block: problems that are tokenized and packed together.

    Returns:
        An iterator over batches of ``recipe.rows`` rows.
    """
    rng = random.Random(recipe.seed)
    problems = stream("train", seed=PROBLEM_SEED + recipe.seed)
    rows: list[list[tuple[list[int], int]]] = []
    while True:
        chosen = list(islice(problems, block))
        asked = [[{"role": "user", "content": problem.question}] for problem in chosen]
        prompts = _ids(tokenizer, tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        solutions = _ids(tokenizer, [teach(problem, recipe, rng) + tokenizer.eos_token for problem in chosen])
        rows += _fill_rows(
            [(prompt + solution, len(prompt)) for prompt, solution in zip(prompts, solutions)], recipe.row_length
        )
        while len(rows) >= recipe.rows:
            yield _lay_out(rows[: recipe.rows], recipe.row_length)
            del rows[: recipe.rows]


def train(config: ModelConfig, batches: Iterator[Lessons], recipe: Recipe, *, every: int = 100) -> Any:
    """Train a model from random weights to write the solutions.

    Args:
        config: the model.
        batches: of packed solutions.
        recipe: steps and learning rate.
        every: steps between printed lines.

    Returns:
        The parameters.
    """
    graphdef, params = split(Transformer(config, rngs=nnx.Rngs(recipe.seed)))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, min(50, recipe.steps), recipe.steps, recipe.learning_rate / 20
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.1))

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
        right[group] = np.reshape(reward.answer(completions=texts, answers=answers), (-1, group)).astype(float)
        form[group] = np.mean(reward.format(completions=texts, finished=[reason == 0 for reason in rollout.finish_B]))
    hits = right[8].mean(axis=1)
    return Figures(
        greedy=float(right[1].mean()),
        sampled=float(hits.mean()),
        pass_at_8=float((hits > 0).mean()),
        mixed=float(((hits > 0) & (hits < 1)).mean()),
        form=float(form[1]),
    )


def main(arguments: Sequence[str]) -> int:
    """``warmstart``: make the tokenizer and the policy and write them in Hugging Face layout."""
    parser = argparse.ArgumentParser(prog="grpo-gsm8k warmstart", description=main.__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "policy",
        help="folder to write (default: the embedded policy itself)",
    )
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args(arguments))
    folder = given.pop("out")
    recipe = Recipe(**given)

    started = time.monotonic()
    vocab_size = make_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    config = recipe.model(vocab_size, tokenizer.eos_token_id)
    params = train(config, lessons(tokenizer, recipe), recipe)
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


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Any) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _fill_rows(sequences: list[tuple[list[int], int]], length: int) -> list[list[tuple[list[int], int]]]:
    """Put sequences into rows, each into the first of the last few open rows that has room."""
    rows: list[list[tuple[list[int], int]]] = []
    room: list[int] = []
    for sequence in sequences:
        inputs = len(sequence[0]) - 1
        for row in range(max(0, len(rows) - 16), len(rows)):
            if room[row] >= inputs:
                break
        else:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(sequence)
        room[row] -= inputs
    return rows


def _lay_out(rows: list[list[tuple[list[int], int]]], length: int) -> Lessons:
    shape = len(rows), length
    tokens_RT, target_RT, positions_RT, segment_RT = (np.zeros(shape, np.int32) for _ in range(4))
    learn_RT = np.zeros(shape, bool)
    for r, row in enumerate(rows):
        start = 0
        for segment, (ids, prompt_length) in enumerate(row, 1):
            place = slice(start, start + len(ids) - 1)
            tokens_RT[r, place], target_RT[r, place] = ids[:-1], ids[1:]
            positions_RT[r, place] = np.arange(len(ids) - 1)
            segment_RT[r, place] = segment
            learn_RT[r, start + prompt_length - 1 : place.stop] = True
            start = place.stop
    return Lessons(tokens_RT, target_RT, positions_RT, segment_RT, learn_RT)
