"""What the update consumes: micro-batches of rows; a row holds completions of one prompt or of several.

A completion of n tokens is a *segment* of n inputs, the last prompt token and its own first n - 1 tokens, which
predict the n completion tokens. What comes before, `prompt[:-1]`, is computed once for all the rows that use it.

A row is cut into C equal blocks. All tokens of a block continue one prompt, and a row's next prompt starts at a block.

Rows and prompt slots are cut into `shards` equal parts, and a row uses only prompts of its own part. With rows and
prompts sharded over the data axes of a mesh, the prompt keys and values that a row attends to are therefore on the
row's own device: gather them as `[shards, ...]` parts with `prompt_RC - part * prompts_per_part`, and the partitioner
needs no communication.

Micro-batches may have several sizes. All are stored in arrays of the largest one; `apply_to_micro` cuts each to its own
size before it is computed, in a branch of the program for each size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_loss._errors import LossError, as_array, check_integers, check_shape, known

# numpy.ndarray on the host, jax.Array in a compiled function. No common base lets arithmetic type-check.
Array: TypeAlias = Any
Result = TypeVar("Result")


class MicroSize(NamedTuple):
    """Sizes of a micro-batch, over all shards: rows and their tokens, prompt slots and their tokens."""

    rows: int
    row_length: int
    prompts: int
    prompt_length: int

    @property
    def positions(self) -> int:
        """Token positions computed."""
        return self.rows * self.row_length + self.prompts * self.prompt_length


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the network together, and the prompts they share.

    Args:
        prompt_tokens_PT: shared prompts without their last token, right-padded.
        prompt_length_P: tokens in each shared prompt; 0 for an empty slot.
        tokens_RT: inputs of the rows.
        target_RT: the token each input predicts.
        positions_RT: position of each input in its unpacked sequence.
        segment_RT: 0 at pads, 1, 2, ... for the completions of a row. A token attends within its own segment.
        prompt_RC: prompt slot of each of a row's C equal blocks.
        source_RT: index of the target in the flattened `[B, T]` arrays of the rollout, -1 at pads.
        sequence_RT: sequence b of the rollout, -1 at pads.
        mask_RT: targets that count in the loss.
        advantage_RT: advantage of each target, 0 at pads.
        sampler_logp_RT: log-probability of each target as the sampler reported it, nats; None if unknown.
        old_logp_RT: at the parameters the rollout's updates started from, nats; None for the only update of a rollout.
        reference_logp_RT: under the reference policy, nats; None without one.
    """

    prompt_tokens_PT: Int[Array, "*M P Tp"]
    prompt_length_P: Int[Array, "*M P"]
    tokens_RT: Int[Array, "*M R T"]
    target_RT: Int[Array, "*M R T"]
    positions_RT: Int[Array, "*M R T"]
    segment_RT: Int[Array, "*M R T"]
    prompt_RC: Int[Array, "*M R C"]
    source_RT: Int[Array, "*M R T"]
    sequence_RT: Int[Array, "*M R T"]
    mask_RT: Bool[Array, "*M R T"]
    advantage_RT: Float[Array, "*M R T"]
    sampler_logp_RT: Float[Array, "*M R T"] | None
    old_logp_RT: Float[Array, "*M R T"] | None = None
    reference_logp_RT: Float[Array, "*M R T"] | None = None


Params: TypeAlias = Any
_NOTHING = np.float32(0)


@runtime_checkable
class Forward(Protocol):
    """Your network on one micro-batch; see the README for one."""

    def __call__(self, params: Params, micro: MicroBatch, /) -> tuple[jax.Array, jax.Array]:
        """Log-probability of each target and entropy of its distribution, `(logp_RT, entropy_RT)`, in nats."""
        ...


# A network of which a part is trained: `(params, micro, *frozen)`, the rest being what updates are given as frozen.
FrozenForward: TypeAlias = Callable[..., tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBatch:
    """A batch as a fixed number of micro-batches, of which the first `count` are live.

    Args:
        micro: all micro-batches: every array has a leading axis M.
        count: live micro-batches, a scalar; the others are padding and are never computed.
        idle: what sequences that `pack` left out, because all their advantages are 0, add to the loss's denominator.
        size_M: of each micro-batch, which of `sizes` it has; None where all have the arrays' own.
        sizes: that a micro-batch may have; empty without `size_M`. The compiler sees them.
        shards: equal blocks that rows and prompts are cut into, each of which has its part of a size.
    """

    micro: MicroBatch
    count: Int[Array, ""]
    idle: Float[Array, ""] = _NOTHING
    size_M: Int[Array, "M"] | None = None
    sizes: tuple[MicroSize, ...] = field(default=(), metadata={"static": True})
    shards: int = field(default=1, metadata={"static": True})

    @property
    def live_sizes(self) -> list[MicroSize]:
        """The size of each live micro-batch; on the host."""
        count = int(self.count)
        if self.size_M is None:
            return [MicroSize(*self.micro.tokens_RT.shape[1:], *self.micro.prompt_tokens_PT.shape[1:])] * count
        return [self.sizes[index] for index in np.asarray(self.size_M)[:count]]

    @property
    def fill(self) -> float:
        """Share of the live micro-batches' row positions that hold a token."""
        cells = sum(size.rows * size.row_length for size in self.live_sizes)
        return float(np.count_nonzero(np.asarray(self.micro.segment_RT)[: int(self.count)])) / cells if cells else 0.0

    @property
    def positions(self) -> tuple[int, int]:
        """Token positions computed, in rows and prompt slots, and how many of them hold a token."""
        count = int(self.count)
        rows = np.count_nonzero(np.asarray(self.micro.segment_RT)[:count])
        tokens = int(rows) + int(np.asarray(self.micro.prompt_length_P)[:count].sum())
        return sum(size.positions for size in self.live_sizes), tokens


def apply_to_micro(function: Callable[[MicroBatch], Result], batch: PackedBatch, i: Array) -> Result:
    """`function` of micro-batch i, cut to its own size.

    Args:
        function: its result has the same shapes for every size of a micro-batch.
        batch: the batch.
        i: which micro-batch; may be traced.

    Returns:
        What `function` returns.
    """
    micro = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch.micro)
    if batch.size_M is None:
        return function(micro)
    branches = [partial(_of_size, function, size=size, shards=batch.shards) for size in batch.sizes]
    return jax.lax.switch(batch.size_M[i], branches, micro)


