"""What the package shows and what it costs: public names, imports, the README's example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_contracts

# Frozen: taking a name away or changing its meaning is a breaking change, adding one a minor version.
PUBLIC = [
    "AdvantageEstimator",
    "ContractError",
    "FinishReason",
    "GrpoError",
    "PolicyIdentity",
    "PolicyUpdate",
    "Prompts",
    "RewardFunction",
    "Rollout",
    "RolloutBackend",
    "SamplingLaw",
    "Scored",
    "TrainBatch",
    "from_completions",
    "from_trl",
    "from_verl",
    "load",
    "save",
    "schema",
    "validate",
]
README = Path(__file__).parents[1] / "README.md"

PROBE = """
import sys, time, numpy
before, start = set(sys.modules), time.process_time()
import grpo_contracts
print(time.process_time() - start, *{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_public_names_are_frozen() -> None:
    assert grpo_contracts.__all__ == PUBLIC
    assert all(getattr(grpo_contracts, name).__doc__ for name in PUBLIC)


def test_the_import_brings_numpy_alone_and_is_quick() -> None:
    runs = []
    for _ in range(3):
        words = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
        assert {name for name in words[1:] if name not in sys.stdlib_module_names} <= {"grpo_contracts"}
        runs.append(float(words[0]))
    assert min(runs) < 0.1  # seconds of processor time on top of numpy's own


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [example, printed] = re.findall(r"```(?:python|text)\n(.*?)```", README.read_text(), re.DOTALL)
    with pytest.raises(grpo_contracts.ContractError) as caught:
        exec(compile(example, str(README), "exec"), {})
    assert f"{caught.value}\n" == printed
    assert len([line for line in example.splitlines() if line]) <= 10
