"""GRPO, top to bottom: prompts, rollout, rewards, advantages, update, metrics, checkpoint, evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_contracts import PolicyVersion, Rollout, Scored, validate
from grpo_mesh import EXIT_PREEMPTED, Preemption, check_agreement, digest, preemption
from grpo_trainer.assemble import Run, assemble
from grpo_trainer.data.stream import ProblemBatch
from grpo_trainer.evaluate.accuracy import verdict
from grpo_trainer.evaluate.decode import evaluate
from grpo_trainer.evaluate.records import Comparison, compare, read_records
from grpo_trainer.learn import learn, make_batch
from grpo_trainer.report.export import check_export, export_run
from grpo_trainer.report.page import write_report
from grpo_trainer.report.terminal import printable
from grpo_trainer.rewards.refill import choose_groups, count_with_signal
from grpo_trainer.rewards.scoring import Transcript, transcribe
from grpo_trainer.run.checkpoint import Checkpoints
from grpo_trainer.run.clock import Clock
from grpo_trainer.run.folder import RunFolder, matched_settings, summarize_accuracy
from grpo_trainer.run.health import Health
from grpo_trainer.run.metrics import completion_records, step_metrics
from grpo_trainer.run.progress import Progress
from grpo_trainer.run.state import LoopState
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Task

__all__ = ["fit", "sample", "train"]


def train(settings: Settings, task: Task, *, dry_run: bool = False) -> int:
    """Train a policy with GRPO; started again with the same settings, go on where the last run stopped.

    Args:
        settings: resolved.
        task: what to learn.
        dry_run: validate and build everything, then stop before the first rollout.

    Returns:
        Exit code: 0 when the last step is done, `EXIT_PREEMPTED` when a signal stopped the run after a saved step.
    """
    started = time.monotonic()
    run = assemble(matched_settings(settings), task)
    if not dry_run:
        return fit(run, started=started)
    _introduce(run)
    print("dry run: everything is valid and built; nothing was sampled")
    return 0


def fit(
    run: Run, *, started: float | None = None, progress: Progress | None = None, checkpoints: Checkpoints | None = None
) -> int:
    """Train an assembled run to its last step, in its folder.

    Args:
        run: from `assemble`.
        started: `time.monotonic()` of the run's beginning; None: now.
        progress: shows steps and phases; None: on standard output, by the first process.
        checkpoints: of the run; None: those in its folder, as the settings say.

    Returns:
        Exit code, as of `train`.
    """
    started = time.monotonic() if started is None else started
    settings, leader = run.settings, jax.process_index() == 0
    _introduce(run)
    with RunFolder(settings, run.versions, writer=leader, processes=jax.process_count()) as folder:
        if folder.finished:
            if leader:
                write_report(folder.path)  # a run killed after its summary has none yet
            print(f"{folder.path} holds this run, finished: see {folder.path / 'report.html'}")
            return 0
        check_export(settings, folder.path)  # now, not after the last step
        if checkpoints is None:
            checkpoints = Checkpoints(
                folder.checkpoints,
                keep=settings.checkpoint.keep,
                versions=run.versions,
                any_version=settings.checkpoint.any_version,
                any_data=settings.checkpoint.any_data,
            )
        shown = Progress(settings.steps, enabled=leader) if progress is None else progress
        with preemption() as stop, shown:
            code = _steps(run, folder, checkpoints, stop, shown, started)
        checkpoints.close()
        if leader and code == 0:
            print(f"report: {write_report(folder.path)}")
    return code


def _introduce(run: Run) -> None:
    """Make sure that every process of the job means the same run, and say what it is."""
    facts = {"identity": run.identity, "shapes": run.plan.shapes, "version": run.versions}
    check_agreement({"config": run.settings.model_dump(mode="json"), **facts})
    warned = [f"warning: {text}" for text in run.cautions]
    for line in (*run.description, *_shown(run), *warned) if jax.process_index() == 0 else ():
        print(line, flush=True)


def _shown(run: Run) -> Iterator[str]:
    """One whole prompt as the model sees it, line by line."""
    yield f"prompt   {int(run.held_out.prompts.length_P[0])} tokens, as the model sees it:"
    for line in printable(run.prompt).split("\n"):
        yield f"         | {line}"


def _steps(
    run: Run, folder: RunFolder, checkpoints: Checkpoints, stop: Preemption, progress: Progress, started: float
) -> int:
    settings = run.settings
    loop = _resume(run, folder, checkpoints, progress)
    seconds_before = loop.seconds
    health = Health(settings, folder, progress, loop.health)

    if settings.eval.before and not loop.step:
        with _clock(run, progress, loop).phase("evaluation"):
            result = evaluate(run, run.network(loop.train.params), records=folder.evaluation(0))
        loop.accuracy["before"] = result.record()
        folder.log(0, result.metrics())
        progress.note(f"before: {result}")

    for step in range(loop.step, settings.steps):
        clock, prefilled = _clock(run, progress, loop), run.plan.sampler.prefill_positions
        scored, transcript, drawn = _draw(run, loop.train.params, step, clock, health)
        computed, live = np.subtract(run.plan.sampler.prefill_positions, prefilled)
        judgements = transcript.judgements(run.task)
        with clock.phase("advantage"):
            batch = make_batch(run, loop.train.params, scored)
            validate(batch, level="values")
        with clock.phase("update"):
            loop.train, learned = learn(run, loop.train, batch, step)

        loop.step = done = step + 1
        last = done == settings.steps
        metrics = step_metrics(batch, judgements, learned, clock.seconds)
        if live:
            metrics["rollout/prefill_positions_per_token"] = float(computed / live)
        if settings.rollout.refills:
            metrics["rollout/drawn_groups"] = float(drawn)
        metrics["learning_rate"] = float(jnp.asarray(run.plan.learning_rate(loop.train.step)))
        metrics |= health.watch(done, metrics)
        if _due(done, settings.eval.every) or (last and settings.eval.after):
            with clock.phase("evaluation"):
                result = evaluate(run, run.network(loop.train.params), records=folder.evaluation(done))
            loop.accuracy["after" if last else "latest"] = result.record()
            metrics |= result.metrics()
            progress.note(f"step {done}: {result}")
        with clock.phase("logging", together=False):
            folder.log(done, metrics)
            folder.completions(done, completion_records(scored, transcript, judgements, count=settings.log.completions))
            progress.step(done, metrics)

        stopping = stop.requested() and not last
        due = last or stopping or _due(done, settings.checkpoint.every)
        if health.failing or (settings.checkpoint.every and due):
            loop.problems, loop.seconds = run.problems.get_state(), seconds_before + time.monotonic() - started
            with clock.phase("checkpoint"):
                checkpoints.save(loop, run.identity, settings, accuracy=metrics.get("eval/accuracy"))
        if health.failing:
            checkpoints.wait()
            health.stop(done, run, loop.train.params, batch, metrics)
        if stopping:
            checkpoints.wait()
            kept = "saved" if settings.checkpoint.every else "lost, because checkpoint.every is 0"
            progress.note(f"asked to stop: step {done} is done and {kept}; the same command resumes the run")
            return EXIT_PREEMPTED

    checkpoints.wait()
    loop.seconds = seconds_before + time.monotonic() - started
    health.finish(loop.step)
    paired = _paired(folder, loop)
    if settings.checkpoint.export:
        facts = {**summarize_accuracy(loop.accuracy), "paired": paired and paired.record()}
        progress.note(f"exported: {export_run(run, folder.path, loop.train.params, loop.step, facts)}")
    _finish(run, folder, loop, paired)
    progress.note(verdict(settings.steps, loop.accuracy, loop.seconds, paired=paired and paired.strict))
    return 0


def sample(run: Run, params: Any, batch: ProblemBatch, policy: PolicyVersion) -> Rollout:
    """Draw a group of completions for each problem.

    Args:
        run: the assembled run.
        params: of the policy.
        batch: problems with their prompts.
        policy: version of the parameters; its step decides the random numbers.

    Returns:
        The rollout.
    """
    return run.plan.sampler.generate(
        run.network(params),
        batch.prompts,
        group_size=run.settings.rollout.group_size,
        seed=run.settings.seed,
        step=policy.step,
        policy=policy,
    )


def _draw(run: Run, params: Any, step: int, clock: Clock, health: Health) -> tuple[Scored, Transcript, int]:
    """A step's completions with their rewards, and how many groups were drawn for them."""
    settings, groups = run.settings, run.settings.rollout.prompts
    draws: list[tuple[Scored, Transcript]] = []
    for _ in range(1 + settings.rollout.refills):
        with clock.phase("rollout"):
            batch = next(run.problems)
            policy = PolicyVersion(step, digest(params))
            rollout = sample(run, params, batch, policy)
        with clock.phase("reward"):
            health.check_rollout(rollout, policy)
            transcript = transcribe(rollout, batch.problems, run.tokenizer, settings.rollout.stop)
            scored = run.rewards.score(rollout, transcript, partial(health.reward_failures, step + 1))
            health.check_rewards(step + 1, scored, transcript)
        if not settings.rollout.refills:
            return scored, transcript, groups
        draws.append((scored, transcript))
        if sum(count_with_signal(scored) for scored, _ in draws) >= groups:
            break
    return *choose_groups(draws, groups), groups * len(draws)


