"""Every program of a run, compiled ahead of time from shapes alone: no weights, no data, no devices."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from grpo_contracts import SamplingLaw
from grpo_gsm8k.assemble import EMBEDDED_POLICY, _optimizer
from grpo_gsm8k.config import Config
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.objective import make_forward, make_loss
from grpo_gsm8k.placement import RULES
from grpo_loss import MicroBatch, PackedBatch, PackShape, TrainState, init_state, make_score, make_update
from grpo_mesh import BATCH_AXES, CompileReport, compile_report, replicated, shardings, state_shardings
from grpo_sampler import ModelConfig, Sampler, abstract, merge

__all__ = [
    "PHASES",
    "Blueprint",
    "Measured",
    "Program",
    "Work",
    "blueprint",
    "bytes_per_device",
    "head_chunk",
    "measure",
    "model_config",
]

PHASES = ("start", "rollout", "evaluation", "scoring", "update")
_SHIPPED = Path(__file__).parent / "model_configs"
# What the TPU compiler says of a program that does not fit.
_REFUSED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Products of one splash call: the backward kernels compute the logits again.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


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
            row_length=config.loss.row_length or None,
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


@dataclass(frozen=True)
class Program:
    """One program of a run.

    Args:
        name: as in the table.
        phase: part of a step it belongs to; `start` and `evaluation` are no part of a step.
        compile: compiles it.
        beside: bytes on each device that it does not take as arguments and that are there while it runs.
        runs: of one step, given the compiled program.
        trips: turns of its outer loop whose end depends on the data, and of the loop inside that one.
        splash: prompts of a device, heads and padded length that one call of the splash kernel sees.
    """

    name: str
    phase: str
    compile: Callable[[], Compiled]
    beside: int
    runs: Callable[[Compiled], float] = lambda _: 1
    trips: tuple[float, float] = (1, 1)
    splash: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Work:
    """What one device does: FLOPs, bytes of main memory, collectives by kind -> (count, bytes)."""

    flops: float = 0.0
    traffic: float = 0.0
    collectives: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        kinds = sorted({*self.collectives, *other.collectives})
        pairs = {kind: (self.collectives.get(kind, (0, 0)), other.collectives.get(kind, (0, 0))) for kind in kinds}
        return Work(
            self.flops + other.flops,
            self.traffic + other.traffic,
            {kind: (mine[0] + theirs[0], mine[1] + theirs[1]) for kind, (mine, theirs) in pairs.items()},
        )

    def times(self, count: float) -> Work:
        """The same, `count` times over."""
        collectives = {kind: (n * count, size * count) for kind, (n, size) in self.collectives.items()}
        return Work(self.flops * count, self.traffic * count, collectives)

    @property
    def network(self) -> float:
        """Bytes that all collectives move."""
        return sum(size for _, size in self.collectives.values())


@dataclass(frozen=True)
class Measured:
    """A program that was compiled, or that the compiler refused.

    Args:
        name, phase: of the program.
        beside: bytes that stay on a device while it runs.
        seconds: it took to compile.
        report: the compiler's figures; None if it refused.
        refused: bytes the compiler said it would need; 0 if it did not refuse.
        work: of one step.
    """

    name: str
    phase: str
    beside: int
    seconds: float
    report: CompileReport | None
    refused: int
    work: Work

    @property
    def peak(self) -> int:
        """Bytes of a device in use while it runs."""
        return self.beside + (self.refused if self.report is None else self.report.peak)


def measure(plan: Blueprint, *, phases: Container[str] = PHASES) -> Iterator[Measured]:
    """Compiles the programs of a run, one after the other.

    Args:
        plan: the run.
        phases: whose programs to compile.

    Yields:
        What each needs and does.
    """
    outputs: dict[str, int] = {}
    for program in _programs(plan, outputs):
        if program.phase not in phases:
            continue
        measured = _compile(plan, program)
        if measured.report is not None:
            outputs[program.name] = measured.report.outputs
        yield measured


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct`s or arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def head_chunk(vocabulary: int) -> int:
    """Tokens whose logits `grpo_loss.token_logp` holds at once; a test compares the two."""
    return min(1024, max(128, 1 << (max(1, 2**27 // vocabulary).bit_length() - 1)))


def _programs(plan: Blueprint, outputs: Mapping[str, int]) -> Iterator[Program]:
    """In the order of a run. `outputs` holds the result sizes of the programs compiled so far, by name."""
    config, shards = plan.config, plan.shards
    rollout, loss = config.rollout, config.loss
    state, params, reference = (bytes_per_device(tree) for tree in (plan.state, plan.state.params, plan.reference))
    yield Program("start", "start", lambda: plan.start.lower(plan.state.params).compile(), reference)

    def decoding(phase: str, group_size: int, sequences: int, law: SamplingLaw | None) -> Iterator[Program]:
        mine, slots = -(-sequences // shards), -(-plan.sampler.slots // shards)
        compiles = plan.sampler.programs(
            plan.state.params, group_size=group_size, law=law, streaming=sequences > plan.sampler.slots
        )
        prompts = -(-mine // group_size)
        runs: dict[str, Callable[[Compiled], float]] = {
            "prefill": lambda compiled: math.ceil(prompts * shards / compiled.args_info[0][2].shape[0]),
            "cache": lambda _: 1,
        }
        splash = (4, plan.model.query_heads, _tile(config.data.max_prompt_length))
        beside = {
            "weights": lambda: state - params + reference,
            "cache": lambda: state + reference + outputs.get("weights", 0),
            "shrink": lambda: state + reference + outputs.get("weights", 0),
        }
        for name, compile_now in compiles.items():
            if phase == "evaluation" and name == "weights":
                continue  # the rollout's
            yield Program(
                f"evaluation {name}" if phase == "evaluation" else name,
                phase,
                compile_now,
                beside.get(name, lambda: state + reference)(),
                runs.get(name, lambda _: 1),
                (rollout.max_new_tokens * math.ceil(mine / slots), 1) if name == "decode" else (1, 1),
                splash if name == "prefill" else (0, 0, 0),
            )

    yield from decoding("rollout", rollout.group_size, rollout.prompts * rollout.group_size, None)
    if config.eval.every or config.eval.before or config.eval.after:
        yield from decoding("evaluation", 1, config.eval.problems, SamplingLaw(temperature=0.0))

    shape = plan.pack_shape
    updates = loss.epochs * loss.minibatches
    rows = rollout.prompts * -(-rollout.group_size // (shape.row_length // rollout.max_new_tokens))
    chunks = math.ceil(shape.rows // shards * shape.row_length / head_chunk(plan.model.vocab_size))
    splash = (
        shape.prompts // shards,
        plan.model.query_heads // plan.tensor,
        _tile(shape.prompt_length),
    )
    passes = (updates > 1) + (plan.reference is not None)
    yield Program(
        "scoring",
        "scoring",
        lambda: plan.score.lower(plan.state.params, _batch(plan, ())).compile(),
        state - params + reference,
        lambda _: passes,
        (math.ceil(rows / shape.rows), chunks),
        splash,
    )
    data = ["sampler_logp", "advantage"]
    data += ["old_logp"] * (updates > 1) + ["reference_logp"] * (plan.reference is not None)
    yield Program(
        "update",
        "update",
        lambda: plan.update.lower(plan.state, _batch(plan, data)).compile(),
        reference,
        lambda _: updates,
        (math.ceil(rows / loss.minibatches / shape.rows), chunks),
        splash,
    )


def _compile(plan: Blueprint, program: Program) -> Measured:
    begin = time.monotonic()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        told = _REFUSED.search(str(error))
        if told is None:
            raise
        needed = int(float(told[1]) * _UNITS[told[2]])
        return Measured(program.name, program.phase, program.beside, time.monotonic() - begin, None, needed, Work())
    seconds = time.monotonic() - begin
    report, work = _work(plan, compiled, program)
    return Measured(program.name, program.phase, program.beside, seconds, report, 0, work.times(program.runs(compiled)))


def _work(plan: Blueprint, compiled: Compiled, program: Program) -> tuple[CompileReport, Work]:
    """One run's work, with each of two nested loops whose ends depend on the data at its own number of turns.

    With x turns of every such loop a figure is a + b x + c x², b the outer loop's own part and c the inner one's. Three
    readings of the program tell a, b and c; outer and inner turns m and n then make it a + m (b + n c).
    """
    report = compile_report(compiled, unknown_trips=0)
    readings = [report]
    if report.unknown_loops:
        readings += [compile_report(compiled, unknown_trips=turns) for turns in (1, 2)]
    outer, inner = program.trips

    def at_trips(figure: Callable[[CompileReport], float]) -> float:
        if len(readings) == 1:
            return figure(report)
        zero, one, two = map(figure, readings)
        square = (two - 2 * one + zero) / 2
        return zero + outer * (one - zero - square + inner * square)

    splash = 0.0
    for kernel in readings[-1].kernels:
        calls = at_trips(lambda reading, kernel=kernel: reading.kernels.get(kernel, 0))
        splash += calls * _splash_flops(kernel, plan.model.head_size, *program.splash)

    def moved(kind: str, figure: str) -> float:
        return at_trips(
            lambda reading: getattr(reading.collectives[kind], figure) if kind in reading.collectives else 0
        )

    return report, Work(
        at_trips(lambda reading: reading.flops) + splash,
        at_trips(lambda reading: reading.traffic),
        {kind: (moved(kind, "count"), moved(kind, "bytes")) for kind in readings[-1].collectives},
    )


def _splash_flops(kernel: str, head_size: int, rows: int, heads: int, length: int) -> float:
    """Of one call: the kernel declares none. Half of all pairs are causal."""
    products = next((count for name, count in _SPLASH_PRODUCTS.items() if name in kernel), 0)
    return products * 2 * rows * heads * head_size * length**2 / 2


def _tile(length: int) -> int:
    return math.ceil(length / 512) * 512 if length > 512 else math.ceil(length / 128) * 128


def _batch(plan: Blueprint, data: Any) -> PackedBatch:
    """A packed batch as `learn` places it."""
    shape = plan.pack_shape
    rows = NamedSharding(plan.mesh, PartitionSpec(None, BATCH_AXES))

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
        prompt_R=array(shape.rows),
        source_RT=tokens(),
        sequence_RT=tokens(),
        mask_RT=tokens(dtype=np.bool_),
        data={name: tokens(dtype=np.float32) for name in data},
    )
    count: Any = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(plan.mesh))
    return PackedBatch(micro, count)


def _on(shapes: Any, placed: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placed
    )


def _attention(graphdef: Any, shapes: Any) -> str:
    return merge(graphdef, shapes).attention
