"""From a config to everything a run needs: built, checked and placed, before anything is sampled."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jax.sharding import Mesh

from grpo_contracts import SamplingLaw
from grpo_trainer.run.accuracy import Accuracy
from grpo_trainer.settings.schema import Config
from grpo_trainer.data.stream import Asked, ProblemStream, held_out, open_problems
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.assemble.objective import make_forward, make_loss
from grpo_trainer.assemble.placement import RULES
from grpo_trainer.data.sources import digest as records_digest
from grpo_trainer.rewards.scoring import Rewards
from grpo_gsm8k.embedded.tokenizer import load_tokenizer
from grpo_loss import PackShape, TrainState, accumulate, constant, init_state, make_score, make_update, warmup_cosine
from grpo_mesh import BATCH_AXES, digest, make_mesh, shardings, state_shardings
from grpo_sampler import ModelConfig, Sampler, abstract, load

EMBEDDED_POLICY = Path(__file__).parent / "policy"


@dataclass(frozen=True)
class Assembly:
    """A run, ready to start.

    Args:
        config: the resolved settings.
        mesh: axes dp, fsdp, tp.
        state: parameters and optimizer state before the first step.
        reference: frozen parameters for the KL term; None without one.
        problems: training prompts, step by step, from (seed, epoch) alone.
        held_out: the problems of every evaluation.
        sampler: draws rollouts under the config's law.
        greedy: the law of evaluations.
        rewards: the reward functions and the tokenizer that turns completions into text for them.
        pack_shape: sizes of a packed batch, the only ones the update is compiled for.
        update, score, gradient: compiled on first use; `gradient` is what `update` adds up, to look into.
        learning_rate: of an optimizer step.
        identity: what a checkpoint must agree with.
        description: lines to print at the start.
    """

    config: Config
    mesh: Mesh
    state: TrainState
    reference: Any
    problems: ProblemStream
    held_out: Asked
    sampler: Sampler
    greedy: SamplingLaw
    rewards: Rewards
    pack_shape: PackShape
    update: Callable[..., Any]
    score: Callable[..., Any]
    gradient: Callable[..., Any]
    learning_rate: Callable[[Any], float]
    identity: dict[str, Any]
    description: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, Any]:
        """What the compiled programs depend on: equal on every process of a job."""
        return {"pack": asdict(self.pack_shape), "mesh": dict(self.mesh.shape), "slots": self.sampler.slots}

    @property
    def device(self) -> str:
        """Such as "2 x cpu"."""
        return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"

    def verdict(self, accuracy: dict[str, Any], seconds: float) -> str:
        """The last line of a run: what was learned, and in what time."""
        before, after = (
            Accuracy(accuracy[when]["correct"], accuracy[when]["total"]) if when in accuracy else None
            for when in ("before", "after")
        )
        took = f"{self.config.steps} steps in {seconds:.0f} s"
        if before is None or after is None:
            return f"{took}; held-out accuracy {after or before or 'not measured (eval.before, eval.after are off)'}"
        gain = 100 * (after.share - before.share)
        return f"{took}; held-out accuracy before {before}, after {after}: {gain:+.1f} points"


def assemble(config: Config, *, devices: Sequence[Any] | None = None) -> Assembly:
    """Build everything a run needs, without sampling or compiling.

    Args:
        config: the resolved settings.
        devices: to run on; None: all there are.

    Returns:
        The assembly.

    Raises:
        GrpoError: a setting, file, model or data set does not do; the message says which and why.
    """
    mesh = make_mesh(config.mesh, devices)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if config.loss.rows % shards:
        raise ConfigError(
            f"loss.rows must be a multiple of dp·fsdp = {shards} (mesh {config.mesh!r} on {mesh.size} devices), so "
            f"that every device gets as many rows: got {config.loss.rows}. "
            f"Use {config.loss.rows + -config.loss.rows % shards}"
        )
    folder = _policy_folder("model.path", config.model.path)
    model = ModelConfig.from_file(folder)
    reference_folder = None
    if config.loss.reference not in ("none", "initial"):
        reference_folder = _policy_folder("loss.reference", config.loss.reference)
        _check_same_model(config.loss.reference, ModelConfig.from_file(reference_folder), model)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {config.model.path} has {len(tokenizer)} tokens but its model only {model.vocab_size}: "
            "they do not belong together"
        )
    problems = open_problems(config, tokenizer, vocab_size=model.vocab_size)
    questions = held_out(config, tokenizer, vocab_size=model.vocab_size)
    rewards = Rewards.from_config(config.reward, tokenizer)

    dtype = jnp.dtype(config.model.dtype)
    graphdef, shapes = abstract(
        model,
        param_dtype=dtype,
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        attention=config.model.attention,
        remat=config.model.remat,
        mesh=mesh,
    )
    placed = shardings(shapes, mesh, RULES)
    _, params = load(folder, dtype=dtype, sharding=placed)
    parameters = digest(params)
    reference, reference_identity = None, "none"
    if config.loss.reference == "initial":
        reference, reference_identity = jax.tree.map(jnp.copy, params), parameters
    elif reference_folder is not None:
        _, reference = load(reference_folder, dtype=dtype, sharding=placed)
        reference_identity = digest(reference)

    optimizer, schedule = _optimizer(config)
    start = partial(init_state, optimizer=optimizer)
    state_placed = state_shardings(jax.eval_shape(start, params), params, mesh, RULES)
    state = jax.jit(start, out_shardings=state_placed, donate_argnums=0)(params)

    # `load_tokenizer` has made sure of both; transformers types them for every kind of tokenizer.
    stop_ids, pad_id = (cast(int, tokenizer.eos_token_id),), cast(int, tokenizer.pad_token_id)
    sequences = config.rollout.prompts * config.rollout.group_size
    sampler = Sampler(
        model,
        SamplingLaw(
            temperature=config.rollout.temperature,
            top_k=config.rollout.top_k,
            top_p=config.rollout.top_p,
            min_p=config.rollout.min_p,
            stop_ids=stop_ids,
        ),
        max_prompt_length=config.data.max_prompt_length,
        max_new_tokens=config.rollout.max_new_tokens,
        slots=config.rollout.slots or sequences,
        pad_id=pad_id,
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        mesh=mesh,
    )
    forward, loss = make_forward(graphdef, config, shards=shards), make_loss(config)
    pack_shape = PackShape.for_rollout(
        sequences=sequences,
        groups=config.rollout.prompts,
        max_prompt_length=config.data.max_prompt_length,
        max_new_tokens=config.rollout.max_new_tokens,
        rows=config.loss.rows,
        row_length=config.row_length,
        prompts=config.loss.prompts or None,
        blocks=config.loss.blocks,
        shards=shards,
    )
    return Assembly(
        config=config,
        mesh=mesh,
        state=state,
        reference=reference,
        problems=problems,
        held_out=questions,
        sampler=sampler,
        greedy=SamplingLaw(temperature=0.0, stop_ids=stop_ids),
        rewards=rewards,
        pack_shape=pack_shape,
        update=make_update(
            forward,
            loss,
            optimizer,
            max_grad_norm=config.optimizer.max_grad_norm,
            param_shardings=placed,
        ),
        score=make_score(forward),
        gradient=jax.jit(partial(accumulate, forward, loss)),
        learning_rate=lambda updates: float(jnp.asarray(schedule(updates))),
        identity={
            "parameters": parameters,
            "reference": reference_identity,
            "tokenizer": sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest(),
            "chat_template": sha256(str(tokenizer.chat_template).encode()).hexdigest(),
            "problems": problems.digest,
            "held_out": records_digest(questions.problems),
        },
        description=(
            f"policy   {config.model.path}: {model.family}, {_count(shapes):,} parameters, {dtype.name}, "
            f"attention {config.model.attention}",
            f"problems {config.data.source}: {len(problems.questions.records):,} to train on, "
            f"{len(questions.problems):,} held out"
            + (f", {problems.questions.dropped:,} over-long ones dropped" if problems.questions.dropped else ""),
            f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh "
            + " ".join(f"{axis}:{size}" for axis, size in mesh.shape.items()),
            f"steps    {config.steps}, each {config.rollout.prompts} prompts x {config.rollout.group_size} samples",
        ),
    )


def _policy_folder(key: str, path: str) -> Path:
    """The folder of `embedded`, of a folder, or of a hub id (downloaded: the only place that reaches the network)."""
    if path == "embedded":
        return EMBEDDED_POLICY
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) is None:
        raise ConfigError(
            f"{key} must be `embedded`, a folder, or a hub id such as Qwen/Qwen2.5-0.5B: got {path!r}. No such folder"
        )
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"{key}={path!r} is no folder here, and the hub did not give it: {error}") from error


def _check_same_model(path: str, reference: ModelConfig, model: ModelConfig) -> None:
    ours, theirs = asdict(model), asdict(reference)
    ignored = ("bos_id", "eos_ids", "max_positions")  # the forward pass does not read them
    pairs = {name: (theirs[name], ours[name]) for name in ours if name not in ignored}
    differing = [f"{name} {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]
    if differing:
        raise ConfigError(
            f"loss.reference must be the policy's own kind of model, whose forward pass it shares: {path} has "
            f"{'; '.join(differing)}"
        )


def _optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    settings = config.optimizer
    updates = config.steps * config.loss.epochs * config.loss.minibatches
    if settings.schedule == "cosine":
        schedule = warmup_cosine(settings.learning_rate, warmup_steps=settings.warmup_steps, steps=updates)
    else:
        schedule = constant(settings.learning_rate, warmup_steps=settings.warmup_steps)
    return optax.adamw(schedule, b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay), schedule


def _count(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
