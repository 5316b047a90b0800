"""What the update consumes: micro-batches of rows; a row holds completions of one prompt or of several.

A completion of n tokens is a *segment* of n inputs, the last prompt token and its own first n - 1 tokens, which
predict the n completion tokens. What comes before, `prompt[:-1]`, is computed once for all the rows that use it.

A row is cut into C equal blocks. All tokens of a block continue one prompt, and a row's next prompt starts at a block.

Rows and prompt slots are cut into `shards` equal parts, and a row uses only prompts of its own part. With rows and
prompts sharded over the data axes of a mesh, the prompt keys and values that a row attends to are therefore on the
row's own device: gather them as `[shards, ...]` parts with `prompt_RC - part * prompts_per_part`, and the partitioner
needs no communication.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_loss._errors import LossError, as_array, check_integers, check_shape, known

# numpy.ndarray on the host, jax.Array in a compiled function. No common base lets arithmetic type-check.
Array: TypeAlias = Any


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
    """

    micro: MicroBatch
    count: Int[Array, ""]
    idle: Float[Array, ""] = _NOTHING

    @property
    def fill(self) -> float:
        """Share of the live micro-batches' row positions that hold a token."""
        live = np.asarray(self.micro.segment_RT)[: int(self.count)]
        return float((live > 0).mean()) if live.size else 0.0

    @property
    def positions(self) -> tuple[int, int]:
        """Token positions computed, in rows and prompt slots, and how many of them hold a token."""
        count = int(self.count)
        rows, prompts = self.micro.segment_RT[:count], self.micro.prompt_tokens_PT[:count]
        tokens = int((np.asarray(rows) > 0).sum()) + int(np.asarray(self.micro.prompt_length_P[:count]).sum())
        return rows.size + prompts.size, tokens


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
