"""The programs of a run, each to be compiled from its blueprint, and what their figures add up to."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence

import jax
from jax.stages import Lowered

from grpo_contracts import GrpoError, SamplingParams
from grpo_loss import PackedBatch, abstract_batch, logit_chunks
from grpo_mesh import Slice, bytes_per_device, replicated
from grpo_mesh.preflight import Measured, Program, Verdict, format_bytes, judge, measure
from grpo_sampler import splash_flops
from grpo_trainer.assemble.blueprint import Blueprint

__all__ = ["PHASES", "STEP", "CompilerError", "generate_code", "judge_step", "memory_rows", "programs"]

PHASES = ("start", "rollout", "evaluation", "scoring", "update")
STEP = ("rollout", "scoring", "update")  # the phases that every step has


class CompilerError(GrpoError, RuntimeError):
    """The compiler failed at a program for another reason than a lack of memory, or its process ended."""


def programs(plan: Blueprint, *, phases: Container[str] = PHASES) -> Iterator[Program]:
    """List what a run compiles.

    Args:
        plan: the run.
        phases: whose programs to list.

    Yields:
        Programs in the order of a run; nothing is traced or compiled until `grpo_mesh.preflight.measure` does so.
    """
    return (program for program in _programs(plan) if program.phase in phases)


def judge_step(plan: Blueprint, measured: Sequence[Measured], target: Slice) -> Verdict:
    """Add up the programs of a step in which every completion runs to its limit.

    Args:
        plan: the run.
        measured: its programs, compiled for the slice.
        target: the slice.

    Returns:
        The verdict; its tokens are completion tokens.
    """
    rollout = plan.settings.rollout
    tokens = rollout.prompts * rollout.group_size * rollout.max_new_tokens
    return judge(measured, target, phases=STEP, tokens=tokens)


def generate_code(plan: Blueprint, target: Slice) -> Verdict:
    """Compile a run's programs to their end, which shows whether there is code for all, and print how it goes.

    Args:
        plan: the run.
        target: the slice.

    Returns:
        The verdict with the code, which takes memory, too.

    Raises:
        CompilerError: there is no code for a program.
    """
    print("code     is generated now, which takes most of the compiler's time", flush=True)
    measured: list[Measured] = []
    try:
        for program in measure(programs(plan)):
            measured.append(program)
            print(f"compiled {program.name} in {program.seconds:.1f} s of CPU", flush=True)
    except jax.errors.JaxRuntimeError as error:
        after = f" after {measured[-1].name}" if measured else ""
        raise CompilerError(f"the compiler failed at the program{after}: {str(error).splitlines()[0]}") from error
    verdict = judge_step(plan, measured, target)
    largest = max((program.report.code for program in measured if program.report), default=0)
    outcome = "fits" if verdict.fits else "DOES NOT FIT"
    print(
        f"code     takes up to {format_bytes(largest)} of a device; with it the peak is {format_bytes(verdict.peak)}: "
        f"{outcome} {target.name}",
        flush=True,
    )
    return verdict


def memory_rows(plan: Blueprint, measured: Sequence[Measured]) -> list[tuple[str, str, int]]:
    """Name what a device holds, for `grpo_mesh.preflight.table`.

    Args:
        plan: the run.
        measured: its programs.

    Returns:
        (label, note, bytes of one device).
    """
    settings, reports = plan.settings, {program.name: program.report for program in measured}
    parameters = bytes_per_device(plan.state.params)
    rows = [("parameters", settings.model.dtype, parameters)]
    if plan.frozen:
        rows = [("base", settings.model.dtype, bytes_per_device(plan.frozen)), ("adapters", "float32", parameters)]
    rows += [
        ("optimizer", "moments, and master copy if any", bytes_per_device(plan.state) - parameters),
    ]
    if plan.reference is not None:
        rows.append(("reference", settings.model.dtype, bytes_per_device(plan.reference)))
    sequences = math.ceil(plan.sampler.slots / plan.rollout_shards)
    for name, label, note in (
        ("weights", "decoding weights", f"{settings.model.compute_dtype}, during rollouts"),
        ("cache", "KV cache", f"{sequences} sequences, during rollouts"),
    ):
        if report := reports.get(name):
            rows.append((label, note, report.outputs))
    return rows


def _programs(plan: Blueprint) -> Iterator[Program]:
    settings, beside = plan.settings, bytes_per_device((plan.reference, plan.frozen))
    rollout, evaluation = settings.rollout, settings.eval
    yield Program("start", lambda: plan.start.lower(plan.state.params), "start", beside=beside)
    yield from _decoding(plan, "rollout", group_size=rollout.group_size, sequences=rollout.prompts * rollout.group_size)
    if evaluation.every or evaluation.before or evaluation.after:
        yield from _decoding(plan, "evaluation", group_size=1, sequences=evaluation.problems, sampling=plan.greedy)
        if plan.sampled:
            count = evaluation.samples
            sequences, title = evaluation.problems * count, "evaluation of samples"
            yield from _decoding(
                plan, "evaluation", title, group_size=count, sequences=sequences, sampling=plan.sampled
            )
    yield from _learning(plan)


def _decoding(
    plan: Blueprint,
    phase: str,
    title: str = "",
    *,
    group_size: int,
    sequences: int,
    sampling: SamplingParams | None = None,
) -> Iterator[Program]:
    sampler = plan.sampler if phase == "rollout" else plan.evaluator
    shards, model = plan.rollout_shards, plan.model
    network = plan.network(plan.state.params, *plan.frozen)
    held = bytes_per_device((plan.state, plan.frozen, plan.reference))
    local = math.ceil(sequences / shards)  # of one shard, as are the slots and prompts below
    refills = math.ceil(local / math.ceil(sampler.slots / shards))

    def with_weights(measured: Mapping[str, Measured]) -> int:
        return held + (measured["weights"].outputs if "weights" in measured else 0)

    def prefilled(lowered: Lowered) -> int:
        """Prompts of one call."""
        return lowered.args_info[0][2].shape[0] // shards

    def prefills(lowered: Lowered) -> float:
        return math.ceil(math.ceil(local / group_size) / prefilled(lowered))

    def prefill_flops(kernel: str, lowered: Lowered) -> float:
        return splash_flops(
            kernel,
            rows=prefilled(lowered),
            heads=model.query_heads // plan.rollout_mesh.shape["tp"],
            head_size=model.head_size,
            length=plan.settings.data.max_prompt_length,
        )

    lowers = sampler.programs(
        network,
        group_size=group_size,
        sampling=sampling,
        streaming=sequences > sampler.slots,
    )
    for name, lower in lowers.items():
        label = name if phase == "rollout" else f"{title or phase} {name}"
        match name:
            case "weights":
                if phase == "rollout":  # an evaluation runs the same program
                    yield Program(label, lower, phase, beside=held - bytes_per_device(network))
            case "cache" | "shrink":
                yield Program(label, lower, phase, beside=with_weights)
            case "prefill":
                yield Program(label, lower, phase, beside=held, runs=prefills, kernel_flops=prefill_flops)
            case "decode":
                steps = sampler.max_new_tokens * refills
                # Refilled rows start anywhere in the ring, so that most steps read all of it: counted as all steps.
                shares = sampler.branch_shares if refills == 1 else {}
                yield Program(label, lower, phase, beside=held, trips=(steps, 1), branch_shares=shares)
            case _:
                yield Program(label, lower, phase, beside=held)


def _learning(plan: Blueprint) -> Iterator[Program]:
    rollout, loss = plan.settings.rollout, plan.settings.loss
    shape, model, shards = plan.pack_shape, plan.model, plan.shards
    params, state, frozen = (bytes_per_device(tree) for tree in (plan.state.params, plan.state, plan.reference))
    updates = loss.epochs * loss.minibatches
    # As in `make_batch` and `updates` of `grpo_trainer.learn`: each of the two is one scoring pass over the rollout.
    in_reward = loss.kl_in == "reward" and plan.reference is not None
    old, reference = updates > 1 or in_reward or loss.top_entropy is not None, plan.reference is not None
    rows = rollout.prompts * math.ceil(rollout.group_size / (shape.row_length // rollout.max_new_tokens))
    chunks = logit_chunks(shape.rows // shards * shape.row_length, model.vocab_size, loss.chunk or None)

    def flops(kernel: str, lowered: Lowered) -> float:
        return splash_flops(
            kernel,
            rows=shape.prompts // shards,
            heads=model.query_heads // plan.tensor,
            head_size=model.head_size,
            length=shape.prompt_length,
        )

    yield Program(
        "scoring",
        lambda: plan.score.lower(plan.state.params, _batch(plan), *plan.frozen),
        "scoring",
        beside=state - params + frozen,
        runs=old + reference,
        trips=(math.ceil(rows / shape.rows), chunks),
        kernel_flops=flops,
    )
    yield Program(
        "update",
        lambda: plan.update.lower(plan.state, _batch(plan, old=old, reference=reference), *plan.frozen),
        "update",
        beside=frozen,
        runs=updates,
        trips=(math.ceil(rows / loss.minibatches / shape.rows), chunks),
        kernel_flops=flops,
    )


def _batch(plan: Blueprint, *, old: bool = False, reference: bool = False) -> PackedBatch:
    """A packed batch as `learn` places it."""
    return abstract_batch(
        plan.pack_shape,
        rows_sharding=plan.rows_sharding,
        count_sharding=replicated(plan.mesh),
        old=old,
        reference=reference,
    )
