"""What importing the package costs, and the README's example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_contracts

README = Path(__file__).parents[1] / "README.md"

PROBE = """
import sys, numpy
before = set(sys.modules)
import grpo_contracts
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
# With their own imports they cost several times as much as the package; `save_batch` and `load_batch` import them.
LATE = {"argparse", "json", "pathlib", "uuid", "zipfile"}


def test_the_import_brings_only_numpy_and_defers_what_files_need() -> None:
    words = subprocess.run(
        [sys.executable, "-I", "-c", PROBE], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(words) - sys.stdlib_module_names == {"grpo_contracts"}
    assert not set(words) & LATE


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [example, printed] = re.findall(r"```(?:python|text)\n(.*?)```", README.read_text(), re.DOTALL)
    with pytest.raises(grpo_contracts.ContractError) as caught:
        exec(compile(example, str(README), "exec"), {})
    assert f"{caught.value}\n" == printed
    assert len([line for line in example.splitlines() if line]) <= 10
