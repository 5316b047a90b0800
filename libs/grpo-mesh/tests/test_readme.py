import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import grpo_mesh
import grpo_mesh.preflight

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
# Two products, forward and for the gradient, of 2^20 rows with a matrix of 8192 x 8192.
FLOPS = 2 * 2 * 2**20 * 8192**2


def run(example: str, namespace: dict) -> None:
    exec(compile(example, "README.md", "exec"), namespace)


def test_the_examples_of_sharding_run(capsys):
    namespace: dict = {"state_shardings": grpo_mesh.state_shardings, "optimizer": optax.adamw(1e-3)}
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 12
    run(EXAMPLES[0], namespace)
    assert "blocks/wq" in capsys.readouterr().out
    run(EXAMPLES[1], namespace)
    assert namespace["state"][0].mu["embed"].sharding == namespace["sharded"]["embed"].sharding


def test_the_example_of_preflight_runs_on_the_devices_at_hand(capsys):
    example = EXAMPLES[2]
    assert len([line for line in example.splitlines() if line]) <= 15
    example = re.sub(r"^compile_only.*\n", "", example, flags=re.M)
    run(example.replace('slice_devices("v5e-4")', "jax.devices()[:1]"), {})
    printed = capsys.readouterr().out
    assert f"{FLOPS / 1e12:.1f} TFLOP" in printed
    assert "v5e-4: peak" in printed.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_example_of_preflight_prints_what_the_readme_shows():
    # In a process of its own: `compile_only` sets up the whole process.
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[2]], env=os.environ, capture_output=True, text=True, check=True
    )
    assert f"{FLOPS / 4 / 1e12:.1f} TFLOP" in done.stdout
    verdict, _, _ = done.stdout.splitlines()[-1].partition(";")
    assert verdict in README


def test_the_table_is_the_one_printed():
    shapes = {"embed": (4096, 256), "blocks": {"wq": (4, 256, 8, 32), "scale": (4, 256)}}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    rules = grpo_mesh.Rules(
        [("embed", ("tp", "fsdp")), (".*/wq", (None, "fsdp", "tp")), (".*/scale", ())],
    )
    table = grpo_mesh.explain(params, jax.sharding.AbstractMesh((1, 4, 2), grpo_mesh.AXES), rules)
    assert str(table) in README


@pytest.mark.parametrize("module", [grpo_mesh, grpo_mesh.preflight])
def test_every_public_name_is_documented(module):
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        item = getattr(module, name)
        assert not callable(item) or item.__doc__, name
