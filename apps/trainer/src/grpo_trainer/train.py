"""GRPO, top to bottom: prompts, rollout, rewards, advantages, update, metrics, checkpoint, evaluation."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax

from grpo_contracts import PolicyIdentity, TrainBatch, validate
from grpo_trainer.assemble.run import Assembly, assemble
from grpo_trainer.run.checkpoint import Checkpoints
from grpo_trainer.settings.schema import Config
from grpo_trainer.evaluate import evaluate
from grpo_trainer.run.health import Health
from grpo_trainer.learn import advantages, learn
from grpo_trainer.run.metrics import Clock, sample_records, step_metrics
from grpo_trainer.run.preemption import EXIT_PREEMPTED, preemption
from grpo_trainer.run.progress import Progress
from grpo_trainer.report.page import write_report
from grpo_trainer.run.folder import RunFolder, versions
from grpo_mesh import check_agreement, digest


def train(config: Config, *, dry_run: bool = False) -> int:
    """Train a policy with GRPO; started again with the same config, go on where the last run stopped.

    Args:
        config: the resolved settings.
        dry_run: validate and build everything, then stop before the first rollout.

    Returns:
        Exit code: 0 when the last step is done, `EXIT_PREEMPTED` when a signal stopped the run after a saved step.
    """
    started = time.monotonic()
    run = assemble(config)
    facts = {"identity": run.identity, "shapes": run.shapes, "version": versions()}
    check_agreement({"config": config.model_dump(mode="json"), **facts})
    leader = jax.process_index() == 0
    for line in run.description if leader else ():
        print(line, flush=True)
    if dry_run:
        print("dry run: everything is valid and built; nothing was sampled")
        return 0
    with RunFolder(config, writer=leader, processes=jax.process_count()) as folder:
        if folder.finished:
            print(f"{folder.path} holds this run, finished: see {folder.path / 'report.html'}")
            return 0
        settings = config.checkpoint
        checkpoints = Checkpoints(
            folder.checkpoints, keep=settings.keep, any_version=settings.any_version, any_data=settings.any_data
        )
        with preemption() as stop, Progress(config.steps, enabled=leader) as progress:
            code = _run(run, folder, checkpoints, stop, progress, started)
        checkpoints.close()
        if leader and code == 0:
            print(f"report: {write_report(folder.path)}")
    return code


def _run(
    run: Assembly, folder: RunFolder, checkpoints: Checkpoints, stop: Any, progress: Progress, started: float
) -> int:
    config, state, problems = run.config, run.state, run.problems
    notes: dict[str, Any] = {"identity": run.identity, "accuracy": {}, "seconds": 0.0, "phases": {}, "health": {}}
    if restored := checkpoints.restore(state, run.identity, donate=True):
        state, notes = restored.state, notes | restored.notes | {"identity": run.identity}
        problems.set_state(notes["problems"])
        if restored.notes["identity"].get("held_out") != run.identity["held_out"]:
            notes["accuracy"] = {}  # of other problems: no gain can be told from it
        checkpoints.forget_after(restored.step)
        progress.note(f"going on after step {restored.step} of {folder.path}")
    first = restored.step if restored else 0
    folder.start(first)
    progress.resume(first)
    seconds_before = notes["seconds"]
    health = Health(config, folder, progress, notes["health"])

    if config.eval.before and not first:
        with Clock(progress, limit=config.phase_timeout, totals=notes["phases"]).phase("evaluation"):
            result = evaluate(run, state.params)
        notes["accuracy"]["before"] = result.record()
        folder.log(0, result.metrics())
        progress.note(f"before: {result}")

    for step in range(first, config.steps):
        clock = Clock(progress, limit=config.phase_timeout, totals=notes["phases"])
        with clock.phase("rollout"):
            asked = next(problems)
            policy = PolicyIdentity(step, digest(state.params))
            rollout = run.sampler.generate(
                state.params,
                asked.prompts,
                group_size=config.rollout.group_size,
                seed=config.seed,
                step=step,
                policy=policy,
            )
        with clock.phase("reward"):
            health.check_rollout(rollout, policy)
            scored = run.rewards.score(rollout, asked, partial(health.reward_failures, step + 1))
        with clock.phase("advantage"):
            batch = TrainBatch(scored, advantages(scored, config))
            validate(batch, level="values")
        with clock.phase("update"):
            state, learned = learn(run, state, batch, step)

        done = step + 1
        last = done == config.steps
        metrics = step_metrics(batch, learned, clock) | {"learning_rate": run.learning_rate(state.step)}
        metrics |= health.watch(done, metrics)
        if _due(done, config.eval.every) or (last and config.eval.after):
            with clock.phase("evaluation"):
                result = evaluate(run, state.params)
            notes["accuracy"]["after" if last else "latest"] = result.record()
            metrics |= result.metrics()
            progress.note(f"step {done}: {result}")
        with clock.phase("logging", together=False):
            folder.log(done, metrics)
            folder.completions(done, sample_records(run, scored, asked, count=config.log.completions))
            progress.step(done, metrics)

        stopping = stop.requested() and not last
        due = last or stopping or _due(done, config.checkpoint.every)
        if health.failing or (config.checkpoint.every and due):
            notes |= {"problems": problems.get_state(), "seconds": seconds_before + time.monotonic() - started}
            notes["config"] = config.model_dump(mode="json")
            with clock.phase("checkpoint"):
                checkpoints.save(done, state, notes, accuracy=metrics.get("eval/accuracy"))
        if health.failing:
            checkpoints.wait()
            health.stop(done, run, state.params, batch, metrics)
        if stopping:
            checkpoints.wait()
            kept = "saved" if config.checkpoint.every else "lost, because checkpoint.every is 0"
            progress.note(f"asked to stop: step {done} is done and {kept}; the same command goes on")
            return EXIT_PREEMPTED

    checkpoints.wait()
    seconds = seconds_before + time.monotonic() - started
    folder.summary(
        steps=config.steps,
        seconds=seconds,
        seconds_by_phase={name: round(total, 3) for name, total in notes["phases"].items()},
        device=run.device,
        accuracy=notes["accuracy"],
        skipped_updates=int(state.skipped),
        warnings=health.warnings,
        compiled_programs=run.sampler.compile_count,
        state_digest=digest(state),
    )
    progress.note(run.verdict(notes["accuracy"], seconds))
    return 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
