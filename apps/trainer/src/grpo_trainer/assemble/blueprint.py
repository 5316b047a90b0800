"""A run as shapes and shardings: what `assemble` builds, without weights, data or devices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_contracts import SamplingLaw
from grpo_trainer.assemble.run import EMBEDDED_POLICY, _optimizer
from grpo_trainer.settings.schema import Config
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.assemble.objective import make_forward, make_loss
from grpo_trainer.assemble.placement import RULES
from grpo_loss import MicroBatch, PackedBatch, PackShape, TrainState, init_state, make_score, make_update
from grpo_mesh import BATCH_AXES, replicated, shardings, state_shardings
from grpo_sampler import ModelConfig, Sampler, abstract, merge

__all__ = ["Blueprint", "blueprint", "bytes_per_device", "model_config"]

_SHIPPED = Path(__file__).parent / "model_configs"


def model_config(path: str) -> ModelConfig:
    """The dimensions of a policy, without its weights and without the network.

    Args:
        path: `embedded`, a folder, or the hub id of a Qwen2.5 model whose dimensions come with the app.

    Returns:
        The configuration.

    Raises:
        ConfigError: another hub id.
    """
    if path == "embedded":
        return ModelConfig.from_file(EMBEDDED_POLICY)
    if Path(path).expanduser().is_dir():
        return ModelConfig.from_file(Path(path).expanduser())
    known = re.fullmatch(r"Qwen/(Qwen2\.5-[\d.]+B)(-Instruct)?", path)
    file = _SHIPPED / f"{known[1].lower()}.json" if known else None
    if file is None or not file.is_file():
        shipped = ", ".join(sorted(shipped.stem for shipped in _SHIPPED.glob("*.json")))
        raise ConfigError(
            f"preflight knows the dimensions of {shipped} without the network: got model.path={path!r}. For another "
            "model put its config.json into a folder and set model.path to the folder; no weights are needed"
        )
    return ModelConfig.from_file(file)


@dataclass(frozen=True)
class Blueprint:
    """What `assemble` builds, as shapes and shardings.

    Args:
        config: the resolved settings.
        model: dimensions of the policy.
        mesh: of devices that need not be there.
        attention: kernel that `model.attention` came to.
        state: parameters and optimizer state.
        reference: frozen parameters for the KL term; None without one.
        sampler: compiles what a rollout runs.
        pack_shape: sizes of a packed batch.
        start, update, score: functions to be lowered.
    """

    config: Config
    model: ModelConfig
    mesh: Mesh
    attention: str
    state: TrainState
    reference: Any
    sampler: Sampler
    pack_shape: PackShape
    start: Any
    update: Any
    score: Any

    @property
    def shards(self) -> int:
        """Blocks that rows are spread over: dp times fsdp."""
        return self.pack_shape.shards

    @property
    def tensor(self) -> int:
        """Devices that split each product."""
        return self.mesh.shape["tp"]

    def batch(self, data: Iterable[str] = ()) -> PackedBatch:
        """A packed batch as `learn` places it.

        Args:
            data: names of per-token arrays besides the tokens.

        Returns:
            Shapes with shardings.
        """
        shape = self.pack_shape
        rows = NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))

        def array(*sizes: int, dtype: Any = np.int32) -> Any:
            return jax.ShapeDtypeStruct((shape.micro_batches, *sizes), dtype, sharding=rows)

        tokens = partial(array, shape.rows, shape.row_length)
        micro = MicroBatch(
            prompt_tokens_PT=array(shape.prompts, shape.prompt_length),
            prompt_length_P=array(shape.prompts),
            tokens_RT=tokens(),
            target_RT=tokens(),
            positions_RT=tokens(),
            segment_RT=tokens(),
            prompt_RC=array(shape.rows, shape.blocks),
            source_RT=tokens(),
            sequence_RT=tokens(),
            mask_RT=tokens(dtype=np.bool_),
            data={name: tokens(dtype=np.float32) for name in data},
        )
        count: Any = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(self.mesh))
        return PackedBatch(micro, count)


def blueprint(config: Config, model: ModelConfig, mesh: Mesh) -> Blueprint:
    """Lays a run out on a mesh.

    Args:
        config: the resolved settings.
        model: dimensions of the policy.
        mesh: of devices at hand, or of `grpo_mesh.slice_devices`.

    Returns:
        The blueprint; nothing is compiled or allocated.

    Raises:
        GrpoError: sizes that do not divide, as they would at the start of the run.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    compute_dtype = jnp.dtype(config.model.compute_dtype)
    graphdef, shapes = abstract(
        model,
        param_dtype=jnp.dtype(config.model.dtype),
        compute_dtype=compute_dtype,
        attention=config.model.attention,
        remat=config.model.remat,
        mesh=mesh,
    )
    placed = shardings(shapes, mesh, RULES)
    params = _on(shapes, placed)
    optimizer, _ = _optimizer(config)
    start = partial(init_state, optimizer=optimizer)
    state = jax.eval_shape(start, shapes)
    state_placed = state_shardings(state, shapes, mesh, RULES)
    rollout = config.rollout
    sequences = rollout.prompts * rollout.group_size
    forward = make_forward(graphdef, config, shards=shards)
    return Blueprint(
        config=config,
        model=model,
        mesh=mesh,
        attention=_attention(graphdef, shapes),
        state=_on(state, state_placed),
        reference=None if config.loss.reference == "none" else params,
        sampler=Sampler(
            model,
            # Stop ids are values that a program reads, no part of it.
            SamplingLaw(temperature=rollout.temperature, top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p),
            max_prompt_length=config.data.max_prompt_length,
            max_new_tokens=rollout.max_new_tokens,
            slots=rollout.slots or sequences,
            compute_dtype=compute_dtype,
            mesh=mesh,
        ),
        pack_shape=PackShape.for_rollout(
            sequences=sequences,
            groups=rollout.prompts,
            max_prompt_length=config.data.max_prompt_length,
            max_new_tokens=rollout.max_new_tokens,
            rows=config.loss.rows,
            row_length=config.row_length,
            prompts=config.loss.prompts or None,
            blocks=config.loss.blocks,
            shards=shards,
        ),
        start=jax.jit(start, out_shardings=state_placed, donate_argnums=0),
        update=make_update(
            forward,
            make_loss(config),
            optimizer,
            max_grad_norm=config.optimizer.max_grad_norm,
            param_shardings=placed,
        ),
        score=make_score(forward),
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct`s or arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _on(shapes: Any, placed: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placed
    )


def _attention(graphdef: Any, shapes: Any) -> str:
    return merge(graphdef, shapes).attention
