"""From a blueprint to everything a run needs: weights, problems and rewards, checked before anything is sampled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from grpo_loss import TrainState
from grpo_mesh import digest, make_mesh
from grpo_sampler import ModelConfig, load_pretrained
from grpo_trainer.assemble.blueprint import Blueprint, blueprint
from grpo_trainer.assemble.cautions import cautions
from grpo_trainer.assemble.policy import check_same_model, first_adapters, policy_folder
from grpo_trainer.data.prompts import prompt_digest
from grpo_trainer.data.sources import digest as digest_of_problems
from grpo_trainer.data.stop_strings import stop_table
from grpo_trainer.data.stream import ProblemBatch, ProblemStream, Reader
from grpo_trainer.data.tokenizer import end_ids, load_tokenizer, padding_id
from grpo_trainer.rewards.scoring import Rewards
from grpo_trainer.run.folder import versions
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Evaluator", "Run", "assemble", "assemble_evaluator", "load_frozen"]


@dataclass(frozen=True)
class Evaluator:
    """What an evaluation needs: one split's problems, no rewards, no optimizer state.

    Args:
        plan: shapes, shardings and compiled functions.
        task: judges the answers.
        held_out: the problems; those to train on where their pass rates are measured.
        tokenizer: turns completions into text.
        folder: of the policy, in Hugging Face layout.
    """

    plan: Blueprint
    task: Task
    held_out: ProblemBatch
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    def load(self) -> Any:
        """The network's parameters: those in `folder`, with adapters if the settings ask for them."""
        if not self.plan.frozen:
            return _load(self.folder, self.plan)
        return self.network(_adapters(self.plan))

    def network(self, params: Any) -> Any:
        """The network's parameters: what was trained, such as a checkpoint's, with what is frozen in `folder`."""
        return self.plan.network(params, *load_frozen(self.folder, self.plan))


@dataclass(frozen=True)
class Run:
    """A run, ready to start.

    Args:
        plan: shapes, shardings and compiled functions.
        task: what is learned.
        state: what is trained and the optimizer's state, before the first step.
        frozen: the parameters beside adapters; empty where all parameters are trained.
        reference: frozen parameters for the KL term; None without one.
        problems: training prompts, step by step, from (seed, epoch) alone.
        held_out: the problems of every evaluation.
        rewards: the reward functions.
        tokenizer: turns completions into text.
        versions: installed ones, of everything that the app declares.
        prompt: one whole prompt as the model sees it, special tokens and all.
        identity: what a checkpoint must agree with.
        description: lines to print at the start.
        cautions: what a practitioner would warn of.
    """

    plan: Blueprint
    task: Task
    state: TrainState
    frozen: tuple[Any, ...]
    reference: Any
    problems: ProblemStream
    held_out: ProblemBatch
    rewards: Rewards
    tokenizer: PreTrainedTokenizerBase
    versions: dict[str, str]
    prompt: str
    identity: dict[str, Any]
    description: tuple[str, ...]
    cautions: tuple[str, ...]

    @property
    def settings(self) -> Settings:
        """Resolved."""
        return self.plan.settings

    def network(self, params: Any) -> Any:
        """The network's parameters: those that are trained, such as `state.params`, with the frozen ones."""
        return self.plan.network(params, *self.frozen)


def assemble(settings: Settings, task: Task, *, devices: Sequence[Any] | None = None) -> Run:
    """Build everything a run needs, without sampling or compiling.

    Args:
        settings: resolved.
        task: what is learned.
        devices: to run on; None: all there are.

    Returns:
        The run.

    Raises:
        GrpoError: a setting, file, model or data set cannot be used; the message says which and why.
    """
    folder, tokenizer, plan = _policy(settings, task, devices)
    model = plan.model
    reference_folder = None
    if settings.loss.reference not in ("none", "initial"):
        reference_folder = policy_folder("loss.reference", settings.loss.reference, task.policies)
        check_same_model(settings.loss.reference, ModelConfig.from_file(reference_folder), model)
    reader = Reader(settings, task, tokenizer, model.vocab_size)
    problems, held_out = reader.training(), reader.held_out()
    rewards = Rewards.start(settings.reward, task, max_new_tokens=settings.rollout.max_new_tokens)

    params = _load(folder, plan)
    identity = {"parameters": digest(params), "reference": "none"}
    frozen: tuple[Any, ...] = ()
    if plan.frozen:
        frozen, params = (params,), _adapters(plan)
        identity["adapters"] = digest(params)
    reference = None
    if settings.loss.reference == "initial":
        reference, identity["reference"] = jax.tree.map(jnp.copy, params), digest(params)
    elif reference_folder is not None:
        reference = _load(reference_folder, plan)
        identity["reference"] = digest(reference)
    identity |= {
        "tokenizer": sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest(),
        "prompt": prompt_digest(tokenizer, reader.style()),
        "stop_ids": list(plan.greedy.stop_ids),
        "problems": problems.digest,
        "held_out": digest_of_problems(held_out.problems),
    }
    return Run(
        plan=plan,
        task=task,
        state=plan.start(params),
        frozen=frozen,
        reference=reference,
        problems=problems,
        held_out=held_out,
        rewards=rewards,
        tokenizer=tokenizer,
        versions=versions(f"grpo-{task.name}"),
        identity=identity,
        prompt=str(tokenizer.decode(held_out.prompts.tokens_PT[0, : held_out.prompts.length_P[0]].tolist())),
        description=_description(plan, problems, held_out),
        cautions=tuple(
            cautions(
                settings,
                parameters=sum(leaf.size for leaf in jax.tree.leaves((params, frozen))),
                kept=len(problems.questions.problems),
                dropped=problems.questions.dropped,
            )
        ),
    )


