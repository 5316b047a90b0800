"""A mesh changes where a rollout is computed, not what comes out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sampling_on_eight_devices.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "sampling", "layers"),
    [
        ("8,1,1", "plain", "unrolled"),
        ("1,8,1", "plain", "scanned"),
        ("2,2,2", "filtered", "unrolled"),
        ("2,2,2", "plain", "scanned"),
        ("1,4,2", "filtered", "scanned"),
        ("4,1,2", "plain", "unrolled"),
        ("2,2,2", "adapters", "unrolled"),
        ("1,4,2", "adapters", "scanned"),
        ("2,2,2", "stopping", "scanned"),
        ("8,1,1", "stopping", "unrolled"),
    ],
)
def test_results_equal_one_device(mesh, sampling, layers):
    check(mesh, mesh, sampling, layers)


# The model has two key/value heads: tp 4 repeats each twice.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained_on", "mesh", "sampling", "layers"),
    [
        ("1,8,1", "4,1,2", "plain", "scanned"),
        ("1,8,1", "2,1,4", "filtered", "unrolled"),
        ("1,4,2", "2,1,4", "plain", "scanned"),
        ("2,2,2", "1,2,4", "stopping", "scanned"),
        ("2,2,2", "8,1,1", "plain", "unrolled"),
        ("1,4,2", "2,1,4", "adapters", "scanned"),
        ("1,8,1", "2,1,4", "adapters", "unrolled"),
        ("1,8,1", "2,1,4", "tensor alone", "scanned"),
    ],
)
def test_weights_move_to_a_mesh_of_their_own(trained_on, mesh, sampling, layers):
    check(trained_on, mesh, sampling, layers)


def check(trained_on: str, mesh: str, sampling: str, layers: str) -> None:
    command = [sys.executable, str(SCRIPT), trained_on, mesh, sampling, layers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["tokens"], report
    assert report["finish"], report
    assert report["logp"] <= 5e-6, report
    assert report["policy_logp"] <= 5e-6, report
    assert report["splash"] <= 3e-6, report
