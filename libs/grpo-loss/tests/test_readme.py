"""The README's example runs as printed."""

import re
from pathlib import Path

import numpy as np


def test_example_runs():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(block, names)
    assert np.isfinite(names["value"])
    assert names["gradient_BT"].shape == (4, 6)
    assert not np.asarray(names["gradient_BT"])[~np.asarray(names["mask_BT"])].any()
    # Inside the clip range a token with a positive advantage pulls its log-probability up.
    assert np.asarray(names["gradient_BT"])[0, 0] < 0
