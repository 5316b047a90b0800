"""Advantages from the rewards of a group of samples of one prompt."""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from grpo_loss._errors import (
    LossError,
    as_array,
    check_boolean,
    check_choice,
    check_integers,
    check_number,
    check_shape,
    known,
)
from grpo_loss._whiten import Moments, check_moments, divide_by_deviation, moments, whiten

Scale = Literal["sample", "population", "batch", "none"]
SCALES = ("sample", "population", "batch", "none")


def group_advantage(
    reward_B: Float[ArrayLike, "B"],
    *,
    scored_B: Bool[ArrayLike, "B"] | None = None,
    group_B: Int[ArrayLike, "B"] | None = None,
    group_size: int | None = None,
    scale: Scale = "sample",
    epsilon: float = 1e-6,
    batch_moments: Moments | None = None,
) -> Float[Array, "B"]:
    """Reward minus the mean of its group, divided by a standard deviation.

    Unscored members are left out of every mean and deviation and get 0; take them out of the loss mask as well, or
    their tokens count in the denominator (`pack` does so). A group whose scored rewards are all equal, or that has
    only one, gets exactly 0.

    Args:
        reward_B: one reward per sequence, finite where scored.
        scored_B: False where the reward could not be computed; None: all are scored.
        group_B: which group each sequence belongs to, any integers. Groups may have any size and order.
        group_size: in place of `group_B`, for adjacent groups of this size.
        scale: what to divide by. "sample", "population": the group's standard deviation (n - 1, n). "batch": the
            population standard deviation of all scored rewards. "none": nothing (Dr.GRPO).
        epsilon: added to the standard deviation.
        batch_moments: for scale="batch" over several processes: `moments(reward_B, scored_B)` added over them.

    Returns:
        Advantages.

    Raises:
        LossError: an unknown scale, shapes that differ, neither or both of group_B and group_size, or (outside `jit`)
            a scored reward that is not finite.

    Source: GRPO arXiv:2402.03300 sec. 4.1.2; Dr.GRPO arXiv:2503.20783 ("none"); arXiv:2508.08221 ("batch").
    """
    check_choice("scale", scale, SCALES, {"std": "Say which: scale='sample' (n - 1) or scale='population' (n)."})
    if batch_moments is not None and scale != "batch":
        raise LossError(f"batch_moments has no effect with scale={scale!r}. Leave it out, or use scale='batch'.")
    check_number("epsilon", epsilon, 0.0)
    check_moments(batch_moments)
    return _group_advantage(*_prepare(reward_B, scored_B, group_B, group_size), epsilon, batch_moments, scale=scale)


def rloo_advantage(
    reward_B: Float[ArrayLike, "B"],
    *,
    scored_B: Bool[ArrayLike, "B"] | None = None,
    group_B: Int[ArrayLike, "B"] | None = None,
    group_size: int | None = None,
) -> Float[Array, "B"]:
    """Reward minus the mean reward of the *other* scored members of its group (0 for a group of one).

    Args:
        reward_B, scored_B, group_B, group_size: as for `group_advantage`.

    Returns:
        Advantages; n / (n - 1) times those of `group_advantage(scale="none")`.

    Raises:
        LossError: as `group_advantage`.

    Source: arXiv:2402.14740.
    """
    return _rloo_advantage(*_prepare(reward_B, scored_B, group_B, group_size))