def _of_size(function: Callable[[MicroBatch], Result], micro: MicroBatch, *, size: MicroSize, shards: int) -> Result:
    return function(_cut(micro, size, shards))


def _cut(micro: MicroBatch, size: MicroSize, shards: int) -> MicroBatch:
    """The first rows and prompts of every shard, and the first tokens of each."""

    def cut(x: Array, count: int, length: int) -> Array:
        blocks = x.reshape(shards, -1, *x.shape[1:])[:, : count // shards]
        return blocks.reshape(count, *x.shape[1:])[:, :length]

    prompts = micro.prompt_tokens_PT.shape[0]
    rows = {
        name: cut(value, size.rows, size.row_length)
        for name, value in vars(micro).items()
        if name.endswith("_RT") and value is not None
    }
    # One slot a shard is every block's: the row is then one block, which needs one copy of the prompt.
    slot_RC = cut(micro.prompt_RC, size.rows, 1 if size.prompts == shards else micro.prompt_RC.shape[1])
    shard_R1 = jax.numpy.arange(size.rows, dtype=slot_RC.dtype)[:, None] // (size.rows // shards)
    return replace(
        micro,
        prompt_tokens_PT=cut(micro.prompt_tokens_PT, size.prompts, size.prompt_length),
        prompt_length_P=cut(micro.prompt_length_P[:, None], size.prompts, 1)[:, 0],
        prompt_RC=slot_RC - shard_R1 * ((prompts - size.prompts) // shards),
        **rows,
    )


def in_rows(x_RT: Array, shape: tuple[int, int], shards: int) -> Array:
    """Values of a micro-batch of any size at their place in the arrays of the largest one; 0 elsewhere.

    Args:
        x_RT: one value for each position of the micro-batch.
        shape: rows and row length of the arrays.
        shards: equal blocks of rows.

    Returns:
        Array of that shape.
    """
    if x_RT.shape == shape:
        return x_RT
    blocks = x_RT.reshape(shards, -1, x_RT.shape[1])
    missing = shape[0] // shards - blocks.shape[1]
    return jax.numpy.pad(blocks, [(0, 0), (0, missing), (0, shape[1] - x_RT.shape[1])]).reshape(shape)


def pack_tokens(array_BT: Array, source_RT: Array) -> Array:
    """Gather an array of the rollout into packed rows; 0 at pads.

    Args:
        array_BT: any array; it is read flattened.
        source_RT: flat indices, -1 at pads, of any shape: `source_RT` of a micro-batch, or `sequence_RT` for an array
            with one value per sequence.

    Returns:
        Array of the shape of `source_RT`; numpy if both arguments are numpy.

    Raises:
        LossError: indices that are no integers, or (outside `jit`) that `array_BT` does not have.
    """
    array_BT, source_RT = as_array("array_BT", array_BT), as_array("source_RT", source_RT)
    check_integers("source_RT", source_RT)
    if (source := known(source_RT)) is not None and source.size and source.max() >= array_BT.size:
        raise LossError(
            f"source_RT must index the {array_BT.size} values of array_BT: got {source.max()}. Take source_RT for an "
            "array of one value per token, sequence_RT for one value per sequence."
        )
    numpy_only = isinstance(array_BT, np.ndarray) and isinstance(source_RT, np.ndarray)
    xp = np if numpy_only else jax.numpy
    gathered = xp.take(xp.reshape(xp.asarray(array_BT), -1), xp.maximum(source_RT, 0))
    return xp.where(source_RT >= 0, gathered, xp.zeros((), gathered.dtype))


def unpack_tokens(array_RT: Array, source_RT: Array, shape: tuple[int, int]) -> np.ndarray:
    """Put packed token values back at their place in the rollout, on the host; 0 elsewhere.

    Args:
        array_RT: packed values, of the shape of `source_RT`.
        source_RT: flat indices, -1 at pads.
        shape: `(B, T)` of the rollout.

    Returns:
        Array `[B, T]`.

    Raises:
        LossError: shapes that differ, or indices outside the rollout.
    """
    values, source = np.asarray(as_array("array_RT", array_RT)), np.asarray(as_array("source_RT", source_RT))
    check_integers("source_RT", source)
    check_shape("array_RT", values.shape, source.shape)
    if source.size and source.max() >= math.prod(shape):
        raise LossError(f"source_RT must index an array of shape {shape}: got {source.max()}.")
    out_BT = np.zeros(shape, values.dtype)
    live = source >= 0
    out_BT.reshape(-1)[source[live]] = values[live]
    return out_BT
