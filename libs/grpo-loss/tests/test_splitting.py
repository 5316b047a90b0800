"""The same batch gives the same loss and gradient however it is split: one table.

Micro-batch size × packed (a row of one prompt, or of several; micro-batches of several sizes) or padded × 1, 2, 4, 8
devices × 1, 2 processes.
"""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from split_worker import gradients

WORKER = Path(__file__).with_name("split_worker.py")
BOUND = {"float32": 1e-6, "float64": 1e-12}


def difference(actual, expected):
    """Largest difference over the largest entry of the same quantity."""
    return max(
        float(np.abs(actual[name].astype(np.float64) - expected[name]).max() / np.abs(expected[name]).max())
        for name in expected
    )


@pytest.fixture(scope="module")
def exact():
    with jax.enable_x64(True):
        return gradients("float64", 20, "padded")


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("layout", ["packed", "blocks", "sizes", "padded"])
def test_micro_batch_size_and_layout_do_not_matter(exact, rows, layout):
    with jax.enable_x64(True):
        assert difference(gradients("float64", rows, layout), exact) <= BOUND["float64"]


@pytest.mark.slow
def test_nothing_about_the_split_matters(exact, tmp_path):
    lines, failures = [], []
    for devices, processes in [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2)]:
        sizes = [size for size in (1, 2, 4, 8, 24) if size % devices == 0]
        out = tmp_path / f"{devices}-{processes}.npz"
        run_workers(devices, processes, sizes, out)
        stored = np.load(out)
        for dtype, bound in BOUND.items():
            for layout in ("packed", "blocks", "sizes", "padded"):
                worst = max(
                    difference({name: stored[f"{dtype}/{layout}/{rows}/{name}"] for name in exact}, exact)
                    for rows in sizes
                )
                line = f"{devices} devices, {processes} processes, {layout}, {dtype}, rows {sizes}: {worst:.1e}"
                lines.append(line)
                if worst > bound:
                    failures.append(line)
    print("\n".join(lines))
    assert not failures


def run_workers(devices, processes, sizes, out):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(WORKER), f"--devices={devices}", f"--processes={processes}", f"--port={port}"]
    command += [f"--out={out}", "--rows", *map(str, sizes)]
    workers = [
        subprocess.Popen([*command, f"--rank={rank}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(processes)
    ]
    try:
        outputs = [worker.communicate(timeout=900)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
