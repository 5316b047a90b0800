"""The one place where a run is wired: shapes, shardings and compiled functions; no weights, no data.

`assemble` fills a blueprint with weights, problems and rewards. Preflight compiles it for devices that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_contracts import SamplingParams
from grpo_loss import PackedBatch, PackShape, TrainState, accumulate, init_state, make_score, make_update
from grpo_mesh import BATCH_AXES, MeshError, Rules, reshape_mesh, shardings, state_shardings
from grpo_sampler import (
    PADDED_AXES,
    PARTITION_AXES,
    PARTITION_RULES,
    ModelConfig,
    Sampler,
    abstract,
    decoding_sizes,
    join_adapters,
    merge,
    split_adapters,
)
from grpo_trainer.assemble.objective import make_forward, make_policy_loss
from grpo_trainer.assemble.optimizer import make_optimizer
from grpo_trainer.assemble.policy import lora_of
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.schema import Settings

__all__ = ["RULES", "Blueprint", "blueprint"]

RULES = Rules(PARTITION_RULES, axes=PARTITION_AXES, pad=PADDED_AXES)


@dataclass(frozen=True)
class Blueprint:
    """A run without weights or data.

    Args:
        settings: resolved.
        model: dimensions of the policy, with its adapters.
        mesh: axes dp, fsdp, tp; its devices need not be there. `sampler.mesh` has the same devices.
        attention: the kernel that `model.attention` came to.
        state: shapes and shardings of what is trained, parameters or adapters, and of the optimizer's state.
        frozen: those of the parameters beside the adapters; empty where all parameters are trained.
        reference: shapes and shardings of the frozen parameters for the KL term; None without one.
        sampler: draws rollouts under the settings' sampling parameters.
        evaluator: the sampler of evaluations: the same one, unless they have a token limit or batch of their own.
        greedy, sampled: the sampling parameters of evaluations; `sampled` is None where only greedy answers count.
        pack_shape: the largest size of a packed batch.
        start: parameters -> state before the first update.
        update, score, gradient: compiled on first use; `gradient` is what `update` adds up, for looking into.
        learning_rate: of an optimizer update.
    """

    settings: Settings
    model: ModelConfig
    mesh: Mesh
    attention: str
    state: TrainState
    frozen: tuple[Any, ...]
    reference: Any
    sampler: Sampler
    evaluator: Sampler
    greedy: SamplingParams
    sampled: SamplingParams | None
    pack_shape: PackShape
    start: Any
    update: Any
    score: Any
    gradient: Callable[[Any, PackedBatch], Any]
    learning_rate: Callable[[Any], Any]

    @property
    def shards(self) -> int:
        """Parts that rows are spread over: dp times fsdp."""
        return self.pack_shape.shards

    @property
    def tensor(self) -> int:
        """Devices that split each product."""
        return self.mesh.shape["tp"]

    @property
    def rollout_mesh(self) -> Mesh:
        """That completions are sampled on, in evaluations too."""
        return self.mesh if self.sampler.mesh is None else self.sampler.mesh

    @property
    def rollout_shards(self) -> int:
        """Parts that sequences are spread over while they are sampled."""
        return _shards(self.rollout_mesh)

    def network(self, params: Any, *frozen: Any) -> Any:
        """The network's parameters, of those that are trained and those that are frozen."""
        return join_adapters(frozen[0], params) if frozen else params

    @property
    def pack_shapes(self) -> list[PackShape]:
        """The sizes a packed batch may have, smaller prompt slots first; the last is `pack_shape`."""
        count, longest = self.settings.loss.prompt_sizes, self.pack_shape.prompt_length
        if count == 1:
            return [self.pack_shape]
        lengths = [-(-longest * part // count) for part in range(1, count + 1)]
        return [replace(self.pack_shape, prompt_length=min(longest, length + -length % 8)) for length in lengths]

    @property
    def rows_sharding(self) -> NamedSharding:
        """Of a packed batch: rows and prompts of every micro-batch over the mesh's data axes."""
        return NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))

    @property
    def shapes(self) -> dict[str, Any]:
        """What the compiled programs depend on: equal on every process of a job."""
        return {
            "pack": [asdict(shape) for shape in self.pack_shapes],
            "mesh": dict(self.mesh.shape),
            "rollout mesh": dict(self.rollout_mesh.shape),
            "slots": self.sampler.slots,
        }

    @property
    def device(self) -> str:
        """Such as "2 x cpu"."""
        return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"


