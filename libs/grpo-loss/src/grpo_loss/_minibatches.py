"""One rollout as several optimizer steps: which sequences each step sees, and the log-probabilities it needs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Int

from grpo_contracts import TrainBatch
from grpo_loss._aggregate import Aggregation
from grpo_loss._errors import LossError, check_integers, check_shape
from grpo_loss._layout import PackedBatch, unpack_tokens
from grpo_loss._pack import pack
from grpo_loss._shape import PackShape


def iterate_minibatches(
    batch: TrainBatch,
    *,
    shape: PackShape | Sequence[PackShape],
    epochs: int = 1,
    minibatches: int = 1,
    seed: int,
    step: int,
    old: Callable[[PackedBatch], Any] | None = None,
    reference: Callable[[PackedBatch], Any] | None = None,
    idle: Aggregation | None = None,
) -> Iterator[PackedBatch]:
    """What each optimizer step on one rollout consumes, packed on the host.

    Old log-probabilities belong to the parameters before the first step. They are scored when the first batch is
    asked for, and only if there are several steps: with one, the log-probabilities of the step itself are the old ones.

    Args:
        batch: a scored rollout with advantages. Log-probabilities it already carries are used as they are.
        shape: sizes of a packed batch, see `pack`.
        epochs: passes over the rollout.
        minibatches: steps per pass; whole groups are dealt out anew in every pass.
        seed: of the run.
        step: rollouts so far; with the seed and the pass it decides how groups are dealt out.
        old: `packed -> logp_MRT` (nats) at the parameters before the first step, called once if they are needed. It
            places the batch on its devices, scores it (`make_score`) and returns an array that numpy can read.
        reference: the same under the reference policy, called once unless the batch carries its log-probabilities.
        idle: leave out sequences without an advantage, as in `pack`.

    Yields:
        One packed batch per step, epochs × minibatches in all.

    Raises:
        LossError: several steps without old log-probabilities, fewer groups than minibatches, or as `pack`.
    """
    for name, value in {"epochs": epochs, "minibatches": minibatches}.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise LossError(f"{name} must be an integer of at least 1: got {value!r}.")
    if not isinstance(batch, TrainBatch):
        raise LossError(f"batch must be a grpo_contracts.TrainBatch: got a {type(batch).__name__}.")
    unscored = replace(batch, old_logp_BT=None, reference_logp_BT=None)
    needs_old = epochs * minibatches > 1 and batch.old_logp_BT is None
    if needs_old and old is None:
        raise LossError(
            f"{epochs} epochs of {minibatches} minibatches need log-probabilities at the parameters before the first "
            "step: got neither old nor old_logp_BT. Pass a function that scores a packed batch."
        )
    if needs_old or (reference is not None and batch.reference_logp_BT is None):
        whole = pack(unscored, shape=shape, idle=idle)
        if needs_old and old is not None:
            batch = replace(batch, old_logp_BT=_scored(batch, "old", old, whole))
        if reference is not None and batch.reference_logp_BT is None:
            batch = replace(batch, reference_logp_BT=_scored(batch, "reference", reference, whole))
    for epoch in range(epochs):
        group_B = np.asarray(batch.scored.rollout.group_B)
        for keep_B in split_minibatches(group_B, minibatches, seed=seed, step=step, epoch=epoch):
            yield pack(batch, shape=shape, keep_B=keep_B, idle=idle)


def split_minibatches(
    group_B: Int[ArrayLike, "B"], count: int, *, seed: int, step: int, epoch: int, whole_groups: bool = True
) -> list[Bool[np.ndarray, "B"]]:
    """Parts of a rollout for several optimizer steps, drawn anew in every epoch: `keep_B` masks for `pack`.

    Args:
        group_B: group of each sequence.
        count: minibatches, whose sizes differ by at most one group (or sequence).
        seed: of the run.
        step: rollouts so far.
        epoch: passes over this rollout so far.
        whole_groups: keep groups together, so that prompts are shared; otherwise deal out single sequences.

    Returns:
        One mask per minibatch. They are disjoint, cover all sequences, and depend on the arguments alone.

    Raises:
        LossError: fewer groups (or sequences) than minibatches.
    """
    check_integers("group_B", group_B)
    check_shape("group_B", np.shape(group_B), (np.size(group_B),))
    for name, value in {"count": count, "seed": seed, "step": step, "epoch": epoch}.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise LossError(f"{name} must be an integer of at least 0: got {value!r}.")
    _, unit_B = np.unique(np.asarray(group_B), return_inverse=True)
    if not whole_groups:
        unit_B = np.arange(len(unit_B))
    units = int(unit_B.max(initial=-1)) + 1
    if not 1 <= count <= units:
        what = "groups" if whole_groups else "sequences"
        raise LossError(f"count must be between 1 and the {units} {what} of the rollout: got {count}.")
    order = np.random.default_rng([seed, step, epoch]).permutation(units)
    return [np.isin(unit_B, part) for part in np.array_split(order, count)]


def _scored(batch: TrainBatch, name: str, score: Callable[[PackedBatch], Any], packed: PackedBatch) -> np.ndarray:
    """Log-probabilities of the rollout's tokens, [B, T]."""
    logp_MRT, source_MRT = np.asarray(score(packed)), packed.micro.source_RT
    check_shape(
        f"What {name} returns",
        logp_MRT.shape,
        source_MRT.shape,
        "Return the first of what a `make_score` pass returns.",
    )
    return unpack_tokens(logp_MRT, source_MRT, np.shape(batch.scored.rollout.tokens_BT))