def _resume(run: Run, folder: RunFolder, checkpoints: Checkpoints, progress: Progress) -> LoopState:
    """The loop's state after the newest checkpoint that is whole, or at the beginning."""
    restored = checkpoints.restore(run.state, run.identity, settings=run.settings, donate=True)
    if restored is None:
        loop = LoopState(run.state)
    else:
        loop = LoopState.from_notes(restored.state, restored.notes)
        run.problems.set_state(loop.problems)
        if restored.identity.get("held_out") != run.identity["held_out"]:
            loop.accuracy = {}  # of other problems: no gain can be told from it
        checkpoints.set_aside_after(loop.step)
        progress.note(f"going on after step {loop.step} of {folder.path}")
    for note in folder.start(loop.step, prompt=run.prompt):
        progress.note(note)
    progress.resume(loop.step)
    return loop


def _paired(folder: RunFolder, loop: LoopState) -> Comparison | None:
    """After against before, problem by problem."""
    if not {"before", "after"} <= loop.accuracy.keys():
        return None
    return compare(*(read_records(folder.evaluation(step)) for step in (0, loop.step)))


def _finish(run: Run, folder: RunFolder, loop: LoopState, paired: Comparison | None) -> None:
    folder.summary(
        steps=run.settings.steps,
        seconds=loop.seconds,
        seconds_by_phase={name: round(total, 3) for name, total in loop.phases.items()},
        device=run.plan.device,
        accuracy=loop.accuracy,
        paired=paired and paired.record(),
        skipped_updates=int(loop.train.skipped),
        warnings=loop.health.warnings,
        compiled_programs=run.plan.sampler.compile_count,
        state_digest=digest(loop.train),
    )


def _clock(run: Run, progress: Progress, loop: LoopState) -> Clock:
    return Clock(progress, limit=run.settings.phase_timeout, totals=loop.phases)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