def blueprint(
    settings: Settings,
    model: ModelConfig,
    mesh: Mesh,
    *,
    stop_ids: tuple[int, ...] = (),
    stop_table_AV: np.ndarray | None = None,
    pad_id: int = 0,
) -> Blueprint:
    """Lay a run out on a mesh.

    Args:
        settings: resolved.
        model: dimensions of the policy.
        mesh: of devices at hand, or of `grpo_mesh.slice_devices`.
        stop_ids: token ids that end a completion; programs read them as values, so preflight needs none.
        stop_table_AV: of `rollout.stop`, as for `Sampler`; preflight needs none, as it is small.
        pad_id: fills padding.

    Returns:
        The blueprint; nothing is compiled or allocated.

    Raises:
        GrpoError: sizes that do not divide.
    """
    model = replace(model, lora=lora_of(settings))
    shards = _shards(mesh)
    _check_rows(settings, mesh, shards)
    rollout_mesh = _rollout_mesh(settings, model, mesh)
    compute_dtype = jnp.dtype(settings.model.compute_dtype)
    graphdef, shapes = abstract(
        model,
        param_dtype=jnp.dtype(settings.model.dtype),
        compute_dtype=compute_dtype,
        attention=settings.model.attention,
        remat=settings.model.remat,
        mesh=mesh,
    )
    attention = merge(graphdef, shapes).attention
    frozen: tuple[Any, ...] = ()
    if model.lora is not None:
        base, shapes = split_adapters(shapes)
        frozen = (_placed(base, jax.tree.map(_without_idle_axes, shardings(base, mesh, RULES))),)
    placed = jax.tree.map(_without_idle_axes, shardings(shapes, mesh, RULES))
    optimizer, schedule = make_optimizer(settings)
    start = partial(init_state, optimizer=optimizer)
    state = jax.eval_shape(start, shapes)
    state_placed = jax.tree.map(_without_idle_axes, state_shardings(state, shapes, mesh, RULES))
    rollout, data, loss = settings.rollout, settings.data, settings.loss
    sequences = rollout.prompts * rollout.group_size
    sampling = SamplingParams(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        stop_ids=stop_ids,
    )
    make_sampler = partial(
        Sampler,
        model,
        sampling,
        max_prompt_length=data.max_prompt_length,
        pad_id=pad_id,
        prefill_sizes=rollout.prefill_sizes,
        compute_dtype=compute_dtype,
        mesh=rollout_mesh,
        stop_table_AV=stop_table_AV,
    )
    sampler = make_sampler(max_new_tokens=rollout.max_new_tokens, slots=_slots(settings))
    limit, slots = settings.eval.max_new_tokens or sampler.max_new_tokens, settings.eval.slots or sampler.slots
    alike = (limit, slots) == (sampler.max_new_tokens, sampler.slots)
    forward, policy_loss = make_forward(graphdef, settings, shards=shards), make_policy_loss(settings)
    return Blueprint(
        settings=settings,
        model=model,
        mesh=mesh,
        attention=attention,
        state=_placed(state, state_placed),
        frozen=frozen,
        reference=None if loss.reference == "none" else _placed(shapes, placed),
        sampler=sampler,
        evaluator=sampler if alike else make_sampler(max_new_tokens=limit, slots=slots),
        greedy=SamplingParams(temperature=0.0, stop_ids=stop_ids),
        sampled=_sampled(settings, sampling),
        pack_shape=PackShape.for_rollout(
            sequences=sequences,
            groups=rollout.prompts,
            max_prompt_length=data.max_prompt_length,
            max_new_tokens=rollout.max_new_tokens,
            rows=loss.rows,
            row_length=settings.row_length,
            prompts=loss.prompts or None,
            blocks=loss.blocks,
            shards=shards,
            sizes=loss.sizes,
        ),
        start=jax.jit(start, out_shardings=state_placed, donate_argnums=0),
        update=make_update(
            forward,
            policy_loss,
            optimizer,
            max_grad_norm=settings.optimizer.max_grad_norm,
            param_shardings=placed,
        ),
        score=make_score(forward),
        gradient=jax.jit(partial(accumulate, forward, policy_loss)),
        learning_rate=schedule,
    )