def gdpo_advantage(
    reward_BN: Float[ArrayLike, "B N"],
    weight_N: Float[ArrayLike, "N"],
    *,
    scored_BN: Bool[ArrayLike, "B N"] | None = None,
    group_B: Int[ArrayLike, "B"] | None = None,
    group_size: int | None = None,
    scale: Literal["sample", "population"] = "sample",
    epsilon: float = 1e-6,
    whitened: bool = True,
    batch_moments: Moments | None = None,
) -> Float[Array, "B"]:
    """Several rewards, each normalised by itself within its group, then weighted, added and whitened over the batch.

    Rewards added first and normalised together collapse different outcomes to one advantage; this does not.

    Args:
        reward_BN: one column per reward function.
        weight_N: weight of each normalised reward.
        scored_BN: False where a reward could not be computed; it then adds 0. None: all are scored.
        group_B, group_size, scale, epsilon: as for `group_advantage`.
        whitened: subtract the mean and divide by the standard deviation over the sequences that have a score.
        batch_moments: for several processes: `moments` of this function's result with whitened=False, added over them.

    Returns:
        Advantages; 0 where no reward was scored.

    Raises:
        LossError: as `group_advantage`.

    Source: GDPO arXiv:2601.05242.
    """
    array = jnp.asarray(as_array("reward_BN", reward_BN))
    reward_BN = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    check_choice("scale", scale, ("sample", "population"))
    if reward_BN.ndim != 2:
        raise LossError(f"reward_BN must have two axes (sequences, reward functions): got shape {reward_BN.shape}.")
    scored_BN = jnp.ones(reward_BN.shape, bool) if scored_BN is None else jnp.asarray(scored_BN)
    check_shape("scored_BN", scored_BN.shape, reward_BN.shape)
    check_boolean("scored_BN", scored_BN)
    weight_N = as_array("weight_N", weight_N)
    check_shape("weight_N", weight_N.shape, reward_BN.shape[1:])
    if (weights := known(weight_N)) is not None and not np.isfinite(weights.astype(np.float64)).all():
        raise LossError(f"weight_N must be finite: got {weights.tolist()}.")
    columns = [
        group_advantage(
            reward_BN[:, column],
            scored_B=scored_BN[:, column],
            group_B=group_B,
            group_size=group_size,
            scale=scale,
            epsilon=epsilon,
        )
        for column in range(reward_BN.shape[1])
    ]
    total_B = jnp.stack(columns, axis=1) @ jnp.asarray(weight_N, reward_BN.dtype)
    if not whitened:
        if batch_moments is not None:
            raise LossError("batch_moments has no effect with whitened=False. Leave it out.")
        return total_B
    return whiten(total_B, scored_BN.any(axis=1), batch_moments=batch_moments, epsilon=epsilon)


def groups_with_signal(
    reward_B: Float[ArrayLike, "B"],
    *,
    scored_B: Bool[ArrayLike, "B"] | None = None,
    group_B: Int[ArrayLike, "B"] | None = None,
    group_size: int | None = None,
) -> Bool[Array, "B"]:
    """DAPO's filter: which sequences belong to a group whose scored rewards are not all equal.

    Args:
        reward_B, scored_B, group_B, group_size: as for `group_advantage`.

    Returns:
        True for the scored members of groups with a gradient; the rest can leave the loss mask, or be sampled anew.

    Raises:
        LossError: as `group_advantage`.

    Source: DAPO arXiv:2503.14476 sec. 3.2 (dynamic sampling).
    """
    return _groups_with_signal(*_prepare(reward_B, scored_B, group_B, group_size))


def overlong_penalty(length_B: Int[ArrayLike, "B"], *, max_tokens: int, buffer_tokens: int) -> Float[Array, "B"]:
    """DAPO's soft penalty, to be added to the reward: 0, then a line down to -1 over the last `buffer_tokens`.

    Args:
        length_B: completion lengths, tokens.
        max_tokens: where -1 is reached.
        buffer_tokens: length of the slope, tokens.

    Returns:
        0 up to max_tokens - buffer_tokens, -1 from max_tokens on.

    Raises:
        LossError: unless 0 < buffer_tokens <= max_tokens.

    Source: DAPO arXiv:2503.14476 eq. 13.
    """
    check_number("max_tokens", max_tokens, 1)
    check_number("buffer_tokens", buffer_tokens, -math.inf)
    if not 0 < buffer_tokens <= max_tokens:
        raise LossError(f"overlong_penalty needs 0 < buffer_tokens <= max_tokens: got {buffer_tokens}, {max_tokens}.")
    check_integers("length_B", length_B)
    room_B = max_tokens - buffer_tokens - jnp.asarray(length_B)
    return jnp.clip(room_B / buffer_tokens, -1.0, 0.0)


# The arithmetic is compiled as a whole: called op by op from a host loop, it would compile dozens of tiny programs.


@functools.partial(jax.jit, static_argnames="scale")
def _group_advantage(
    reward_B: Array, scored_B: Array, group_B: Array, epsilon: ArrayLike, batch_moments: Moments | None, *, scale: Scale
) -> Array:
    groups = _Groups.of(group_B, scored_B, reward_B.dtype)
    centred_B = groups.centred(reward_B)
    if scale == "none":
        return centred_B
    if scale == "batch":
        batch = moments(reward_B, scored_B) if batch_moments is None else batch_moments
        return divide_by_deviation(centred_B, batch.variance(), epsilon)
    square_B = groups.total(jnp.square(centred_B))
    count_B = groups.count_B - (scale == "sample")
    return divide_by_deviation(centred_B, square_B / jnp.maximum(count_B, 1), epsilon)


