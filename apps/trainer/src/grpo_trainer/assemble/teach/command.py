"""The `warmstart` command of an app: tokenizer, policy, files, and what the policy can do on held-out problems."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import jax
import numpy as np

from grpo_contracts import SamplingParams
from grpo_sampler import ModelConfig, Sampler, save_pretrained
from grpo_trainer.assemble.teach.examples import SupervisedBatch
from grpo_trainer.assemble.teach.policy import Recipe, train_policy
from grpo_trainer.assemble.teach.tokenizer import make_tokenizer
from grpo_trainer.data.stop_strings import stop_table
from grpo_trainer.data.stream import tokenize
from grpo_trainer.data.tokenizer import load_tokenizer
from grpo_trainer.rewards.scoring import transcribe
from grpo_trainer.settings.layers import load
from grpo_trainer.settings.paths import argument_path, writing_to
from grpo_trainer.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Figures", "measure", "warmstart"]

_Teacher = TypeVar("_Teacher")


@dataclass(frozen=True)
class Figures:
    """What a policy can do on held-out problems.

    Args:
        greedy: share of right answers, decoded greedily.
        sampled: share of right answers at temperature 1.
        pass_at_8: share of problems with a right answer among eight samples.
        mixed: share of problems with both right and wrong answers among eight samples: those a group learns from.
        form: share of greedy completions in the form that was asked for.
    """

    greedy: float
    sampled: float
    pass_at_8: float
    mixed: float
    form: float

    def __str__(self) -> str:
        return ", ".join(f"{field.name.replace('_', ' ')} {getattr(self, field.name):.1%}" for field in fields(self))


def measure(
    config: ModelConfig, params: Any, tokenizer: PreTrainedTokenizerBase, task: Task, *, problems: int = 512
) -> Figures:
    """Measure what a policy can do on a task's embedded held-out problems, greedily and in eight samples each.

    Args:
        config: the model.
        params: its parameters.
        tokenizer: its tokenizer.
        task: puts the problems and judges the answers; its defaults limit prompts and completions and end them.
        problems: how many.

    Returns:
        The figures.
    """
    settings = load(task)
    test = task.problems("embedded", "test", problems)
    length, stop = settings.data.max_prompt_length, settings.rollout.stop
    batch = tokenize(test, tokenizer, max_length=length, vocab_size=config.vocab_size).take(range(len(test)))
    right, formed = {}, {}
    for temperature, group in ((0.0, 1), (1.0, 8)):
        sampler = Sampler(
            config,
            SamplingParams(temperature=temperature, stop_ids=config.eos_ids),
            max_prompt_length=length,
            max_new_tokens=settings.rollout.max_new_tokens,
            pad_id=batch.prompts.pad_id,
            stop_table_AV=stop_table(tokenizer, stop, config.vocab_size) if stop else None,
        )
        rollout = sampler.generate(params, batch.prompts, group_size=group, seed=0, step=0)
        judgements = transcribe(rollout, batch.problems, tokenizer, stop).judgements(task)
        right[group] = np.array([judgement.strict for judgement in judgements], float).reshape(-1, group)
        formed[group] = np.mean([judgement.formed for judgement in judgements])
    hits = right[8].mean(axis=1)
    return Figures(
        greedy=float(right[1].mean()),
        sampled=float(hits.mean()),
        pass_at_8=float((hits > 0).mean()),
        mixed=float(((hits > 0) & (hits < 1)).mean()),
        form=float(formed[1]),
    )


def warmstart(
    task: Task,
    arguments: Sequence[str],
    *,
    folder: Path,
    texts: Callable[[], Iterable[str]],
    teacher: type[_Teacher],
    lessons: Callable[[PreTrainedTokenizerBase, _Teacher], Iterator[SupervisedBatch]],
    recipe: Recipe | None = None,
) -> int:
    """Make a task's embedded policy from scratch by supervised training, and write it in Hugging Face layout.

    Args:
        task: measures the result.
        arguments: of the command line; every field of the recipe and of the teacher is an option.
        folder: where to write, unless ``--out`` says otherwise.
        texts: makes the texts that the tokenizer is trained on.
        teacher: a dataclass with a default for every field: what the lessons are like.
        lessons: makes batches without end.
        recipe: the defaults of the options.

    Returns:
        Exit code 0.
    """
    recipe = recipe or Recipe()
    parser = argparse.ArgumentParser(
        prog=f"grpo-{task.name} warmstart",
        description="Make the tokenizer and the policy and write them in Hugging Face layout.",
    )
    parser.add_argument(
        "--out", type=argument_path, default=folder, help="folder to write (default: the embedded policy itself)"
    )
    taught = teacher()
    # Where both have a field, such as `seed`, one option sets both.
    defaults = {field.name: getattr(each, field.name) for each in (taught, recipe) for field in fields(cast(Any, each))}
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    folder = given.pop("out")
    recipe = Recipe(**{field.name: given[field.name] for field in fields(Recipe)})
    taught = teacher(**{field.name: given[field.name] for field in fields(cast(Any, teacher))})

    started = time.monotonic()
    with writing_to(folder):
        vocab_size = make_tokenizer(folder, texts())
    tokenizer = load_tokenizer(folder)
    config = recipe.model(vocab_size, cast("int", tokenizer.eos_token_id))
    params = train_policy(config, lessons(tokenizer, taught), recipe)
    with writing_to(folder):
        save_pretrained(folder, config, params)
    generation = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": True,
        "temperature": 1.0,
    }
    with writing_to(folder):
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{folder}: {size:,} parameters, {time.monotonic() - started:.0f} s")
    print(f"held-out problems: {measure(config, params, tokenizer, task)}")
    return 0