def _sampled(settings: Settings, sampling: SamplingParams) -> SamplingParams | None:
    """As rollouts are drawn, but for what `eval` says."""
    own = {"temperature": settings.eval.temperature, "top_p": settings.eval.top_p}
    changed = {name: value for name, value in own.items() if value is not None}
    return replace(sampling, **changed) if settings.eval.samples else None


def _check_rows(settings: Settings, mesh: Mesh, shards: int) -> None:
    rows = settings.loss.rows
    if rows % shards:
        raise ConfigError(
            f"loss.rows must be a multiple of dp·fsdp = {shards} (mesh {settings.mesh!r} on {mesh.size} devices), so "
            f"that every device gets as many rows: got {rows}. Use {rows + -rows % shards}"
        )


def _shards(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _rollout_mesh(settings: Settings, model: ModelConfig, mesh: Mesh) -> Mesh:
    """The mesh of `rollout.mesh`, on the devices of the training mesh."""
    rollout, spec = settings.rollout, settings.rollout.mesh
    if not spec:
        return mesh
    try:
        decoding = reshape_mesh(mesh, spec)
    except MeshError as error:
        raise ConfigError(f"rollout.mesh: {error}") from error
    tensor, sizes = decoding.shape["tp"], decoding_sizes(model, mesh.size)
    if tensor not in sizes:
        raise ConfigError(
            f"rollout.mesh must have tp of {', '.join(map(str, sizes))}, which {mesh.size} devices and the policy's "
            f"{model.query_heads} query heads, {model.mlp_width} MLP columns and {model.vocab_size} tokens divide by: "
            f"got tp {tensor} ({spec!r})"
        )
    shards = _shards(decoding)
    for key, slots in (
        ("rollout.slots" if rollout.slots else "rollout.prompts x rollout.group_size", _slots(settings)),
        ("eval.slots", settings.eval.slots),
    ):
        if slots % shards:
            raise ConfigError(
                f"{key} must be a multiple of dp·fsdp = {shards} of rollout.mesh={spec!r}, so that every part of the "
                f"devices decodes as many sequences: got {slots}. Use {slots + -slots % shards}, or a larger tp"
            )
    return decoding


def _slots(settings: Settings) -> int:
    """Sequences that a rollout decodes at once."""
    rollout = settings.rollout
    return rollout.slots or rollout.prompts * rollout.group_size


def _without_idle_axes(sharding: NamedSharding) -> NamedSharding:
    """The same placement without mesh axes of size 1.

    A compiled update returns its state so; were the first state placed otherwise, jit would compile everything a second
    time in step 2.
    """
    sizes = sharding.mesh.shape

    def busy(entry: Any) -> Any:
        names = [name for name in (entry if isinstance(entry, tuple) else (entry,)) if name and sizes[name] > 1]
        return None if not names else names[0] if len(names) == 1 else tuple(names)

    spec = [busy(entry) for entry in sharding.spec]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _placed(shapes: Any, placed: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placed
    )
