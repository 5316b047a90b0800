"""One optimizer step: what it applies, what it refuses, and what it reports."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grpo_loss_ragged import ragged, toy_forward, toy_loss, toy_params, tree_difference

from grpo_loss import (
    KL,
    LossError,
    PackShape,
    cispo,
    fixed,
    gspo,
    gspo_token,
    init_state,
    make_loss,
    make_score,
    make_update,
    ppo,
    reinforce,
    sapo,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
    truncate,
    unpack_tokens,
)


@pytest.fixture(scope="module")
def data():
    return ragged(seed=5, groups=5, group_size=4, longest_prompt=6, longest=12)


@pytest.fixture(scope="module")
def batch(data):
    shape = PackShape.for_rollout(sequences=20, groups=5, max_prompt_length=6, max_new_tokens=12, rows=4)
    return data.pack(shape)


OPTIMIZER = optax.adamw(0.01)
UPDATE = make_update(toy_forward, toy_loss, OPTIMIZER, max_grad_norm=0.05)


def fresh(dtype=jnp.float32, optimizer=OPTIMIZER, **arguments):
    return init_state(toy_params(dtype), optimizer, **arguments)


def copied(tree):
    return jax.tree.map(np.asarray, jax.tree.map(jnp.copy, tree))


def test_one_step_is_that_of_the_whole_batch_at_once(data, batch):
    whole = data.pad(20)
    micro = jax.tree.map(lambda x: jnp.asarray(x[0]), whole.micro)

    def mean_loss(params):
        terms = toy_loss(*toy_forward(params, micro), micro)
        return terms.numerator / terms.denominator, terms.means()

    params = toy_params(jnp.float32)
    (loss, means), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
    optimizer = optax.chain(optax.clip_by_global_norm(0.05), OPTIMIZER)
    change, _ = optimizer.update(gradient, optimizer.init(params), params)
    expected = optax.apply_updates(params, change)
    state, metrics = UPDATE(fresh(), batch)
    assert tree_difference(state.params, expected) < 1e-5
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(change), rtol=1e-4)
    for name, value in means.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    assert (int(state.step), int(state.skipped), float(metrics["finite"])) == (1, 0, 1.0)


def test_without_jit_an_update_names_a_target_outside_the_vocabulary(batch):
    micro = batch.micro
    first = tuple(np.argwhere(micro.mask_RT)[0])
    target_RT = np.array(micro.target_RT)
    target_RT[first] = 99
    damaged = replace(batch, micro=replace(micro, target_RT=target_RT))
    UPDATE(fresh(), damaged)  # only the device knows
    where = rf"target_RT must be in \[0, 24\), the vocabulary: got 99 at \[{first[1]}, {first[2]}\]"
    with jax.disable_jit(), pytest.raises(LossError, match=where):
        UPDATE(fresh(), damaged)


@pytest.mark.parametrize(
    ("objective", "aggregation", "per_token"),
    [
        (ppo(dual_clip=3.0), token_mean, False),
        (ppo(), fixed(12), True),
        (gspo(), sequence_mean_token_mean, False),
        (gspo_token(), sequence_mean_token_mean, True),
        (cispo(), token_mean, True),
        (sapo(), sequence_mean_token_sum, False),
        (reinforce(), sequence_mean_token_sum, True),
    ],
)
def test_sequences_without_an_advantage_are_not_computed_but_counted(data, objective, aggregation, per_token):
    idle_B = (data.group_B < 2) | (np.arange(20) % 7 == 0)
    advantage = np.where(idle_B, 0, data.advantage)
    if per_token:
        # The prompt's values count for nothing.
        in_prompt_BT = np.arange(data.tokens_BT.shape[1]) < data.prompt_length_B[:, None]
        advantage = np.where(in_prompt_BT, 1, advantage[:, None]).astype(np.float32)
    some = replace(data, advantage=advantage)
    shape = PackShape.for_rollout(sequences=20, groups=5, max_prompt_length=6, max_new_tokens=12, rows=4)
    loss = make_loss(objective=objective, aggregation=aggregation, correction=truncate(2.0))
    update = make_update(toy_forward, loss, OPTIMIZER)
    everything, less = some.pack(shape), some.pack(shape, idle=aggregation)
    assert not np.isin(less.micro.sequence_RT, np.flatnonzero(idle_B)).any()
    assert less.count < everything.count
    (expected, known), (state, metrics) = (update(fresh(), packed) for packed in (everything, less))
    assert tree_difference(state.params, expected.params) < 1e-6
    moments: list[Any] = [state.opt_state, expected.opt_state]
    assert tree_difference(moments[0][0].mu, moments[1][0].mu) < 1e-5
    for name in ("loss", "policy_loss", "grad_norm", "denominator"):
        np.testing.assert_allclose(metrics[name], known[name], rtol=1e-5, err_msg=name)


def test_what_is_frozen_reaches_the_network_and_stays_as_it_is(data, batch):
    """Half of the parameters given as frozen: the other half moves as it does when all are trained."""
    params = toy_params(jnp.float32)

    def forward(trained, micro, frozen):
        return toy_forward({**trained, **frozen}, micro)

    def parts():
        return {"mix": jnp.copy(params["mix"])}, {name: params[name] for name in ("embed", "unembed")}

    trained, frozen = parts()
    optimizer = optax.sgd(0.1)
    update = make_update(forward, toy_loss, optimizer, max_grad_norm=None)
    state, metrics = update(init_state(trained, optimizer), batch, frozen)
    whole, known = make_update(toy_forward, toy_loss, optimizer, max_grad_norm=None)(fresh(optimizer=optimizer), batch)
    np.testing.assert_allclose(state.params["mix"], whole.params["mix"], rtol=1e-6)
    assert float(metrics["loss"]) == float(known["loss"])
    np.testing.assert_array_equal(
        make_score(forward)(parts()[0], batch, frozen)[0], make_score(toy_forward)(params, batch)[0]
    )


def test_an_update_without_any_advantage_costs_nothing_and_counts_as_a_step(data):
    shape = PackShape.for_rollout(sequences=20, groups=5, max_prompt_length=6, max_new_tokens=12, rows=4)
    silent = replace(data, advantage=np.zeros_like(data.advantage))
    update = make_update(toy_forward, make_loss(), OPTIMIZER)
    everything, nothing = silent.pack(shape), silent.pack(shape, idle=token_mean)
    assert (int(nothing.count), nothing.fill, nothing.positions) == (0, 0.0, (0, 0))
    (expected, _), (state, metrics) = (update(fresh(), packed) for packed in (everything, nothing))
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert (int(state.step), float(metrics["loss"]), float(metrics["denominator"])) == (1, 0, data.loss_mask_BT.sum())


@pytest.mark.parametrize("poison", ["advantage", "parameter", "moment", "nothing counts"])
def test_an_update_that_cannot_be_trusted_changes_nothing(batch, poison):
    state, _ = UPDATE(fresh(), batch)
    if poison == "parameter":
        state.params["mix"] = state.params["mix"].at[0, 0].set(jnp.nan)
    if poison == "moment":
        adam: Any = state.opt_state
        adam[0].nu["mix"] = -jnp.ones_like(adam[0].nu["mix"])
    before = copied((state.params, state.opt_state))
    broken = batch
    if poison == "advantage":
        infinite_RT = np.where(batch.micro.sequence_RT == 3, np.inf, 1).astype(np.float32)
        broken = replace(batch, micro=replace(batch.micro, advantage_RT=infinite_RT))
    if poison == "nothing counts":
        broken = jax.tree.map(lambda x: np.zeros_like(x) if x.dtype == bool else x, batch)
    state, metrics = UPDATE(state, broken)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    assert (int(state.step), int(state.skipped)) == (1, 1)
    assert float(metrics["finite"]) == (poison == "nothing counts")
    assert float(metrics["update_norm"]) == 0


def test_the_donated_state_is_replaced_in_place_without_a_copy(batch):
    program = UPDATE.lower(fresh(), batch).compile().as_text() or ""
    assert "%state_opt_state_0__mu" in program
    assert " copy(%state" not in program


def test_one_program_serves_every_fill_and_donates_its_state(data):
    shape = PackShape.for_rollout(sequences=20, groups=5, max_prompt_length=6, max_new_tokens=12, rows=4)
    traced = []

    def forward(params, micro):
        traced.append(micro)
        return toy_forward(params, micro)

    update = make_update(forward, toy_loss, OPTIMIZER)
    state, counts, traces = fresh(), [], []
    for groups in (5, 2, 0):
        part = data.pack(shape, keep_B=data.group_B < groups)
        counts.append(int(part.count))
        previous = state
        state, _ = update(state, part)
        traces.append(len(traced))
        assert previous.params["embed"].is_deleted()
    assert counts[0] > counts[1] > counts[2] == 0
    assert traces[0] == traces[2]


def test_low_precision_parameters_move_by_less_than_their_own_rounding(batch):
    optimizer = optax.adamw(1e-4, weight_decay=0.0)
    update = make_update(toy_forward, toy_loss, optimizer)
    state = fresh(jnp.bfloat16, optimizer)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype(jnp.float32)}
    before = copied(state.master)
    for _ in range(3):
        state, _ = update(state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    moved = jax.tree.map(lambda new, old: np.abs(np.asarray(new) - old).max(), state.master, before)
    assert all(2e-4 < value < 4e-4 for value in jax.tree.leaves(moved))
    jax.tree.map(
        lambda low, wide: np.testing.assert_array_equal(low, wide.astype(jnp.bfloat16)), state.params, state.master
    )


def test_scores_are_those_of_the_forward_and_find_their_way_back(data, batch):
    params = toy_params(jnp.float32)
    logp_MRT, entropy_MRT = make_score(toy_forward)(params, batch)
    shape = data.tokens_BT.shape
    plain = data.pad(20)
    expected = toy_forward(params, jax.tree.map(lambda x: jnp.asarray(x[0]), plain.micro))
    for values, wanted in zip((logp_MRT, entropy_MRT), expected, strict=True):
        np.testing.assert_allclose(
            unpack_tokens(values, batch.micro.source_RT, shape),
            unpack_tokens(wanted, plain.micro.source_RT[0], shape),
            atol=1e-5,
        )


def test_a_limit_that_stops_everything_is_refused():
    with pytest.raises(LossError, match="Use None for no limit"):
        make_update(toy_forward, toy_loss, OPTIMIZER, max_grad_norm=0.0)


def test_the_loss_of_a_packed_batch_reads_its_fields(data, batch):
    """Packed or padded, the same terms; a field that a term needs and the batch lacks is named."""
    loss = make_loss(correction=truncate(1.05), kl=KL("k3", 0.1))
    params = toy_params(jnp.float32)

    def terms(packed):
        micro = jax.tree.map(lambda x: jnp.asarray(x[0]), packed.micro)
        micro = replace(micro, reference_logp_RT=micro.sampler_logp_RT)
        return loss(*toy_forward(params, micro), micro)

    wide = data.pack(PackShape(row_length=60, rows=20, prompts=20, prompt_length=5, micro_batches=1))
    packed, padded = terms(wide).means(), terms(data.pad(20)).means()
    for name, value in padded.items():
        np.testing.assert_allclose(packed[name], value, rtol=1e-4, err_msg=name)
    assert float(padded["sampling_logp_difference/mean"]) > 0
    for name, missing in (("sampler_logp_RT", make_loss(correction=truncate())), ("reference_logp_RT", loss)):
        without = replace(batch, micro=replace(batch.micro, **{name: None}))
        with pytest.raises(LossError, match=f"needs {name}: got None"):
            make_update(toy_forward, missing, OPTIMIZER).lower(fresh(), without)


PARAMS: Any = toy_params(jnp.float32)
NUMBER: Any = lambda logp_RT, entropy_RT, micro: 1.0  # noqa: E731
LOGP_ONLY: Any = lambda params, micro: toy_forward(params, micro)[0]  # noqa: E731


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda batch: UPDATE(PARAMS, batch), "state must be a TrainState: got a dict"),
        (lambda batch: make_update(toy_forward, NUMBER, OPTIMIZER)(fresh(), batch), "loss must return LossTerms"),
        (lambda batch: make_update(LOGP_ONLY, toy_loss, OPTIMIZER)(fresh(), batch), "forward must return"),
        (lambda batch: make_score(LOGP_ONLY)(fresh().params, batch), r"\(logp_RT, entropy_RT\)"),
        (lambda batch: init_state(OPTIMIZER, PARAMS), r"Call init_state\(params, optimizer\)"),
        (lambda batch: init_state({"a": jnp.ones(2), "n": jnp.ones(2, int)}, OPTIMIZER), r"got int32 at \['n'\]"),
        (lambda batch: init_state({}, OPTIMIZER), "empty tree"),
    ],
)
def test_what_is_passed_by_mistake_is_named(batch, call, message):
    with pytest.raises(LossError, match=message):
        call(batch)
