"""What was stored once means the same in this tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tools.release.meaning import GOLDEN, changed_meanings
from tools.release.workspace import ROOT, read_workspace

from golden.replay import MODULES, differences

LIBRARIES = [library.name for library in read_workspace(ROOT).libraries]


def test_every_library_has_golden_cases() -> None:
    assert sorted(MODULES) == sorted(LIBRARIES)
    for library in LIBRARIES:
        with np.load(ROOT / GOLDEN / f"{library}.npz", allow_pickle=False) as stored:
            assert len(stored.files) > 20


@pytest.mark.parametrize(
    "library",
    # The sampler compiles three families and the decode loop.
    [pytest.param(name, marks=pytest.mark.slow if name == "grpo-sampler" else ()) for name in LIBRARIES],
)
def test_stored_values_are_still_computed(library: str) -> None:
    assert changed_meanings(ROOT / GOLDEN, library, tree=ROOT) == []


def test_stored_batches_are_plain_zips_of_arrays() -> None:
    for path in (ROOT / GOLDEN / "batches").glob("*.npz"):
        with np.load(path, allow_pickle=False) as archive:
            assert "header.json" in archive.files
            assert all(archive[name].size for name in archive.files if name != "header.json")


@pytest.mark.parametrize(
    ("new", "told"),
    [
        (np.array([1, 2, 3], np.float32), None),
        (np.array([1, 2.00001, 3], np.float32), None),
        (np.array([1, 2.001, 3], np.float32), "x: at [1] of [3] was 2.0, is 2.00"),
        (np.array([1, np.nan, 3], np.float32), "x: at [1] of [3] was 2.0, is nan"),
        (np.array([1, 2, 3], np.float64), "x: was float32[3], is float64[3]"),
        (np.array([1, 2, 3], np.int32), "x: was float32[3], is int32[3]"),
        (np.array([[1, 2, 3]], np.float32), "x: was float32[3], is float32[1, 3]"),
        (None, "x: is not computed any more"),
    ],
)
def test_what_counts_as_a_difference(new: np.ndarray | None, told: str | None) -> None:
    found = list(differences({"x": np.array([1, 2, 3], np.float32)}, {} if new is None else {"x": new}))
    assert not found if told is None else found[0].startswith(told)


def test_a_stored_value_is_never_rewritten(tmp_path: Path) -> None:
    """`--write` adds cases; a case that differs stays as it was stored."""
    folder = tmp_path / "golden"
    shutil.copytree(ROOT / GOLDEN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "grpo-contracts.npz"
    with np.load(path) as stored:
        cases = {name: stored[name] for name in stored.files}
    damaged, dropped = "stages/finish reasons", "stages/default sampling"
    cases[damaged] = cases[damaged] + 1
    default = cases.pop(dropped)
    np.savez(path, **cases)  # pyright: ignore[reportArgumentType]
    done = subprocess.run(
        [sys.executable, str(folder / "replay.py"), "grpo-contracts", "--write"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert damaged in done.stdout
    with np.load(path) as stored:
        assert (stored[damaged] == cases[damaged]).all()
        assert stored[dropped] == default
