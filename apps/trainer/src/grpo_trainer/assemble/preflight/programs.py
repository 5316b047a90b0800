"""Every program of a run, compiled ahead of time from its blueprint."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

import jax
from jax.stages import Compiled

from grpo_contracts import SamplingLaw
from grpo_mesh import CompileReport, compile_with_text
from grpo_trainer.assemble.blueprint import Blueprint, bytes_per_device
from grpo_trainer.assemble.preflight.work import Splash, Work, head_chunks, work_of

__all__ = ["PHASES", "Measured", "Program", "measure"]

PHASES = ("start", "rollout", "evaluation", "scoring", "update")
# What the TPU compiler says of a program that does not fit.
_REFUSED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """One program of a run.

    Args:
        name: as in the table.
        phase: part of a step it belongs to; `start` and `evaluation` are no part of a step.
        compile: compiles it, with `compiler_options`.
        beside: bytes on each device that it does not take as arguments and that are there while it runs.
        runs: of one step, given the compiled program.
        trips: turns of its outer loop whose end depends on the data, and of the loop inside that one.
        splash: what a call of its splash kernels computes, given the compiled program.
    """

    name: str
    phase: str
    compile: Callable[..., Compiled]
    beside: int
    runs: Callable[[Compiled], float] = lambda _: 1
    trips: tuple[float, float] = (1, 1)
    splash: Callable[[Compiled], Splash | None] = lambda _: None


@dataclass(frozen=True)
class Measured:
    """A program that was compiled, or that the compiler refused.

    Args:
        name, phase: of the program.
        beside: bytes that stay on a device while it runs.
        seconds: of CPU that it took to compile, whatever else the machine was doing.
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
        measured = _compile(program)
        if measured.report is not None:
            outputs[program.name] = measured.report.outputs
        yield measured


def _programs(plan: Blueprint, outputs: Mapping[str, int]) -> Iterator[Program]:
    """In the order of a run. `outputs` holds the result sizes of the programs compiled so far, by name."""
    config, model, shards = plan.config, plan.model, plan.shards
    rollout, loss = config.rollout, config.loss
    state, params, reference = (bytes_per_device(tree) for tree in (plan.state, plan.state.params, plan.reference))
    yield Program("start", "start", lambda **options: plan.start.lower(plan.state.params).compile(**options), reference)

    def decoding(phase: str, group_size: int, sequences: int, law: SamplingLaw | None) -> Iterator[Program]:
        mine, slots = -(-sequences // shards), -(-plan.sampler.slots // shards)
        compiles = plan.sampler.programs(
            plan.state.params, group_size=group_size, law=law, streaming=sequences > plan.sampler.slots
        )
        prompts = -(-mine // group_size)
        runs: dict[str, Callable[[Compiled], float]] = {
            "prefill": lambda compiled: math.ceil(prompts / prefilled(compiled)),
        }

        def prefilled(compiled: Compiled) -> int:
            return compiled.args_info[0][2].shape[0] // shards  # prompts of a shard in one call

        def splash_of_prefill(compiled: Compiled) -> Splash:
            return Splash(prefilled(compiled), model.query_heads, model.head_size, config.data.max_prompt_length)

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
                splash_of_prefill if name == "prefill" else lambda _: None,
            )

    yield from decoding("rollout", rollout.group_size, rollout.prompts * rollout.group_size, None)
    if config.eval.every or config.eval.before or config.eval.after:
        yield from decoding("evaluation", 1, config.eval.problems, SamplingLaw(temperature=0.0))

    shape = plan.pack_shape
    updates = loss.epochs * loss.minibatches
    rows = rollout.prompts * -(-rollout.group_size // (shape.row_length // rollout.max_new_tokens))
    chunks = head_chunks(shape.rows // shards * shape.row_length, model.vocab_size)
    splash = Splash(shape.prompts // shards, model.query_heads // plan.tensor, model.head_size, shape.prompt_length)
    passes = (updates > 1) + (plan.reference is not None)
    yield Program(
        "scoring",
        "scoring",
        lambda **options: plan.score.lower(plan.state.params, plan.batch()).compile(**options),
        state - params + reference,
        lambda _: passes,
        (math.ceil(rows / shape.rows), chunks),
        lambda _: splash,
    )
    data = ["sampler_logp", "advantage"]
    data += ["old_logp"] * (updates > 1) + ["reference_logp"] * (plan.reference is not None)
    yield Program(
        "update",
        "update",
        lambda **options: plan.update.lower(plan.state, plan.batch(data)).compile(**options),
        reference,
        lambda _: updates,
        (math.ceil(rows / loss.minibatches / shape.rows), chunks),
        lambda _: splash,
    )


def _compile(program: Program) -> Measured:
    begin = time.process_time()
    try:
        compiled, text = compile_with_text(program.compile)
    except jax.errors.JaxRuntimeError as error:
        told = _REFUSED.search(str(error))
        if told is None:
            raise
        needed = int(float(told[1]) * _UNITS[told[2]])
        return Measured(program.name, program.phase, program.beside, time.process_time() - begin, None, needed, Work())
    seconds = time.process_time() - begin
    report, work = work_of(compiled, text, program.trips, program.splash(compiled))
    return Measured(program.name, program.phase, program.beside, seconds, report, 0, work.times(program.runs(compiled)))
