"""Over every group that can be drawn, each estimator's expected gradient is the one its documentation names."""

import audit_estimators
import jax
import pytest

import grpo_loss


@pytest.mark.slow
def test_expectations_are_what_is_claimed():
    with jax.enable_x64(True):
        rows = audit_estimators.audit(grpo_loss)
    wrong = {name: (claim, error) for name, claim, error, *_ in rows if error > 1e-12}
    assert not wrong
    # The audit can tell estimators apart: some of them are biased, and it says so.
    assert {name for name, _, _, bias, *_ in rows if bias < 1e-12} >= {"REINFORCE", "RLOO", "GAE 0.5, exact values"}
    assert any(bias > 0.1 for _, _, _, bias, *_ in rows)
