"""What is sent to the device besides weights, as one array of integers each, because every transfer has a fixed cost.

The table is the state of the rows. It stays on the device between chunks; the host keeps a copy and sends it again when
rows have been added or moved. The call holds the sampling parameters and what determines the random numbers.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from grpo_contracts import SamplingParams
from grpo_sampler._sampling import STOP_CAPACITY, SamplingArrays, sampling_arrays


class Rows(NamedTuple):
    """The state of the rows between steps: int32, and bool for `live_S` inside a program."""

    token_S: Any  # the row's next input
    start_S: Any  # absolute position of its first input, the prompt's last token
    emitted_S: Any  # tokens of the completion so far
    limit_S: Any  # maximum tokens of the completion
    live_S: Any  # in the table 0, or 1 + the state of the stop strings' automaton
    prompt_id_S: Any
    sample_S: Any
    place_S: Any  # unit * g + seat
    row_Ug: Any  # the row in each seat
    shared_length_U: Any  # prompt tokens in each unit
    column: Any  # next column of the ring
    match_S: Any = None  # that state, inside a program with stop strings


class Call(NamedTuple):
    """What the draws of one batch depend on."""

    sampling: SamplingArrays
    seed_N: Any  # uint32, two words
    step: Any  # uint32
    min_new: Any  # int32


def table_size(rows: int, units: int, share: int) -> int:
    """Integers in a shard's table."""
    return 8 * rows + units * share + units + 1


def write_table(rows: Rows) -> np.ndarray:
    """A table for each shard, [N, n]; every field but `match_S` has a leading axis N."""
    return np.concatenate([np.asarray(field, np.int32).reshape(len(field), -1) for field in rows[:-1]], axis=1)


def read_table(table_n: Int[Array, "n"], rows: int, units: int, share: int, *, matching: bool = False) -> Rows:
    """One shard's table, inside a program."""
    ends = np.cumsum([rows] * 8 + [units * share, units])
    fields = jnp.split(table_n, ends)
    match_S = jnp.maximum(fields[4] - 1, 0) if matching else None
    fields[4] = fields[4].astype(bool)
    return Rows._make([*fields[:8], fields[8].reshape(units, share), fields[9], fields[10][0], match_S])


def renew_table(table_n: Int[Array, "n"], rows: Rows) -> Int[Array, "n"]:
    """The table after some steps, inside a program; only the fields that decoding changes are written."""
    count = rows.token_S.shape[0]
    table_n = table_n.at[:count].set(rows.token_S)
    table_n = table_n.at[2 * count : 3 * count].set(rows.emitted_S)
    live_S = rows.live_S.astype(jnp.int32)
    live_S = live_S if rows.match_S is None else live_S * (1 + rows.match_S)
    table_n = table_n.at[4 * count : 5 * count].set(live_S)
    return table_n.at[-1].set(rows.column)


CALL_SIZE = 8 + STOP_CAPACITY


def write_call(sampling: SamplingParams, vocab_size: int, *, seed: int, step: int, min_new: int) -> np.ndarray:
    """The call as int32 [CALL_SIZE]: floats and unsigned words by their bits."""
    arrays = sampling_arrays(sampling, vocab_size, min_new)
    floats = np.array([arrays.temperature, arrays.top_p, arrays.min_p], np.float32).view(np.int32)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF, step], np.uint32).view(np.int32)
    return np.concatenate([floats, words, np.array([arrays.top_k, min_new], np.int32), arrays.stop_ids])


def read_call(call_n: Int[Array, "n"]) -> Call:
    """The inverse of `write_call`, inside a program."""
    temperature, top_p, min_p = lax.bitcast_convert_type(call_n[:3], jnp.float32)
    words = lax.bitcast_convert_type(call_n[3:6], jnp.uint32)
    sampling = SamplingArrays(temperature, call_n[6], top_p, min_p, call_n[8:])
    return Call(sampling, words[:2], words[2], call_n[7])
