"""Records of TRL and verl become valid rollouts, whichever side they are padded on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_contracts import (
    ContractError,
    PolicyVersion,
    Prompts,
    Rollout,
    SamplingParams,
    from_completions,
    from_trl,
    from_verl,
    validate,
)

PAD, EOS = 0, 19


def padded(rows: list[list[Any]], width: int, fill: Any, *, left: bool) -> np.ndarray:
    return np.array([[fill] * (width - len(r)) + r if left else r + [fill] * (width - len(r)) for r in rows])


def ones(rows: list[list[int]]) -> list[list[int]]:
    return [[1] * len(row) for row in rows]


PROMPTS = [[3, 4, 5], [3, 4, 5], [6], [6]]
COMPLETIONS = [[7, EOS], [8, 9, 10, 11], [12, 13, EOS], [EOS]]
LOGP = [[-0.1, -0.2], [-0.3, -0.4, -0.5, -0.6], [-0.7, -0.8, -0.9], [-1.0]]
GIVEN: dict[str, Any] = {
    "sampling": SamplingParams(stop_ids=(EOS,)),
    "policy": PolicyVersion(3, "abcd"),
    "vocab_size": 20,
    "pad_id": PAD,
    "group_size": 2,
}

KNOWN: dict[str, Any] = {name: GIVEN[name] for name in ("sampling", "policy", "group_size")}


def trl_record(*, left: bool = True, late: bool = False, fill: float = 0.0) -> dict[str, Any]:
    """A record as TRL makes it: prompts padded on the left, completions on the right; or the other way round."""
    return {
        "prompt_ids": padded(PROMPTS, 4, PAD, left=left),
        "prompt_mask": padded(ones(PROMPTS), 4, 0, left=left),
        "completion_ids": padded(COMPLETIONS, 5, PAD, left=late),
        "completion_mask": padded(ones(COMPLETIONS), 5, 0, left=late),
        "sampling_per_token_logps": padded(LOGP, 5, fill, left=late).astype(np.float32),
        "advantages": np.zeros(4, np.float32),
    }


def verl_record(*, left: bool = True) -> dict[str, Any]:
    trl = trl_record(left=left, fill=-1.0)  # verl fills log-probabilities of padding with -1
    return {
        "prompts": trl["prompt_ids"],
        "responses": trl["completion_ids"],
        "input_ids": np.concatenate([trl["prompt_ids"], trl["completion_ids"]], 1),
        "attention_mask": np.concatenate([trl["prompt_mask"], trl["completion_mask"]], 1),
        "response_mask": trl["completion_mask"],
        "rollout_log_probs": trl["sampling_per_token_logps"],
        "uid": np.array(["a", "a", "b", "b"], object),
    }


def check(rollout: Rollout) -> None:
    validate(rollout, "values")
    for b in range(4):
        start, end = rollout.prompt_length_B[b], rollout.total_length_B[b]
        assert rollout.tokens_BT[b, :start].tolist() == PROMPTS[b]
        assert rollout.tokens_BT[b, start:end].tolist() == COMPLETIONS[b]
        np.testing.assert_allclose(rollout.logp_BT[b, start:end], LOGP[b])
        assert rollout.loss_mask_BT[b, start:end].all()
    assert rollout.tokens_BT.shape == (4, 9)
    assert rollout.finish_B.tolist() == [0, 1, 0, 0]
    assert rollout.group_B.tolist() == [0, 0, 1, 1]
    assert rollout.sample_B.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_trl_records_padded_on_either_side(left: bool, late: bool) -> None:
    check(from_trl(trl_record(left=left, late=late), **GIVEN))
    check(from_trl(trl_record(left=left, late=late, fill=np.nan), **GIVEN))


@pytest.mark.parametrize("left", [True, False])
def test_verl_records_padded_on_either_side(left: bool) -> None:
    check(from_verl(verl_record(left=left), **GIVEN))


def test_lists_and_arrays_of_other_dtypes_are_read() -> None:
    check(from_trl({key: value.tolist() for key, value in trl_record().items()}, **GIVEN))
    record = verl_record()
    check(from_verl(record | {"attention_mask": record["attention_mask"].astype(bool)}, **GIVEN))


class Tensor:
    """Like a torch tensor: numpy can read it only when it is detached and on the host."""

    def __init__(self, array: np.ndarray, state: str = "gpu, tracked") -> None:
        self._array, self._state = array, state

    def detach(self) -> Tensor:
        return Tensor(self._array, "gpu")

    def cpu(self) -> Tensor:
        return Tensor(self._array, "cpu")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self._state != "cpu":
            raise TypeError(f"can't convert a tensor that is {self._state}")
        return self._array


def test_tensors_like_those_of_torch_are_read() -> None:
    check(from_trl({key: Tensor(value) for key, value in trl_record().items()}, **GIVEN))


def test_real_torch_tensors_are_read() -> None:
    torch = pytest.importorskip("torch")
    check(from_trl({key: torch.tensor(value) for key, value in trl_record().items()}, **GIVEN))
    record = trl_record()
    half = torch.tensor(record["sampling_per_token_logps"], dtype=torch.bfloat16)
    with pytest.raises(ContractError, match="sampling_per_token_logps"):
        from_trl(record | {"sampling_per_token_logps": half}, **GIVEN)


def test_shuffled_rows_find_their_groups() -> None:
    order = [2, 0, 3, 1]
    shuffled = {key: value[order] for key, value in verl_record().items()}
    rollout = from_verl(shuffled, **GIVEN)
    assert rollout.group_B.tolist() == [0, 1, 0, 1]
    assert rollout.sample_B.tolist() == [0, 0, 1, 1]
    trl = {key: value[order] for key, value in trl_record().items()}
    rollout = from_trl(trl, **GIVEN, group=["b", "a", "b", "a"], prompt_id=[11, 10, 11, 10])
    assert rollout.prompt_id_B.tolist() == [11, 10, 11, 10]
    with pytest.raises(ContractError, match="prompt"):  # as adjacent rows, groups would mix prompts
        from_trl(trl, **GIVEN)


def test_a_masked_truncated_completion_stays_out_of_the_loss() -> None:
    record = trl_record()
    record["completion_mask"][1] = 0
    rollout = from_trl(record, **GIVEN)
    assert rollout.completion_length_B.tolist() == [2, 4, 3, 1]
    assert rollout.loss_mask_BT.any(1).tolist() == [True, False, True, True]


def test_the_trainers_own_logps_suffice_only_without_filters() -> None:
    record = trl_record()
    record["old_per_token_logps"] = record.pop("sampling_per_token_logps")
    check(from_trl(record, **GIVEN))
    with pytest.raises(ContractError, match="ignores filters"):
        from_trl(record, **dict(GIVEN, sampling=SamplingParams(top_k=3, stop_ids=(EOS,))))
    cool: dict[str, Any] = GIVEN | {"sampling": SamplingParams(temperature=0.5, stop_ids=(EOS,))}
    with pytest.raises(ContractError, match="Score the completions once at temperature 1"):
        from_trl(record, **cool)
    rollout = from_trl(record, **cool, policy_logp=record["old_per_token_logps"] * 2)
    np.testing.assert_allclose(rollout.policy_logp_BT, rollout.logp_BT * 2)


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: without(r, "completion_ids"), "completion_ids"),
        (lambda r: without(r, "prompt_mask"), "prompt_mask"),
        (lambda r: without(r, "sampling_per_token_logps"), "sampling_per_token_logps"),
        (lambda r: r | {"completion_mask": r["completion_mask"] * 2}, "completion_mask"),
        (lambda r: r | {"completion_mask": r["completion_mask"][:, :-1]}, "completion_ids"),
        (lambda r: r | {"completion_ids": r["completion_ids"] + 0.5}, "completion_ids"),
        (lambda r: r | {"completion_ids": r["completion_ids"] + 2**40}, "completion_ids"),
        (lambda r: r | {"prompt_mask": np.array([[1, 0, 1, 0]] * 4)}, "prompt mask"),
        (lambda r: r | {"prompt_ids": r["prompt_ids"][:2], "prompt_mask": r["prompt_mask"][:2]}, "prompts"),
        (lambda r: r | {"tool_mask": np.array([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]] * 2)}, "loss_mask_BT"),
        (lambda r: r | {"sampling_per_token_logps": -r["sampling_per_token_logps"]}, "logp_BT"),
        (lambda r: 3, None),
    ],
)
def test_a_broken_record_is_named(change: Any, field: str | None) -> None:
    with pytest.raises(ContractError) as caught:
        from_trl(change(trl_record()), **GIVEN)
    assert caught.value.field == field


def test_a_loss_on_padding_is_refused() -> None:
    record = verl_record()
    with pytest.raises(ContractError, match="0 on padding"):
        from_verl(record | {"response_mask": np.ones_like(record["response_mask"])}, **GIVEN)


ANYTHING = (
    st.none()
    | st.integers()
    | st.text(max_size=3)
    | st.builds(object)
    | st.lists(st.integers(), max_size=4)
    | st.builds(
        lambda shape, fill, dtype: np.full(shape, fill).astype(dtype),
        st.lists(st.integers(0, 9), max_size=3),
        st.sampled_from([0, 1, -1, 19, 2**31]),
        st.sampled_from(["int64", "float32", "bool", "O", "U3"]),
    )
    | st.builds(lambda columns, fill: np.full((4, columns), fill), st.integers(1, 9), st.sampled_from([0, 1, 0.0]))
)


@given(data=st.data(), value=ANYTHING)
@settings(max_examples=300, deadline=None)
def test_nothing_but_contract_error(data: st.DataObject, value: Any) -> None:
    adapt, record = data.draw(st.sampled_from([(from_trl, trl_record()), (from_verl, verl_record())]))
    extra: dict[str, Any] = {"group": None, "prompt_id": None, "policy_logp": None}
    key = data.draw(st.sampled_from([*record, *GIVEN, *extra]))
    try:
        if key in record:
            adapt(record | {key: value}, **GIVEN)
        else:
            adapt(record, **dict(GIVEN | extra, **{key: value}))
    except ContractError as error:
        assert error.rule  # noqa: PT017


def test_ragged_completions_of_any_engine() -> None:
    prompts = Prompts(
        np.array([[3, 4, 5], [6, 0, 0]], np.int32), np.array([3, 1], np.int32), np.array([8, 9], np.int32), 20, PAD
    )
    rollout = from_completions(prompts, COMPLETIONS, LOGP, **KNOWN, max_new_tokens=6)
    check(rollout)
    assert rollout.prompt_id_B.tolist() == [8, 8, 9, 9]
    longest = from_completions(prompts, [np.array(c) for c in COMPLETIONS], LOGP, **KNOWN)
    assert longest.tokens_BT.shape == (4, 7)
    for completions, logp, field in [
        (COMPLETIONS[:3], LOGP, "completions"),
        ([*COMPLETIONS[:3], []], LOGP, "completions"),
        ([*COMPLETIONS[:3], [20]], LOGP, "tokens_BT"),
        ([*COMPLETIONS[:3], [2**31]], LOGP, "completions"),
        ("abcd", LOGP, "completions"),
        (COMPLETIONS, [*LOGP[:3], [-1.0, -1.0]], "logp"),
        (COMPLETIONS, None, "logp"),
    ]:
        with pytest.raises(ContractError) as caught:
            from_completions(prompts, completions, logp, **KNOWN)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(ContractError, match="at most 3 tokens"):
        from_completions(prompts, COMPLETIONS, LOGP, **KNOWN, max_new_tokens=3)


@given(completions=ANYTHING | st.lists(ANYTHING, min_size=2, max_size=2), logp=ANYTHING, group_size=ANYTHING)
@settings(max_examples=150, deadline=None)
def test_nothing_but_contract_error_from_ragged(completions: Any, logp: Any, group_size: Any) -> None:
    prompts = Prompts(np.array([[3]], np.int32), np.array([1], np.int32), np.array([8], np.int32), 20, PAD)
    for size in (group_size, 2):
        try:
            from_completions(prompts, completions, logp, **dict(KNOWN, group_size=size))
        except ContractError as error:
            assert error.rule  # noqa: PT017