@jax.jit
def _rloo_advantage(reward_B: Array, scored_B: Array, group_B: Array) -> Array:
    groups = _Groups.of(group_B, scored_B, reward_B.dtype)
    return groups.centred(reward_B) * groups.count_B / jnp.maximum(groups.count_B - 1, 1)


@jax.jit
def _groups_with_signal(reward_B: Array, scored_B: Array, group_B: Array) -> Array:
    return _Groups.of(group_B, scored_B, reward_B.dtype).varied(reward_B) & scored_B


class _Groups(NamedTuple):
    """Sums over the scored members of each group, given back to every member."""

    label_B: Int[Array, "B"]
    scored_B: Bool[Array, "B"]
    count_B: Float[Array, "B"]

    @classmethod
    def of(cls, group_B: Array, scored_B: Array, dtype: jnp.dtype) -> "_Groups":
        # Any integers become 0..B-1: B is the static bound on the number of groups.
        label_B = jnp.unique(group_B, size=group_B.shape[0], return_inverse=True)[1].reshape(group_B.shape)
        groups = cls(label_B, scored_B, scored_B.astype(dtype))
        return groups._replace(count_B=groups.total(groups.count_B))

    def total(self, value_B: Array) -> Array:
        empty = jnp.zeros(self.label_B.shape, value_B.dtype)
        return empty.at[self.label_B].add(jnp.where(self.scored_B, value_B, 0))[self.label_B]

    def varied(self, reward_B: Array) -> Array:
        """Whether the group's scored rewards differ at all."""
        lowest_B = jnp.full(reward_B.shape, jnp.inf, reward_B.dtype)
        lowest_B = lowest_B.at[self.label_B].min(jnp.where(self.scored_B, reward_B, jnp.inf))
        highest_B = jnp.full(reward_B.shape, -jnp.inf, reward_B.dtype)
        highest_B = highest_B.at[self.label_B].max(jnp.where(self.scored_B, reward_B, -jnp.inf))
        return (highest_B > lowest_B)[self.label_B]

    def centred(self, reward_B: Array) -> Array:
        """Reward minus group mean; exactly 0 for equal rewards, whose rounded mean may differ from them."""
        mean_B = self.total(reward_B) / jnp.maximum(self.count_B, 1)
        return jnp.where(self.varied(reward_B) & self.scored_B, reward_B - mean_B, 0)


def _prepare(
    reward_B: ArrayLike, scored_B: ArrayLike | None, group_B: ArrayLike | None, group_size: int | None
) -> tuple[Array, Array, Array]:
    """Check the arguments of every group function, and fill in what was left out: rewards, scored, group ids."""
    array = jnp.asarray(as_array("reward_B", reward_B))
    reward_B = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    if reward_B.ndim != 1:
        raise LossError(
            f"reward_B must have one axis (sequences): got shape {reward_B.shape}. "
            "Flatten groups first (`reward_PG.reshape(-1)`)."
        )
    size = reward_B.shape[0]
    if (group_B is None) == (group_size is None):
        raise LossError(f"Give one of group_B and group_size: got group_B={group_B}, group_size={group_size}.")
    if group_B is None:
        if (
            isinstance(group_size, bool)
            or not isinstance(group_size, int | np.integer)
            or group_size < 1
            or size % group_size
        ):
            raise LossError(f"group_size must divide the number of sequences, {size}: got {group_size}. Use group_B.")
        group_B = np.arange(size) // group_size
    scored_B = np.ones(size, bool) if scored_B is None else scored_B
    check_integers("group_B", group_B)
    check_boolean("scored_B", scored_B)
    check_shape("group_B", np.shape(group_B), (size,))
    check_shape("scored_B", np.shape(scored_B), (size,))
    rewards, scored = known(reward_B), known(scored_B)
    if rewards is not None and scored is not None and (bad := scored & ~np.isfinite(rewards)).any():
        b = int(bad.argmax())
        raise LossError(
            f"reward_B must be finite where it is scored: got {rewards[b]} at [{b}]. Set scored_B to False where a "
            "reward could not be computed."
        )
    return reward_B, jnp.asarray(scored_B), jnp.asarray(group_B)
