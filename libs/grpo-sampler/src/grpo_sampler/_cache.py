"""The cache of decoding, and attention over it.

The keys and values of a prompt are stored in one *unit*, which the rows of its group share. Those of a row's completion
are stored in a ring of columns: in each step all rows write the same column, whenever they started, so a step is one
slice update instead of a scatter. A row that has emitted n tokens sees the last n + 1 columns. Until the ring wraps,
its live columns are a prefix, and attention reads the shortest of a few prefixes that contains them.

Additional suffixes: U units, g rows per unit, C columns of the ring, M query heads per key/value head.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from grpo_sampler._config import ModelConfig
from grpo_sampler._table import Rows

_MASKED = -1e30
PREFIX = "ring_prefix"  # the scope in which a program chooses one of `windows`
# Rings of at most so many columns are always read whole: a shorter prefix saves less than its copy costs.
_WHOLE = 256
_LANES = 128  # of a TPU's vector registers


class Cache(NamedTuple):
    """Keys and values. Each field is a tuple of L arrays (unrolled) or one array with a leading L axis."""

    shared_keys: Any  # [U, K, E, Tp]
    shared_values: Any  # [U, K, Tp, E]
    own_keys: Any  # [S, K, E, C]
    own_values: Any  # [S, K, C, E]


class Seen(NamedTuple):
    """What the rows see of the cache in one step; the same in every layer."""

    shared_UT: Array
    own_SC: Array
    window: Array  # index into `windows`


def empty_cache(
    config: ModelConfig, dtype: jnp.dtype, unroll: bool, *, units: int, prompt: int, rows: int, columns: int
) -> Cache:
    """A cache of zeros: masked entries must be finite."""
    K, E = config.kv_heads, config.head_size
    shapes = Cache((units, K, E, prompt), (units, K, prompt, E), (rows, K, E, columns), (rows, K, columns, E))
    if unroll:
        return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for shape in shapes))
    return Cache(*(jnp.zeros((config.layers, *shape), dtype) for shape in shapes))


def windows(columns: int, *, fine: bool) -> tuple[int, ...]:
    """Lengths of the prefixes of a ring that attention may read, shortest first; the last one is the whole ring.

    Args:
        columns: of the ring.
        fine: also those in the middle between two; for layers that share one program, where another prefix is cheap.
    """
    lengths = [columns]
    while lengths[0] > _WHOLE:
        lengths.insert(0, -(-lengths[0] // 16) * 8)
    between = [-(-(a + b) // 16) * 8 for a, b in itertools.pairwise(lengths)] if fine else []
    return tuple(sorted(lengths + between))


def prefix_shares(columns: int, *, fine: bool) -> tuple[float, ...]:
    """Fractions of the steps that read each of `windows`, while rows that start together fill the ring."""
    lengths = windows(columns, fine=fine)
    return tuple((b - a) / columns for a, b in itertools.pairwise((0, *lengths)))


def seen(rows: Rows, column: Array, columns: int, prompt: int, *, fine: bool) -> Seen:
    """What each row sees in the step that writes `column`.

    Args:
        rows: before the step.
        column: column of the ring.
        columns: columns of the whole ring.
        prompt: padded prompt length.
        fine: as of `windows`.
    Returns:
        Masks, and the prefix of the ring that contains every live column.
    """
    age_C = (column - jnp.arange(columns)) % columns
    # A row that started before the ring wrapped has keys at its end.
    used = jnp.where(jnp.where(rows.live_S, rows.emitted_S, 0).max() <= column, column + 1, columns)
    return Seen(
        jnp.arange(prompt) < rows.shared_length_U[:, None],
        age_C <= rows.emitted_S[:, None],
        jnp.searchsorted(jnp.asarray(windows(columns, fine=fine)), used),
    )


def write(own: tuple[Array, Array], k_SKE: Array, v_SKE: Array, column: Array, at: tuple) -> tuple[Array, Array]:
    """Writes one column of every row. `at` is () for the arrays of one layer, (layer index,) for stacked arrays."""
    lead, zero = (None,) * len(at), jnp.int32(0)
    keys = lax.dynamic_update_slice(own[0], k_SKE[(*lead, ..., None)], (*at, zero, zero, zero, column))
    values = lax.dynamic_update_slice(own[1], v_SKE[(*lead, ..., None, slice(None))], (*at, zero, zero, column, zero))
    return lax.platform_dependent(keys, values, tpu=_pinned, default=lambda *own: own) if at else (keys, values)


def _pinned(keys: Array, values: Array) -> tuple[Array, Array]:
    """Gives all layers' rings the layout that attention reads on TPUs.

    Left to itself, XLA gives them another one here than where it chooses a prefix, and copies them for every layer.
    Lanes hold 128 numbers: the columns of the ring fill them where an entry of 64 would not.
    """
    last = values.shape[-1] % _LANES == 0
    return (
        with_layout_constraint(keys, Layout((0, 1, 2, 3, 4))),
        with_layout_constraint(values, Layout((0, 1, 2, 3, 4) if last else (0, 1, 2, 4, 3))),
    )


def attend_cached(
    q_SHE: Array, rows: Rows, seen: Seen, shared: tuple[Array, Array], own: tuple[Array, Array], at: tuple
) -> Array:
    """One softmax over a row's shared prompt and its own ring, without copying either or repeating key/value heads.

    Args:
        q_SHE: queries, unscaled.
        rows: which row belongs to which unit.
        seen: from `seen`.
        shared: keys and values of the units.
        own: keys and values of the rows, including this step's; of all layers where `at` says which one.
        at: as of `write`.
    Returns:
        Mixed values, in q's type.
    """
    S, H, E = q_SHE.shape
    K = shared[0].shape[1]
    U, g = rows.row_Ug.shape
    M = H // K
    scale = 1 / math.sqrt(E)
    q_SKME = q_SHE.reshape(S, K, M, E)

    # Prompt: the queries of a unit's g rows are multiplied with one set of keys.
    q_UgKME = (q_SKME if U * g == S else jnp.take(q_SKME, rows.row_Ug.reshape(-1), 0, mode="clip")).reshape(
        U, g, K, M, E
    )
    q_UKNE = jnp.swapaxes(q_UgKME, 1, 2).reshape(U, K, g * M, E)
    from_prompt = _part("UKNE,UKET->UKNT", "UKNT,UKTE->UKNE", q_UKNE, *shared, seen.shared_UT, scale)

    def to_rows(x_UKN: Array) -> Array:
        x_PKM = jnp.swapaxes(x_UKN.reshape(U, K, g, M, -1), 1, 2).reshape(U * g, K, M, -1)
        return x_PKM if U * g == S else jnp.take(x_PKM, rows.place_S, 0, mode="clip")

    def from_ring(length: int) -> tuple[Array, Array, Array]:
        # The layer is taken here: taken outside, its whole ring would be read before XLA chooses a prefix.
        S, K, E, _ = own[0].shape[len(at) :]
        keys, values = _prefix(own[0], (S, K, E, length), at), _prefix(own[1], (S, K, length, E), at)
        return _part("SKME,SKEC->SKMC", "SKMC,SKCE->SKME", q_SKME, keys, values, seen.own_SC[:, :length], scale)

    prefixes = [lambda length=length: from_ring(length) for length in windows(own[0].shape[-1], fine=bool(at))]
    top_s, sum_s, mixed_s = (to_rows(x) for x in from_prompt)
    with jax.named_scope(PREFIX):
        top_o, sum_o, mixed_o = prefixes[0]() if len(prefixes) == 1 else lax.switch(seen.window, prefixes)
    top_o, sum_o = top_o[..., None], sum_o[..., None]
    top = jnp.maximum(top_s, top_o)
    share_s, share_o = jnp.exp(top_s - top), jnp.exp(top_o - top)
    mixed = (mixed_s * share_s + mixed_o * share_o) / (sum_s * share_s + sum_o * share_o)
    return mixed.reshape(S, H, E).astype(q_SHE.dtype)


def _prefix(leaf: Array, shape: tuple[int, ...], at: tuple) -> Array:
    """The first elements of a layer's array along every axis, by one slice: of two, the first would copy all layers."""
    if not at:
        return lax.slice(leaf, [0] * len(shape), shape)
    return lax.dynamic_slice(leaf, (at[0], *[0] * len(shape)), (1, *shape))[0]


def _part(
    scores: str, mixes: str, q: Array, keys: Array, values: Array, mask: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Maximum, sum of exponentials and mixed values of one part of a softmax; the sum is 0 if nothing is seen."""
    mask = mask[:, None, None]
    logits = jnp.where(mask, jnp.einsum(scores, q, keys, preferred_element_type=jnp.float32) * scale, _MASKED)
    top = logits.max(-1)
    weight = jnp.where(mask, jnp.exp(logits - top[..., None]), 0)
    mixed = jnp.einsum(mixes, weight.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return top, weight.sum(-1), mixed
