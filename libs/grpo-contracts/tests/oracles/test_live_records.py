"""The adapters against records that TRL and verl make here and now."""

import pytest
from test_trainer_records import check
from trainer_records import trl_cases, verl_cases


@pytest.mark.parametrize("cases", [trl_cases, verl_cases])
def test_a_live_record_says_what_was_drawn(cases):
    for name, case in cases():
        check(name, case)
