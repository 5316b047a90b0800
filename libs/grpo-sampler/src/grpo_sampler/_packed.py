"""Packed completions whose prompts are computed once: how rows find their prompts, and what each query sees.

On TPUs a kernel visits the tiles of keys that a tile of queries sees. Elsewhere the queries of a row attend in spans,
each of one block of the row. What a span sees ends where the span ends, so the later part of the row is not multiplied
in vain.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from grpo_sampler._attention import causal_mask
from grpo_sampler._config import ModelConfig
from grpo_sampler._errors import SamplerError
from grpo_sampler._kernels import Attention, masked_attention
from grpo_sampler._packed_attention import packed_attention, plan_packed
from grpo_sampler._rope import rope_constants

# The queries of a block attend in up to four spans of at least this length: in shorter matrix products the overhead
# outweighs the keys that are left out.
_SHORTEST_SPAN = 64

OfPrompt = Callable[[Array, int], Array]
"""Given an array by prompt and a block, the part that each row's block continues."""
PackedAttention = Callable[[tuple[Array, Array], tuple[Array, Array, Array]], Array]
"""Given keys and values of the prompts, and queries, keys and values of the rows: mixed values of the rows."""
Angles = tuple[Array, Array]
"""Cosines and sines."""


class Span(NamedTuple):
    """Queries that attend together."""

    block: int
    queries: slice


def check_packed(*, prompts: int, rows: int, length: int, blocks: int, shards: int) -> None:
    """Raises a SamplerError unless rows divide into blocks, and prompts and rows over the shards."""
    if length % blocks:
        raise SamplerError(f"the blocks of a row must divide its length {length}: got prompt_RC with {blocks}.")
    if prompts % shards or rows % shards:
        raise SamplerError(f"prompts and rows must divide by shards={shards}: got {prompts} prompts and {rows} rows.")


def prompt_gather(prompt_RC: Int[Array, "R C"], prompts: int, shards: int) -> OfPrompt:
    """How blocks get what belongs to their prompt.

    Args:
        prompt_RC: the prompt that each block continues.
        prompts: number of prompts.
        shards: equal parts of rows and prompts, where rows use only prompts of their own part.

    Returns:
        A function from an array with a leading prompt axis, and a block, to the same with a leading row axis.
    """
    share, blocks = prompts // shards, prompt_RC.shape[1]
    local_RC = prompt_RC.reshape(shards, -1, blocks) - share * jnp.arange(shards, dtype=jnp.int32)[:, None, None]

    def of_prompt(x_P: Array, block: int) -> Array:
        # A gather batched over the parts is one that the partitioner keeps on each device.
        parts = x_P.reshape(shards, share, *x_P.shape[1:])
        gathered = jax.vmap(lambda part, index: part[index])(parts, local_RC[..., block])
        return gathered.reshape(-1, *x_P.shape[1:])

    return of_prompt


def packed_angles(
    positions_RT: Int[Array, "R T"], segment_RT: Int[Array, "R T"], prompt_length: int, config: ModelConfig
) -> tuple[Angles, Angles]:
    """Rotary angles of the prompts and of the rows, looked up in one table.

    Args:
        positions_RT: absolute positions of the rows' tokens.
        segment_RT: 0 is padding.
        prompt_length: padded length of the prompts.
        config: the model.

    Returns:
        ((cos, sin) of the prompts, (cos, sin) of the rows).
    """
    cos, sin = map(jnp.asarray, rope_constants(prompt_length + positions_RT.shape[1], config))
    of_prompts = cos[None, :prompt_length], sin[None, :prompt_length]
    # A position beyond the table gives NaN. Padding may hold one, and NaN times 0 would spoil what attends around it.
    place_RT = jnp.where(segment_RT > 0, positions_RT, 0)
    return of_prompts, (cos[place_RT], sin[place_RT])


