"""A failed step once more, on one device: which numbers were not finite, and where they came from.

The order is the computation's: parameters, batch, log-probabilities, ratios, KL, loss, gradients, step. What is not
finite first is the cause, what follows is the consequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_contracts import TrainBatch
from grpo_trainer.run.capsule import CapsuleError, read_capsule
from grpo_trainer.settings.paths import argument_path
from grpo_trainer.settings.startup import prepare_process
from grpo_trainer.task import Task

if TYPE_CHECKING:
    from grpo_loss import PackedBatch, TrainState
    from grpo_trainer.assemble import Run

__all__ = ["main", "not_finite"]

_HELP = "Compute a failed step again from its capsule and say what was not finite, and where."


def main(task: Task, arguments: Sequence[str]) -> int:
    """``replay``: compute a failed step again from its capsule and say what was not finite, and where.

    Args:
        task: of the run that failed.
        arguments: of the command line.

    Returns:
        Exit code: 0 where something was not finite again, 1 where everything is finite here.
    """
    parser = argparse.ArgumentParser(prog=f"grpo-{task.name} replay", description=_HELP)
    parser.add_argument("file", type=argument_path, help="capsule-*.zip of a run folder, beside the run's checkpoints")
    path = parser.parse_args(arguments).file
    capsule, batch = read_capsule(path)
    settings = capsule.settings.on_any_devices()
    for line in prepare_process(settings):
        print(line, flush=True)

    import jax

    from grpo_mesh import digest
    from grpo_trainer.assemble import assemble
    from grpo_trainer.run.checkpoint import Checkpoints

    run = assemble(settings, task, devices=jax.devices()[:1])
    folder = path.absolute().parent / capsule.checkpoint
    # A reader: nothing of the run may be deleted, whatever it kept.
    checkpoints = Checkpoints(folder, keep=1_000_000, versions=run.versions, any_version=True, any_data=True)
    restored = checkpoints.restore(run.state, capsule.identity, at=capsule.step, donate=True)
    if restored is None:
        raise CapsuleError(f"{path} needs the parameters in {folder / f'step_{capsule.step}'}: there are none")
    print(f"step {capsule.step} of {path}, on {run.plan.device}")
    if (found := digest(restored.state.params)) != capsule.parameters:
        print(f"the checkpoint's parameters are not the capsule's: {found[:12]}, not {capsule.parameters[:12]}")
    for name, version in run.versions.items():
        if (then := capsule.versions.get(name)) != version:
            print(f"{name} is {version} here, was {then} there")
    findings = list(not_finite(run, restored.state, batch, capsule.step - 1))
    for finding in findings:
        print(finding)
    if not findings:
        print("everything is finite here: the devices, or the versions above, make the difference")
    return 0 if findings else 1


def not_finite(run: Run, state: TrainState, batch: TrainBatch, step: int) -> Iterator[str]:
    """Everything of a step that is not finite, from cause to consequence.

    Args:
        run: the assembled run.
        state: the parameters and moments that the updates were refused on.
        batch: what was to be learned from.
        step: of the run, from 0.

    Yields:
        A line each: what, where, how many.
    """
    from grpo_trainer.learn import updates

    for name, tree in (("parameter", state.params), ("optimizer state", state.opt_state)):
        yield from _leaves(name, tree)
    rollout = batch.scored.rollout
    for name, array in (
        ("reward of row", batch.scored.reward_B),
        ("advantage of row", batch.advantage),
        ("sampler's log-probability of row", rollout.logp_BT),
    ):
        yield from _rows(name, np.asarray(array))
    for number, packed in enumerate(updates(run, state.params, batch, step), 1):
        for finding in _update(run, state, packed):
            yield f"update {number}: {finding}"


def _update(run: Run, state: TrainState, packed: PackedBatch) -> Iterator[str]:
    import jax
    import jax.numpy as jnp

    from grpo_loss import PackedBatch, kl_estimate
    from grpo_trainer.learn import place

    placed = place(run, packed)
    micro, live = packed.micro, int(packed.count)
    counted = np.asarray(micro.mask_RT) & (np.arange(len(micro.mask_RT)) < live)[:, None, None]
    logp, entropy = (np.asarray(part, np.float32) for part in run.plan.score(state.params, placed, *run.frozen))
    tokens = {"log-probability": logp, "entropy": entropy}
    with np.errstate(all="ignore"):
        if micro.old_logp_RT is not None:
            tokens["old log-probability"] = np.asarray(micro.old_logp_RT)
            tokens["ratio to the old policy"] = np.exp(logp - micro.old_logp_RT)
        if micro.reference_logp_RT is not None:
            tokens["reference's log-probability"] = np.asarray(micro.reference_logp_RT)
            tokens["KL to the reference"] = np.asarray(
                kl_estimate(jnp.asarray(logp), jnp.asarray(micro.reference_logp_RT))
            )
    for name, array in tokens.items():
        bad = counted & ~np.isfinite(array)
        if bad.any():
            m, r, t = (int(axis[0]) for axis in np.nonzero(bad))
            yield (
                f"{name}: {int(bad.sum())} of {int(counted.sum())} tokens, first {array[m, r, t]} at row "
                f"{int(micro.sequence_RT[m, r, t])} of the batch, token {int(micro.target_RT[m, r, t])} at position "
                f"{int(micro.positions_RT[m, r, t]) + 1}"
            )
    for m in range(live):
        one = PackedBatch(jax.tree.map(itemgetter(slice(m, m + 1)), packed.micro), np.asarray(1, np.int32))
        gradient, terms = run.plan.gradient(state.params, place(run, one), *run.frozen)
        if not np.isfinite(terms.numerator):
            yield f"loss of micro-batch {m + 1} of {live}: {float(terms.numerator)}"
        for finding in _leaves("gradient", gradient):
            yield f"micro-batch {m + 1} of {live}: {finding}"
    # Last, the update itself: sums and moments may overflow where every part is finite.
    _, metrics = run.plan.update(jax.tree.map(jnp.copy, state), placed, *run.frozen)
    for name in ("loss", "grad_norm", "finite"):
        if name != "finite" and not np.isfinite(metrics[name]):
            yield f"{name} of the whole batch: {float(metrics[name])}"
    if not metrics["finite"]:
        yield "the update is refused"


def _leaves(name: str, tree: Any) -> Iterator[str]:
    import jax

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values = np.asarray(leaf)
        bad = ~np.isfinite(values.astype(np.float32)) if values.dtype.kind not in "iub" else np.zeros(1, bool)
        if bad.any():
            where = tuple(int(axis[0]) for axis in np.nonzero(bad))
            yield (
                f"{name} {jax.tree_util.keystr(path, simple=True, separator='/')}: {int(bad.sum())} of {values.size}, "
                f"first {values[where]} at {where}"
            )


def _rows(name: str, array: np.ndarray) -> Iterator[str]:
    bad = ~np.isfinite(array)
    if bad.any():
        where = [int(axis[0]) for axis in np.nonzero(bad)]
        at = f", position {where[1]}" if len(where) > 1 else ""
        yield f"{name} {where[0]}{at}: {array[tuple(where)]}, and {int(bad.sum()) - 1} more"