def assemble_evaluator(
    settings: Settings, task: Task, *, split: Split = "test", devices: Sequence[Any] | None = None
) -> Evaluator:
    """Build what an evaluation needs, without weights; of the problems, only its split is read.

    Args:
        settings: resolved.
        task: judges the answers.
        split: the problems: held-out ones, or those to train on, whose pass rates `data.filter` can use.
        devices: to run on; None: all there are.

    Returns:
        The evaluator.

    Raises:
        GrpoError: a setting, file, model or data set cannot be used; the message says which and why.
    """
    folder, tokenizer, plan = _policy(settings, task, devices)
    reader = Reader(settings, task, tokenizer, plan.model.vocab_size)
    batch = reader.held_out() if split == "test" else reader.to_measure()
    return Evaluator(plan, task, batch, tokenizer, folder)


def _policy(
    settings: Settings, task: Task, devices: Sequence[Any] | None
) -> tuple[Path, PreTrainedTokenizerBase, Blueprint]:
    mesh = make_mesh(settings.mesh, devices)
    folder = policy_folder("model.path", settings.model.path, task.policies)
    model = ModelConfig.from_file(folder)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {settings.model.path} has {len(tokenizer)} tokens but its model only "
            f"{model.vocab_size}: they do not belong together"
        )
    stop_ids = end_ids(tokenizer, folder, model.eos_ids)
    stop = settings.rollout.stop
    plan = blueprint(
        settings,
        model,
        mesh,
        stop_ids=stop_ids,
        stop_table_AV=stop_table(tokenizer, stop, model.vocab_size) if stop else None,
        pad_id=padding_id(tokenizer),
    )
    return folder, tokenizer, plan


def load_frozen(folder: Path, plan: Blueprint) -> tuple[Any, ...]:
    """The parameters beside adapters.

    Args:
        folder: of the policy, in Hugging Face layout.
        plan: of the run.

    Returns:
        One tree; nothing where all parameters are trained.
    """
    return (_load(folder, plan),) if plan.frozen else ()


def _load(folder: Path, plan: Blueprint) -> Any:
    """The parameters of a checkpoint: those that are trained, or the base of adapters."""
    [base] = plan.frozen or (plan.state.params,)
    placed = jax.tree.map(lambda leaf: leaf.sharding, base)
    return load_pretrained(folder, dtype=jnp.dtype(plan.settings.model.dtype), sharding=placed)[1]


def _adapters(plan: Blueprint) -> Any:
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.state.params)
    return first_adapters(plan.settings, plan.model, placed)


def _description(plan: Blueprint, problems: ProblemStream, held_out: ProblemBatch) -> tuple[str, ...]:
    settings, dropped = plan.settings, (problems.questions.dropped, held_out.dropped)
    trained = {problem.question for problem in problems.questions.problems}
    shared = sum(problem.question in trained for problem in held_out.problems)
    moved, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (plan.state.params, plan.frozen))
    lora = plan.model.lora
    adapters = f"; {moved:,} more are trained, adapters of rank {lora.rank}" if lora else ""
    axes, decoding = (
        " ".join(f"{axis}:{size}" for axis, size in mesh.shape.items()) for mesh in (plan.mesh, plan.rollout_mesh)
    )
    return (
        f"policy   {settings.model.path}: {plan.model.family}, {frozen or moved:,} parameters, "
        f"{settings.model.dtype}, attention {settings.model.attention}{adapters}",
        f"problems {settings.data.source}: {len(problems.questions.problems):,} to train on, "
        f"{len(held_out.problems):,} held out"
        + (f"; over-long ones dropped: {dropped[0]:,} to train on, {dropped[1]:,} held out" if any(dropped) else "")
        + (f"; {problems.questions.filtered}" if problems.questions.filtered else "")
        + (f"; {shared:,} of the held-out questions are also trained on" if shared else ""),
        f"devices  {plan.device}, mesh {axes}" + (f"; sampling on {decoding}" if decoding != axes else ""),
        f"steps    {settings.steps}, each {settings.rollout.prompts} prompts x {settings.rollout.group_size} samples",
    )