def plan_attention(
    attention: Attention,
    segment_RT: Int[Array, "R T"],
    prompt_RC: Int[Array, "R C"],
    prompt_length_P: Int[Array, "P"],
    *,
    prompt_length: int,
    group: int,
    shards: int,
    mesh: Mesh | None,
) -> PackedAttention:
    """Works out once what the attention of every layer needs.

    Args:
        attention: the kernel.
        segment_RT: segment of each of the rows' tokens; 0 is padding.
        prompt_RC: the prompt that each block continues.
        prompt_length_P: lengths of the prompts.
        prompt_length: padded length of the prompts.
        group: query heads that share a key/value head.
        shards: equal parts of rows and prompts, where rows use only prompts of their own part.
        mesh: the devices; None for one.

    Returns:
        Attention of packed rows to their prompts and to themselves.
    """
    if attention == "splash":
        plan = plan_packed(
            segment_RT, prompt_RC, prompt_length_P, prompt_length=prompt_length, group=group, shards=shards, mesh=mesh
        )
        return functools.partial(packed_attention, plan)
    of_prompt = prompt_gather(prompt_RC, len(prompt_length_P), shards)
    live_PT = jnp.arange(prompt_length, dtype=jnp.int32) < prompt_length_P[:, None]
    # cuDNN takes each block whole.
    spans = query_spans(segment_RT.shape[1], prompt_RC.shape[1], divide=attention == "xla")
    return functools.partial(
        attend_in_spans, attention, spans, span_masks(spans, of_prompt, live_PT, segment_RT), of_prompt
    )


def query_spans(length: int, blocks: int, *, divide: bool) -> list[Span]:
    """The spans that the queries of a row attend in.

    Args:
        length: tokens of a row.
        blocks: blocks of a row.
        divide: whether a long block is halved or quartered; otherwise each block is one span.

    Returns:
        Spans in order.
    """
    block_length = length // blocks
    halved = (block_length // n for n in (4, 2) if block_length % n == 0)
    shorter = next((size for size in halved if size >= _SHORTEST_SPAN), block_length)
    size = shorter if divide else block_length
    return [Span(start // block_length, slice(start, start + size)) for start in range(0, length, size)]


def span_masks(
    spans: list[Span], of_prompt: OfPrompt, live_PT: Bool[Array, "P Tp"], segment_RT: Int[Array, "R T"]
) -> list[Bool[Array, "R queries keys"]]:
    """For each span, which keys its queries see: first the prompt's, then the row's up to the span's end."""
    own_RTT = causal_mask(segment_RT)
    masks = []
    for block, queries in spans:
        shape = len(segment_RT), queries.stop - queries.start, live_PT.shape[1]
        prompt_mask = jnp.broadcast_to(of_prompt(live_PT, block)[:, None], shape)
        masks.append(jnp.concatenate([prompt_mask, own_RTT[:, queries, : queries.stop]], axis=2))
    return masks


def attend_in_spans(
    attention: Attention,
    spans: list[Span],
    masks: list[Array],
    of_prompt: OfPrompt,
    prompt_kv: tuple[Float[Array, "P Tp K E"], Float[Array, "P Tp K E"]],
    row_qkv: tuple[Float[Array, "R T H E"], Float[Array, "R T K E"], Float[Array, "R T K E"]],
) -> Float[Array, "R T H E"]:
    """Attention of packed rows to their prompts and to themselves.

    Args:
        attention: the kernel.
        spans: from `query_spans`.
        masks: from `span_masks`.
        of_prompt: from `prompt_gather`.
        prompt_kv: keys and values of the prompts.
        row_qkv: queries, keys and values of the rows.

    Returns:
        Mixed values, in the queries' type.
    """
    q, *row_kv = row_qkv
    parts = []
    for (block, queries), mask in zip(spans, masks):
        # One product over prompt and row takes less time than two, even with the copy that it needs.
        k, v = (
            jnp.concatenate([of_prompt(shared, block), own[:, : queries.stop]], axis=1)
            for shared, own in zip(prompt_kv, row_kv)
        )
        parts.append(masked_attention(attention, q[:, queries], k, v, mask))
    return jnp.concatenate(parts, axis=1)
