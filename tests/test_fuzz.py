"""Nothing that a run reads makes it end in anything but a sentence: a few cases here, many in `tools/fuzz.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def fuzz(*arguments: str) -> None:
    command = [sys.executable, str(ROOT / "tools/fuzz.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_damaged_inputs_of_each_kind() -> None:
    fuzz("--cases", "60", "--seed", "5")


@pytest.mark.slow
def test_many_damaged_inputs_of_the_quick_kinds() -> None:
    fuzz("data", "model", "run", "batch", "--cases", "5000", "--seed", "6")
