"""Real records of TRL and verl become rollouts that hold what their engines drew.

The records were stored by `oracles/write_trainer_records.py`; `hatch run oracles:test` makes new ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_contracts import PolicyVersion, SamplingParams, from_trl, from_verl, validate

STORED = Path(__file__).parent / "oracles" / "trainer_records.npz"
ADAPTERS = {"trl": from_trl, "verl": from_verl}
# The records are float32, and so is the forward over padded rows that TRL scores them with.
ROUNDING = 2e-5


def stored_cases() -> dict[str, dict[str, Any]]:
    with np.load(STORED, allow_pickle=False) as archive:
        cases = json.loads(str(archive["cases"]))
        for name, case in cases.items():
            start = f"{name}/"
            case["record"] = {key[len(start) :]: archive[key] for key in archive.files if key.startswith(start)}
    return cases


def check(name: str, case: dict[str, Any]) -> None:
    """Adapt one record, and compare each row with what was drawn."""
    arguments = dict(case["arguments"])
    sampling = SamplingParams(**arguments.pop("sampling"))
    if "policy_logp" in arguments:
        arguments["policy_logp"] = np.array(arguments["policy_logp"], np.float32)
    policy = PolicyVersion(7, "0abc")
    rollout = ADAPTERS[name.partition(",")[0]](case["record"], sampling=sampling, policy=policy, **arguments)
    validate(rollout, "values")
    assert len(rollout.tokens_BT) == len(case["prompts"])
    ended = []
    for b, (prompt, completion) in enumerate(zip(case["prompts"], case["completions"])):
        start, end = rollout.prompt_length_B[b], rollout.total_length_B[b]
        assert rollout.tokens_BT[b, :start].tolist() == prompt
        assert rollout.tokens_BT[b, start:end].tolist() == completion
        # TRL masks a truncated row before scoring it and records 0 for each of its tokens.
        logp = case["logp"][b] if case["in_loss"][b] else [0.0] * len(completion)
        np.testing.assert_allclose(rollout.logp_BT[b, start:end], logp, rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(rollout.policy_logp_BT[b, start:end], case["policy_logp"][b], rtol=0, atol=ROUNDING)
        assert rollout.loss_mask_BT[b].any() == case["in_loss"][b]
        ended.append(completion[-1] in sampling.stop_ids)
    assert (rollout.finish_B == [0 if stopped else 1 for stopped in ended]).all()
    prompt_of_group = {int(g): case["prompts"][b] for b, g in enumerate(rollout.group_B)}
    assert [prompt_of_group[int(g)] for g in rollout.group_B] == case["prompts"]
    assert len(prompt_of_group) == len(case["prompts"]) // rollout.group_size


@pytest.mark.parametrize("name", stored_cases())
def test_a_trainers_own_record_says_what_was_drawn(name: str) -> None:
    check(name, stored_cases()[name])


def test_the_records_hold_both_endings_and_masked_rows() -> None:
    cases = stored_cases()
    for trainer in ADAPTERS:
        of_trainer = [case for name, case in cases.items() if name.partition(",")[0] == trainer]
        stops = {
            last in case["arguments"]["sampling"]["stop_ids"] for case in of_trainer for *_, last in case["completions"]
        }
        assert stops == {True, False}, trainer
    assert {alive for case in cases.values() for alive in case["in_loss"]} == {True, False}
