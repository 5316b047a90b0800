import re
from pathlib import Path

import jax
import jax.numpy as jnp

import grpo_mesh

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs(capsys):
    example = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert len([line for line in example.splitlines() if line]) <= 12
    exec(compile(example, "README.md", "exec"), {})
    assert "blocks/wq" in capsys.readouterr().out


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


def test_every_public_name_is_documented():
    assert sorted(grpo_mesh.__all__) == sorted(set(grpo_mesh.__all__))
    for name in grpo_mesh.__all__:
        item = getattr(grpo_mesh, name)
        assert not callable(item) or item.__doc__, name
