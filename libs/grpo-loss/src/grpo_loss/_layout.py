"""What the update consumes: micro-batches of rows, each row one or several completions of one or several prompts.

A completion of n tokens is a *segment* of n inputs, the last prompt token and its own first n - 1 tokens, that
predict the n completion tokens. What comes before, ``prompt[:-1]``, is computed once for all the rows that use it.

A row is cut in C equal blocks; all tokens of a block continue one prompt, and a row's next prompt starts at a block.

Rows and prompt slots are cut in ``shards`` equal parts, and a row only uses prompts of its own part. With rows and
prompts sharded over the data axes of a mesh, the prompt's keys and values that a row attends to are therefore on the
row's own device: gather them as ``[shards, ...]`` parts with ``prompt_RC - part * prompts_per_part``, and the
partitioner needs no communication.
"""

from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Int

Array: TypeAlias = jax.Array | np.ndarray
AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the network together, and the prompts they share.

    Args:
        prompt_tokens_PT: Shared prompts without their last token, right-padded.
        prompt_length_P: Tokens in each shared prompt; 0 for an empty slot.
        tokens_RT: Inputs of the rows.
        target_RT: Token that each input predicts.
        positions_RT: Position of each input in its unpacked sequence.
        segment_RT: 0 at pads, 1, 2, ... for the completions of a row. A token attends within its own segment.
        prompt_RC: Prompt slot of each of a row's C equal blocks.
        source_RT: Index of the target in the flattened ``[B, T]`` arrays of the rollout, -1 at pads.
        sequence_RT: Sequence b of the rollout, -1 at pads.
        mask_RT: Targets that count in the loss.
        data: Further arrays, by name: per-token ``[R, T]`` such as advantages and old log-probabilities.
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
    data: dict[str, Array] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBatch:
    """A batch as a fixed number of micro-batches, of which the first ``count`` are live.

    Args:
        micro: All micro-batches: every array has a leading axis M.
        count: Live micro-batches, a scalar; the others are padding and are never computed.
    """

    micro: MicroBatch
    count: Int[Array, ""]

    def with_tokens(self, **array_BT: Array) -> "PackedBatch":
        """Adds per-token arrays of the rollout to ``micro.data``, packed.

        Args:
            **array_BT: ``[B, T]`` arrays by name, aligned with the tokens they speak about.

        Returns:
            The batch with these entries added.
        """
        packed = {name: pack_tokens(array, self.micro.source_RT) for name, array in array_BT.items()}
        return self.with_data(**packed)

    def with_sequences(self, **array_B: Array) -> "PackedBatch":
        """Adds per-sequence arrays of the rollout to ``micro.data``, repeated at every token of the sequence.

        Args:
            **array_B: ``[B]`` arrays by name.

        Returns:
            The batch with these entries added.
        """
        return self.with_data(**{name: pack_tokens(array, self.micro.sequence_RT) for name, array in array_B.items()})

    def with_data(self, **array_MRT: Array) -> "PackedBatch":
        """Adds arrays that are packed already, for instance scored old log-probabilities, to ``micro.data``.

        Args:
            **array_MRT: Arrays with a leading axis M, by name.

        Returns:
            The batch with these entries added.
        """
        return replace(self, micro=replace(self.micro, data={**self.micro.data, **array_MRT}))

    @property
    def fill(self) -> float:
        """Share of the live micro-batches' row positions that hold a token."""
        live = np.asarray(self.micro.segment_RT)[: int(self.count)]
        return float((live > 0).mean()) if live.size else 0.0


def pack_tokens(array_BT: Array, source_RT: Array) -> Array:
    """Gathers a per-token array of the rollout into packed rows; 0 at pads.

    Args:
        array_BT: Any array; it is read flattened.
        source_RT: Flat indices, -1 at pads, of any shape: ``source_RT``, or ``sequence_RT`` for a
            per-sequence array.

    Returns:
        Array of the shape of ``source_RT``; numpy if both arguments are numpy.
    """
    numpy_only = isinstance(array_BT, np.ndarray) and isinstance(source_RT, np.ndarray)
    xp = np if numpy_only else jax.numpy
    gathered = xp.take(xp.reshape(xp.asarray(array_BT), -1), xp.maximum(source_RT, 0))
    return xp.where(source_RT >= 0, gathered, xp.zeros((), gathered.dtype))


def unpack_tokens(array_RT: Array, source_RT: Array, shape: tuple[int, int]) -> np.ndarray:
    """Puts packed per-token values back at their place in the rollout, on the host; 0 elsewhere.

    Args:
        array_RT: Packed values, of the shape of ``source_RT``.
        source_RT: Flat indices, -1 at pads.
        shape: ``(B, T)`` of the rollout.

    Returns:
        Array ``[B, T]``.
    """
    values, source = np.asarray(array_RT), np.asarray(source_RT)
    out_BT = np.zeros(shape, values.dtype)
    live = source >= 0
    out_BT.reshape(-1)[source[live]] = values[live]
    return out_BT
