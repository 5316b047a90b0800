"""jax: batches as pytrees, and a new policy version recompiles nothing. Needs the `jax` extra."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from grpo_contracts import ContractError, PolicyVersion, TrainBatch, load_batch, save_batch, validate

jax = pytest.importorskip("jax")
import grpo_contracts.jax  # noqa: E402


def with_policy(batch: TrainBatch, policy: PolicyVersion) -> TrainBatch:
    rollout = dataclasses.replace(batch.scored.rollout, policy=policy)
    return dataclasses.replace(batch, scored=dataclasses.replace(batch.scored, rollout=rollout))


def test_a_new_policy_does_not_recompile_and_is_not_mixed_up(batch: TrainBatch) -> None:
    traces = []

    @jax.jit
    def double(b: TrainBatch) -> TrainBatch:
        traces.append(b)
        validate(b)  # shapes are known to tracers
        assert b.scored.rollout.sampling.stop_ids == (19,)
        assert b.scored.rollout.group_size == 2
        return dataclasses.replace(b, advantage=2 * b.advantage)

    for step, digest in [(7, "0a1b2c3d"), (8, "ffffffff"), (2**31 - 1, "00000000")]:
        out = double(with_policy(batch, PolicyVersion(step, digest)))
        validate(out, "values")
        assert out.scored.rollout.policy.concrete() == PolicyVersion(step, digest)
        assert jax.device_get(out).scored.rollout.policy == PolicyVersion(step, digest)
        np.testing.assert_array_equal(out.advantage, 2 * batch.advantage)
        double(out)  # what a jitted function returns can be passed to it again
    assert len(traces) == 1
    rollout = batch.scored.rollout
    sampling = dataclasses.replace(rollout.sampling, top_k=19)
    double(
        dataclasses.replace(
            batch, scored=dataclasses.replace(batch.scored, rollout=dataclasses.replace(rollout, sampling=sampling))
        )
    )
    assert len(traces) == 2


def test_an_unrecorded_digest_passes_through_jit(batch: TrainBatch) -> None:
    out = jax.jit(lambda b: b)(with_policy(batch, PolicyVersion(3, "")))
    assert out.scored.rollout.policy.concrete() == PolicyVersion(3, "")
    validate(out, "values")


def test_leaves_are_named_and_come_back(batch: TrainBatch) -> None:
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(batch)}
    assert {".scored.rollout.tokens_BT", ".scored.rollout.policy.digest", ".advantage", ".old_logp_BT"} <= paths
    leaves, tree = jax.tree.flatten(batch)
    back = jax.tree.unflatten(tree, leaves)
    assert back.scored.rollout.policy == batch.scored.rollout.policy
    placeholders = jax.tree.unflatten(tree, [object()] * len(leaves))  # jax does this itself
    assert jax.tree.structure(placeholders) == tree
    bare = dataclasses.replace(batch, old_logp_BT=None)
    assert len(jax.tree.leaves(bare)) == len(leaves) - 1


def test_jax_arrays_validate_and_save(batch: TrainBatch, tmp_path: Any) -> None:
    on_device = jax.device_put(batch)
    validate(on_device, "values")
    save_batch(on_device, tmp_path / "b.npz")
    save_batch(batch, tmp_path / "c.npz")
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()
    assert isinstance(load_batch(tmp_path / "b.npz").advantage, np.ndarray)
    wrong = dataclasses.replace(on_device, advantage=on_device.advantage + 1)
    with pytest.raises(ContractError, match=r"advantage\[3\] must be 0 on unscored rows"):
        validate(wrong, "values")


def test_values_cannot_be_checked_while_tracing(batch: TrainBatch) -> None:
    @jax.jit
    def look(b: TrainBatch) -> Any:
        with pytest.raises(ContractError) as caught:
            validate(b, "values")
        assert caught.value.rule == "readable"
        with pytest.raises(ContractError):
            b.scored.rollout.policy.concrete()
        return b.advantage

    look(batch)


def test_deleted_arrays_and_keys_are_contract_errors(batch: TrainBatch) -> None:
    gone = jax.numpy.array(batch.advantage)
    gone.delete()
    for advantage in (gone, jax.random.split(jax.random.key(0), 4)):
        with pytest.raises(ContractError):
            validate(dataclasses.replace(batch, advantage=advantage), "values")


def test_batches_pickle_between_processes(batch: TrainBatch) -> None:
    copy = pickle.loads(pickle.dumps(batch))  # noqa: S301
    validate(copy, "values")
    assert grpo_contracts.jax.__all__ == []
