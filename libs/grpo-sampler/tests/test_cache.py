"""Attention over the cache: what it reads, against a softmax written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_sampler._cache import attend_cached, prefix_shares, seen, windows, write
from grpo_sampler._table import Rows

COLUMNS, PROMPT, K, M, E, U, G = 600, 8, 2, 2, 4, 2, 2
S = U * G


def rows_at(emitted: list[int], column: int) -> Rows:
    order = np.arange(S, dtype=np.int32)
    zero = np.zeros(S, np.int32)
    lengths = np.array([3, 8], np.int32)
    return Rows(zero, zero, jnp.array(emitted), zero + COLUMNS, jnp.ones(S, bool), zero, zero, order,
                jnp.asarray(order.reshape(U, G)), jnp.asarray(lengths), column)  # fmt: skip


def exact(q, rows, shared, own, column) -> np.ndarray:
    out = np.zeros((S, K * M, E))
    for s in range(S):
        live = [(column - age) % COLUMNS for age in range(int(rows.emitted_S[s]) + 1)]
        length = int(rows.shared_length_U[s // G])
        for h in range(K * M):
            k = h // M
            keys = np.concatenate([shared[0][s // G, k, :, :length].T, own[0][s, k][:, live].T]).astype(np.float64)
            values = np.concatenate([shared[1][s // G, k, :length], own[1][s, k][live]]).astype(np.float64)
            weight = np.exp(keys @ q[s, h] / np.sqrt(E))
            out[s, h] = weight @ values / weight.sum()
    return out


@pytest.mark.parametrize(
    ("emitted", "column", "reads", "fine"),
    [
        pytest.param([0, 0, 0, 0], 0, 152, 152, id="first step"),
        pytest.param([151, 3, 0, 20], 151, 152, 152, id="shortest prefix full"),
        pytest.param([152, 3, 0, 20], 152, 304, 232, id="one more"),
        pytest.param([299, 299, 1, 5], 299, 304, 304, id="second prefix"),
        pytest.param([400, 0, 0, 0], 420, 600, 456, id="less than whole"),
        pytest.param([500, 0, 0, 0], 520, 600, 600, id="whole"),
        pytest.param([30, 2, 0, 7], 10, 600, 600, id="gone round"),
    ],
)
@pytest.mark.parametrize("at", [(), (1,)])
def test_attention_reads_the_live_prefix_and_no_more(emitted, column, reads, fine, at):
    """Columns past the prefix hold NaN: one that was read, even under a mask, would show."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(S, K * M, E)).astype(np.float32)
    shared = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((U, K, E, PROMPT), (U, K, PROMPT, E)))
    own = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((S, K, E, COLUMNS), (S, K, COLUMNS, E)))
    rows = rows_at(emitted, column)
    want = exact(q, rows, shared, own, column)
    reads = fine if at else reads
    own[0][..., reads:], own[1][:, :, reads:] = np.nan, np.nan
    if at:  # a layer among others
        own = tuple(np.stack([np.full_like(side, np.nan), side]) for side in own)
    visible = seen(rows, jnp.int32(column), COLUMNS, PROMPT, fine=bool(at))
    assert windows(COLUMNS, fine=bool(at))[int(visible.window)] == reads
    got = attend_cached(
        jnp.asarray(q),
        rows,
        visible,
        (jnp.asarray(shared[0]), jnp.asarray(shared[1])),
        (jnp.asarray(own[0]), jnp.asarray(own[1])),
        at,
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_short_ring_is_one_prefix():
    assert windows(256, fine=False) == windows(256, fine=True) == (256,)
    assert windows(1024, fine=False) == (256, 512, 1024)
    assert windows(1024, fine=True) == (256, 384, 512, 768, 1024)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("columns", [8, 256, 600, 1024])
def test_prefixes_are_read_as_often_as_their_shares_say(columns, fine):
    rows = rows_at([0] * S, 0)

    def chosen(step):
        return seen(rows._replace(emitted_S=jnp.full(S, step)), step, columns, PROMPT, fine=fine).window

    counts = np.bincount(jax.vmap(chosen)(jnp.arange(columns)), minlength=len(windows(columns, fine=fine)))
    np.testing.assert_allclose(counts / columns, prefix_shares(columns, fine=fine))


@pytest.mark.parametrize("at", [(), (1,)])
def test_a_step_writes_one_column_of_one_layer(at):
    lead = (2,) if at else ()
    own = jnp.zeros((*lead, S, K, E, 16)), jnp.zeros((*lead, S, K, 16, E))
    k, v = jnp.ones((S, K, E)), jnp.full((S, K, E), 2.0)
    keys, values = write(own, k, v, jnp.int32(5), tuple(jnp.int32(i) for i in at))
    want_keys, want_values = np.zeros(own[0].shape), np.zeros(own[1].shape)
    want_keys[at][..., 5], want_values[at][..., 5, :] = 1, 2
    np.testing.assert_array_equal(keys, want_keys)
    np.testing.assert_array_equal(values, want_values)
