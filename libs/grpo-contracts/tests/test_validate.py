"""Every valid batch passes, every corruption is caught and named, and only ContractError is ever raised."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_contracts import (
    ContractError,
    GrpoError,
    PolicyVersion,
    Prompts,
    Rollout,
    SamplingParams,
    Scored,
    TrainBatch,
    validate,
)
from grpo_contracts._rules import RULES

SEEDS = st.integers(0, 2**32 - 1)


@given(seed=SEEDS)
@settings(max_examples=150, deadline=None)
def test_every_valid_batch_passes(make_batch: Any, make_prompts: Any, seed: int) -> None:
    batch = make_batch(seed)
    for stage in (make_prompts(seed), batch.scored.rollout, batch.scored, batch):
        validate(stage)
        validate(stage, level="values")


def put(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    changed = np.array(array)
    changed[index] = value
    return changed


def replace(stage: Any, path: str, change: Any) -> Any:
    """The stage with the field at `path` replaced by what `change` makes of it."""
    head, _, rest = path.partition(".")
    value = getattr(stage, head)
    return dataclasses.replace(stage, **{head: replace(value, rest, change) if rest else change(value)})


ROLLOUT, SCORED = "scored.rollout.", "scored."
# What is broken, how, the field and rule that must be named, and the first bad index.
CORRUPTIONS: list[tuple[str, Any, str, str, tuple[int, ...] | None]] = [
    (ROLLOUT + "tokens_BT", lambda x: x.astype(np.int64), "tokens_BT", "dtype", None),
    (ROLLOUT + "tokens_BT", lambda x: x[None], "tokens_BT", "shape", None),
    (ROLLOUT + "tokens_BT", lambda x: x.tolist(), "tokens_BT", "type", None),
    (ROLLOUT + "tokens_BT", lambda x: put(x, (1, 3), 20), "tokens_BT", "vocabulary", (1, 3)),
    (ROLLOUT + "tokens_BT", lambda x: put(x, (2, 0), -1), "tokens_BT", "vocabulary", (2, 0)),
    (ROLLOUT + "tokens_BT", lambda x: put(x, (0, 5), 3), "tokens_BT", "padding", (0, 5)),
    (ROLLOUT + "tokens_BT", lambda x: put(x, (1, 3), 19), "tokens_BT", "ends_at_stop", (1, 3)),
    (ROLLOUT + "tokens_BT", lambda x: put(x, (3, 1), 4), "tokens_BT", "same_prompt", (3, 1)),
    (ROLLOUT + "tokens_BT", lambda x: np.roll(x, 1, 1), "tokens_BT", "padding", (0, 4)),  # not from the left
    (ROLLOUT + "tokens_BT", lambda x: put(x, (0, 3), 7), "finish_B", "last_token", (0,)),
    (ROLLOUT + "prompt_length_B", lambda x: x[:3], "prompt_length_B", "shape", None),
    (ROLLOUT + "prompt_length_B", lambda x: x.reshape(2, 2), "prompt_length_B", "shape", None),
    (ROLLOUT + "prompt_length_B", lambda x: put(x, 2, 0), "prompt_length_B", "range", (2,)),
    (ROLLOUT + "prompt_length_B", lambda x: put(x, 2, 6), "prompt_length_B", "range", (2,)),
    (ROLLOUT + "prompt_length_B", lambda x: put(x, 1, 3), "loss_mask_BT", "completion", (1, 2)),
    (ROLLOUT + "total_length_B", lambda x: put(x, 3, 7), "total_length_B", "range", (3,)),
    (ROLLOUT + "total_length_B", lambda x: put(x, 3, 2), "total_length_B", "range", (3,)),
    (ROLLOUT + "total_length_B", lambda x: put(x, 1, 4), "tokens_BT", "padding", (1, 4)),
    (ROLLOUT + "total_length_B", lambda x: put(x, 0, 5), "loss_mask_BT", "completion", (0, 4)),
    (ROLLOUT + "loss_mask_BT", lambda x: x.astype(np.float32), "loss_mask_BT", "dtype", None),
    (ROLLOUT + "loss_mask_BT", lambda x: put(x.view(np.uint8), (1, 2), 2).view(bool), "loss_mask_BT", "binary", (1, 2)),
    (ROLLOUT + "loss_mask_BT", lambda x: put(x, (1, 3), False), "loss_mask_BT", "completion", (1, 3)),  # a hole
    (ROLLOUT + "loss_mask_BT", lambda x: put(x, (0, 3), False), "loss_mask_BT", "completion", (0, 3)),  # no stop token
    (ROLLOUT + "loss_mask_BT", lambda x: np.roll(x, -1, 1), "loss_mask_BT", "completion", (0, 1)),  # shifted by one
    (ROLLOUT + "loss_mask_BT", lambda x: np.roll(x, 1, 1), "loss_mask_BT", "completion", (0, 2)),
    (ROLLOUT + "logp_BT", lambda x: put(x, (3, 3), np.nan), "logp_BT", "finite", (3, 3)),
    (ROLLOUT + "logp_BT", lambda x: put(x, (3, 3), -np.inf), "logp_BT", "finite", (3, 3)),
    (ROLLOUT + "logp_BT", lambda x: -x, "logp_BT", "nonpositive", (0, 2)),
    (ROLLOUT + "logp_BT", lambda x: np.roll(x, -1, 1), "logp_BT", "outside", (0, 1)),
    (ROLLOUT + "logp_BT", lambda x: x.astype(np.float64), "logp_BT", "dtype", None),
    (ROLLOUT + "logp_BT", lambda x: x[:, :-1], "logp_BT", "shape", None),
    (ROLLOUT + "policy_logp_BT", lambda x: put(x, (0, 2), np.inf), "policy_logp_BT", "finite", (0, 2)),
    (ROLLOUT + "policy_logp_BT", lambda x: x + 1.7, "policy_logp_BT", "nonpositive", (0, 0)),
    (ROLLOUT + "policy_logp_BT", lambda x: put(x, (2, 5), -1), "policy_logp_BT", "outside", (2, 5)),
    (ROLLOUT + "policy_logp_BT", lambda x: x * np.float32(0.7), "policy_logp_BT", "plain_sampling", (0, 2)),
    (ROLLOUT + "finish_B", lambda x: put(x, 2, 5), "finish_B", "known", (2,)),
    (ROLLOUT + "finish_B", lambda x: 1 - x, "finish_B", "last_token", (0,)),
    (ROLLOUT + "finish_B", lambda x: x + 2 * (1 - x), "finish_B", "last_token", (0,)),  # a stop id, said to be a string
    (ROLLOUT + "prompt_id_B", lambda x: put(x, 1, 41), "prompt_id_B", "same_prompt", (1,)),
    (ROLLOUT + "sample_B", lambda x: put(x, 1, 2), "sample_B", "range", (1,)),
    (ROLLOUT + "sample_B", lambda x: put(x, 3, 0), "sample_B", "unique", (2,)),
    (ROLLOUT + "group_B", lambda x: put(x, 3, 2), "group_B", "range", (3,)),
    (ROLLOUT + "group_B", lambda x: put(x, 1, 1), "group_B", "complete", (0,)),
    (ROLLOUT + "group_B", lambda x: x[::-1].copy(), "", "", None),  # a relabelling: still valid
    (ROLLOUT + "group_B", lambda x: np.array([0, 1, 0, 1], np.int32), "sample_B", "unique", (0,)),
    (ROLLOUT + "group_size", lambda x: 3, "group_size", "divides", None),
    (ROLLOUT + "group_size", lambda x: 4, "group_B", "range", (2,)),
    (ROLLOUT + "group_size", lambda x: 2.0, "group_size", "type", None),
    (ROLLOUT + "sampling", lambda x: None, "sampling", "type", None),
    (ROLLOUT + "sampling", lambda x: SamplingParams(stop_ids=(19, 20)), "sampling.stop_ids", "vocabulary", None),
    (ROLLOUT + "sampling", lambda x: SamplingParams(), "finish_B", "last_token", (0,)),
    (ROLLOUT + "policy", lambda x: "0a1b", "policy", "type", None),
    (ROLLOUT + "policy.step", lambda x: -1, "policy.step", "range", None),
    (ROLLOUT + "policy.step", lambda x: 1.5, "step", "type", None),
    (ROLLOUT + "policy.digest", lambda x: "xyz", "policy.digest", "hexadecimal", None),
    (ROLLOUT + "policy.digest", lambda x: b"0a", "digest", "type", None),
    (ROLLOUT + "vocab_size", lambda x: 0, "vocab_size", "range", None),
    (ROLLOUT + "vocab_size", lambda x: 10, "tokens_BT", "vocabulary", (0, 3)),
    (ROLLOUT + "vocab_size", lambda x: 10**5000, "vocab_size", "range", None),
    (ROLLOUT + "pad_id", lambda x: -1, "pad_id", "vocabulary", None),
    (ROLLOUT + "pad_id", lambda x: 1, "tokens_BT", "padding", (0, 4)),
    (SCORED + "rollout", lambda x: None, "rollout", "type", None),
    (SCORED + "reward_BN", lambda x: x.T.copy(), "reward_BN", "shape", None),
    (SCORED + "reward_BN", lambda x: put(x, (1, 0), np.nan), "reward_BN", "finite", (1, 0)),
    (SCORED + "reward_BN", lambda x: put(x, (3, 0), 1), "reward_BN", "unscored", (3, 0)),
    (SCORED + "reward_BN", lambda x: np.roll(x, 2, 0), "reward_B", "weighted_sum", (0,)),  # rewards of other rows
    (SCORED + "scored_BN", lambda x: put(x.view(np.uint8), (1, 0), 3).view(bool), "scored_BN", "binary", (1, 0)),
    (SCORED + "scored_BN", lambda x: put(x, 0, False), "reward_BN", "unscored", (0, 0)),
    (SCORED + "scored_B", lambda x: put(x.view(np.uint8), 1, 3).view(bool), "scored_B", "binary", (1,)),
    (SCORED + "scored_B", lambda x: put(x, 0, False), "reward_B", "unscored", (0,)),
    (SCORED + "scored_B", lambda x: put(x, 3, True), "reward_B", "weighted_sum", (3,)),
    (SCORED + "names", lambda x: ("answer",), "names", "type", None),
    (SCORED + "names", lambda x: ("answer", "answer"), "names", "type", None),
    (SCORED + "weight_N", lambda x: put(x, 1, np.inf), "weight_N", "finite", (1,)),
    (SCORED + "weight_N", lambda x: x[::-1].copy(), "reward_B", "weighted_sum", (0,)),
    (SCORED + "reward_B", lambda x: put(x, 0, np.nan), "reward_B", "finite", (0,)),
    (SCORED + "reward_B", lambda x: np.roll(x, 1), "reward_B", "unscored", (3,)),
    (SCORED + "reward_B", lambda x: x + np.float32(0.01), "reward_B", "unscored", (3,)),
    (SCORED + "reward_B", lambda x: put(x, 1, 0.2), "reward_B", "weighted_sum", (1,)),
    ("scored", lambda x: x.rollout, "scored", "type", None),
    ("advantage", lambda x: x[:, None], "advantage", "shape", None),
    ("advantage", lambda x: np.stack([x, x]), "advantage", "shape", None),
    ("advantage", lambda x: put(x, 1, np.nan), "advantage", "finite", (1,)),
    ("advantage", lambda x: put(x, 3, 0.5), "advantage", "unscored", (3,)),
    ("advantage", lambda x: np.tile(x[:, None], 6), "advantage", "outside", (0, 0)),
    ("old_logp_BT", lambda x: put(x, (0, 2), np.nan), "old_logp_BT", "finite", (0, 2)),
    ("old_logp_BT", lambda x: x * -1, "old_logp_BT", "nonpositive", (0, 2)),
    ("old_logp_BT", lambda x: x - 1, "old_logp_BT", "outside", (0, 0)),
    ("old_logp_BT", lambda x: x[:2], "old_logp_BT", "shape", None),
    ("reference_logp_BT", lambda x: put(x, (0, 2), np.nan), "reference_logp_BT", "finite", (0, 2)),
    ("reference_logp_BT", lambda x: x * -1, "reference_logp_BT", "nonpositive", (0, 2)),
    ("reference_logp_BT", lambda x: np.roll(x, 1, 1), "reference_logp_BT", "outside", (0, 4)),
    ("reference_logp_BT", lambda x: 3.0, "reference_logp_BT", "type", None),
]
HARMFUL = [case for case in CORRUPTIONS if case[3]]


@pytest.mark.parametrize(
    ("path", "change", "field", "rule", "index"), HARMFUL, ids=lambda v: v if type(v) is str else ""
)
def test_a_single_corruption_is_caught_and_named(
    batch: TrainBatch, path: str, change: Any, field: str, rule: str, index: tuple[int, ...] | None
) -> None:
    validate(batch, "values")
    with pytest.raises(ContractError) as caught:
        validate(replace(batch, path, change), "values")
    error = caught.value
    assert (error.field, error.rule, error.index) == (field, rule, index)
    assert error.stage in {"Rollout", "Scored", "TrainBatch", "PolicyVersion"}
    assert error.expected is not None
    place = f"{error.stage}.{field}" + ("" if index is None else f"[{', '.join(map(str, index))}]")
    assert str(error).startswith(f"{place} must ")
    assert "got " in str(error)
    assert repr(rule) in str(error)


def test_there_are_corruptions_of_every_rule_and_every_field() -> None:
    assert len(HARMFUL) >= 30
    caught = {(field, rule) for _, _, field, rule, _ in HARMFUL}
    stages = (Rollout, Scored, TrainBatch)
    # Two rules cannot be broken by one field without breaking an earlier rule; they have their own tests below.
    missing = {(rule.field, rule.name) for rule in RULES if rule.stage in stages} - caught
    assert missing == {("scored_B", "scored"), ("prompt_length_B", "same_prompt")}
    assert {field for stage in stages for field in stage.specs()} <= {p.split(".")[-1] for p, *_ in HARMFUL} | {
        "policy"
    }


def test_a_relabelling_of_groups_is_valid(batch: TrainBatch) -> None:
    [(path, change, *_)] = [case for case in CORRUPTIONS if not case[3]]
    validate(replace(batch, path, change), "values")


def test_a_row_no_function_scored_has_no_reward(batch: TrainBatch) -> None:
    scored = batch.scored
    changed = dataclasses.replace(
        scored, scored_BN=put(scored.scored_BN, 3, False), reward_BN=put(scored.reward_BN, 3, 0.0),
        scored_B=put(scored.scored_B, 3, True),
    )  # fmt: skip
    with pytest.raises(ContractError, match=r"Scored.scored_B\[3\] must be False where no function scored the row"):
        validate(changed, "values")


def test_rows_of_a_group_have_prompts_of_one_length(batch: TrainBatch) -> None:
    masked = replace(batch, ROLLOUT + "loss_mask_BT", lambda x: put(x, 1, False))
    changed = replace(masked, ROLLOUT + "prompt_length_B", lambda x: put(x, 1, 1))
    with pytest.raises(ContractError, match=r"prompt_length_B\[1\] must be that of the group's first row \(here 2\)"):
        validate(changed, "values")


PROMPTS: list[tuple[str, Any, str, tuple[int, ...] | None]] = [
    ("tokens_PT", lambda x: x.astype(np.int16), "dtype", None),
    ("tokens_PT", lambda x: put(x, (0, 0), 20), "vocabulary", (0, 0)),
    ("tokens_PT", lambda x: x[:, ::-1].copy(), "padding", (1, 2)),
    ("length_P", lambda x: put(x, 1, 0), "range", (1,)),
    ("length_P", lambda x: put(x, 1, 4), "range", (1,)),
    ("prompt_id_P", lambda x: x[:1], "shape", None),
    ("vocab_size", lambda x: -3, "range", None),
    ("pad_id", lambda x: 20, "vocabulary", None),
    ("pad_id", lambda x: True, "type", None),
]


@pytest.mark.parametrize(("field", "change", "rule", "index"), PROMPTS)
def test_corrupt_prompts_are_caught_and_named(field: str, change: Any, rule: str, index: Any) -> None:
    prompts = Prompts(
        np.array([[3, 4, 5], [6, 7, 0]], np.int32), np.array([3, 2], np.int32), np.array([0, 1], np.int32), 20, 0
    )
    validate(prompts, "values")
    with pytest.raises(ContractError) as caught:
        validate(replace(prompts, field, change), "values")
    assert (caught.value.stage, caught.value.field, caught.value.rule) == ("Prompts", field, rule)
    assert caught.value.index == index


def test_prompts_from_ragged_ids() -> None:
    prompts = Prompts.from_ids([[3, 4, 5], np.array([6])], vocab_size=20, pad_id=9)
    validate(prompts, "values")
    assert prompts.tokens_PT.tolist() == [[3, 4, 5], [6, 9, 9]]
    assert prompts.length_P.tolist() == [3, 1]
    assert prompts.prompt_id_P.tolist() == [0, 1]
    wider = Prompts.from_ids([(3, 4), (6, 9)], vocab_size=20, pad_id=9, length=4, prompt_id_P=[7, 5])
    validate(wider, "values")
    assert wider.tokens_PT.tolist() == [[3, 4, 9, 9], [6, 9, 9, 9]]
    assert wider.length_P.tolist() == [2, 2]
    assert wider.prompt_id_P.tolist() == [7, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "argument.ids must be a list of rows, at least one: got 0 rows"),
        ({"ids": "abc"}, "argument.ids must be a list of rows, at least one: got 'abc'"),
        ({"ids": [[1], []]}, r"argument.ids\[1\] must be at least one token id: got an empty row"),
        ({"ids": [[1], [0.5]]}, r"argument.ids\[1\] must be at least one token id: got float64\[1\]"),
        ({"ids": [3, 4]}, r"argument.ids\[0\] must be at least one token id: got int64\[\]"),
        ({"ids": [[1], [2, -1]]}, r"argument.ids\[1\] must be token ids in \[0, 2\*\*31\): got -1..2"),
        ({"ids": [[1], [2, 20]]}, r"argument.ids\[1, 1\] must be in \[0, 20\): got 20"),
        ({"length": 1}, r"argument.ids\[1\] must be at most 1 tokens long: got 2"),
        ({"length": 0}, r"argument.length must be an int in \[1, 2\*\*31\): got 0"),
        ({"pad_id": 20}, r"argument.pad_id must be in \[0, 20\): got 20"),
        ({"vocab_size": "20"}, r"argument.vocab_size must be an int in \[1, 2\*\*31\): got '20'"),
        ({"prompt_id_P": [1]}, r"argument.prompt_id_P must have shape \(2,\): got \(1,\)"),
        ({"prompt_id_P": [1.0, 2.0]}, "argument.prompt_id_P must be of a dtype of kind"),
    ],
)
def test_ragged_ids_that_are_no_prompts_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"ids": [[1], [2, 3]], "vocab_size": 20} | change
    with pytest.raises(ContractError, match=message):
        Prompts.from_ids(arguments.pop("ids"), **arguments)


def test_a_digest_may_be_unrecorded(batch: TrainBatch) -> None:
    validate(replace(batch, ROLLOUT + "policy.digest", lambda _: ""), "values")


def test_shapes_level_leaves_values_alone(batch: TrainBatch) -> None:
    validate(replace(batch, "advantage", lambda x: x * np.nan))


def test_a_row_may_stay_out_of_the_loss(batch: TrainBatch) -> None:
    validate(replace(batch, ROLLOUT + "loss_mask_BT", lambda x: put(x, 1, False)), "values")


class Raising(np.ndarray):
    @property
    def dtype(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise RuntimeError("not a dtype")


@pytest.mark.parametrize("kind", [np.ma.MaskedArray, np.matrix, Raising])
def test_arrays_that_compute_differently_are_refused(batch: TrainBatch, kind: type[np.ndarray]) -> None:
    for level in ("shapes", "values"):
        with pytest.raises(ContractError, match=f"must be a numpy or jax array: got a {kind.__name__}"):
            validate(replace(batch, "old_logp_BT", lambda x: x.view(kind)), level)


def test_arrays_of_a_file_are_arrays(batch: TrainBatch, tmp_path: Path) -> None:
    np.save(tmp_path / "logp.npy", batch.scored.rollout.logp_BT)
    validate(replace(batch, "old_logp_BT", lambda _: np.load(tmp_path / "logp.npy", mmap_mode="r")), "values")


def test_unflattened_groups_get_advice(batch: TrainBatch) -> None:
    with pytest.raises(ContractError) as caught:
        validate(replace(batch, SCORED + "reward_B", lambda x: x.reshape(2, 2)))
    expected = "Scored.reward_B must have shape (4,) [B]: got (2, 2) (rule 'shape'). "
    assert str(caught.value) == expected + "Flatten groups first (`reward_B.reshape(-1)`)."


def test_errors_are_grpo_errors_and_survive_pickling(batch: TrainBatch) -> None:
    with pytest.raises(ContractError) as caught:
        validate(replace(batch, "advantage", lambda x: put(x, 3, 0.5)), "values")
    assert isinstance(caught.value, GrpoError)
    assert isinstance(caught.value, ValueError)
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 (errors travel between processes)
    assert (str(copy), vars(copy)) == (str(caught.value), vars(caught.value))


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.builds(object),
    st.builds(lambda n: 10**n, st.integers(0, 6000)),
    st.builds(lambda s: (s,), st.text(max_size=2)),
    st.builds(PolicyVersion, st.one_of(st.integers(), st.text(max_size=2)), st.one_of(st.text(max_size=2), st.none())),
    st.builds(
        lambda dtype, shape, fill: np.full(shape, fill).astype(dtype),
        st.sampled_from(
            ["int32", "int8", "bool", "float32", "float64", "int64", ">i4", "O", "U2", "datetime64[s]", "c8"]
        ),
        st.lists(st.integers(0, 7), max_size=3),
        st.sampled_from([0, 1, 2, 5, 19]),
    ),
)
FIELDS = [
    *(ROLLOUT + field for field in Rollout.specs()),
    *(SCORED + field for field in Scored.specs()),
    *TrainBatch.specs(),
    ROLLOUT + "policy.step",
    ROLLOUT + "policy.digest",
]


@given(seed=SEEDS, path=st.sampled_from(FIELDS), value=ANYTHING, level=st.sampled_from(["shapes", "values"]))
@example(seed=0, path=ROLLOUT + "vocab_size", value=10**6000, level="values")
@settings(max_examples=400, deadline=None)
def test_any_field_may_be_anything(make_batch: Any, seed: int, path: str, value: Any, level: str) -> None:
    try:
        validate(replace(make_batch(seed), path, lambda _: value), level)
    except ContractError as error:
        assert error.rule  # noqa: PT017 (anything else that is raised fails the test)


INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 8)
FLOAT32 = st.floats(width=32) | st.sampled_from([0.0, -1.0])


@given(seed=SEEDS, path=st.sampled_from(FIELDS), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_array_may_hold_any_values(make_batch: Any, seed: int, path: str, data: st.DataObject) -> None:
    batch = make_batch(seed)
    array = functools.reduce(getattr, path.split("."), batch)
    if not isinstance(array, np.ndarray):
        return
    values = {"i": st.integers(-128, 127) if array.dtype == np.int8 else INT32, "b": st.booleans(), "f": FLOAT32}
    filled = data.draw(st.lists(values[array.dtype.kind], min_size=array.size, max_size=array.size))
    try:
        validate(replace(batch, path, lambda x: np.array(filled, x.dtype).reshape(x.shape)), "values")
    except ContractError as error:
        assert error.index is not None  # noqa: PT017


@given(batch=ANYTHING, level=ANYTHING)
@settings(max_examples=100, deadline=None)
def test_the_batch_may_be_anything(batch: Any, level: Any) -> None:
    stage: Any
    for stage in (batch, object.__new__(Rollout), Rollout, TrainBatch(batch, batch), Scored(*[batch] * 7)):
        with pytest.raises(ContractError):
            validate(stage, level)
        with pytest.raises(ContractError):
            validate(stage, "values")


@given(*[ANYTHING] * 5)
@settings(max_examples=200, deadline=None)
def test_sampling_parameters_are_valid_or_refused(
    temperature: Any, top_k: Any, top_p: Any, min_p: Any, stop_ids: Any
) -> None:
    for arguments in (
        {"temperature": temperature},
        {"top_k": top_k, "top_p": top_p},
        {"min_p": min_p},
        {"stop_ids": stop_ids},
    ):
        try:
            sampling = SamplingParams(**arguments)
        except ContractError as error:
            assert error.field in arguments  # noqa: PT017
        else:
            assert hash(sampling) == hash(dataclasses.replace(sampling))


def test_equal_sampling_parameters_are_equal_whatever_types_they_came_as() -> None:
    ids: Any = [2, 3]
    top_k: Any = np.int32(3)
    sampling = SamplingParams(np.float64(0.5), top_k, 1, 0, ids)
    assert sampling == SamplingParams(0.5, 3, 1.0, 0.0, (2, 3))
    assert repr(sampling) == "SamplingParams(temperature=0.5, top_k=3, top_p=1.0, min_p=0.0, stop_ids=(2, 3))"
    assert SamplingParams(stop_ids=(5,)).plain
    assert not sampling.plain


def test_rewards_that_could_not_be_computed_are_unscored(batch: TrainBatch) -> None:
    scored = batch.scored
    assert scored.scored_B.tolist() == [True, True, True, False]
    np.testing.assert_allclose(scored.reward_B, [1.1, 0.1, 0.2, 0.0], rtol=1e-6)
    rollout = scored.rollout
    watched = Scored.from_rewards(rollout, {"a": [None] * 4, "b": [1, 2, 3, 4]}, {"a": 0, "b": 1})
    assert watched.scored_B.all()  # a function of weight 0 does not count
    for rewards, weights in [
        ({}, None),
        ({"a": [1.0]}, None),
        ({"a": [1.0] * 4}, {"b": 1.0}),
        ({"a": ["1"] * 4}, None),
        ({"a": [1.0] * 4}, {"a": None}),
        ({"a": [1.0] * 4}, {"a": np.inf}),
        ({"a": {0.0, 1.0, 2.0, 3.0}}, None),  # no order says whose reward is whose
        ({"a": 1.0}, None),
        ([1.0] * 4, None),
    ]:
        with pytest.raises(ContractError):
            Scored.from_rewards(rollout, rewards, weights)  # type: ignore[arg-type]
    wrong: Any = scored
    with pytest.raises(ContractError, match=r"Scored\.rollout must be a Rollout: got a Scored"):
        Scored.from_rewards(wrong, {"a": [1.0] * 4})
