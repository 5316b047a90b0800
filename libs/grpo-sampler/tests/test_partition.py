"""The partition rules cover every parameter of every family."""

import re

import jax
import pytest

from grpo_sampler import PADDED_AXES, PARTITION_AXES, PARTITION_RULES, LoRA, ModelConfig, abstract

CONFIGS = [
    ModelConfig("qwen2", 64, 32, 48, 2, 4, 2, 8, qkv_bias=True, tied=True),
    ModelConfig("qwen3", 64, 32, 48, 2, 4, 2, 8, qk_norm=True),
    ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8),
    ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, lora=LoRA(3, 3.0)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family + ("-lora" if config.lora else ""))
def test_one_rule_fits_each_parameter(config):
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config)[1]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        [axes] = [axes for pattern, axes in PARTITION_RULES if re.fullmatch(pattern, name)]
        assert len(axes) == leaf.ndim, name
        # An axis is named only where its dimension has that size: 64 tokens, width 32, 4 and 2 heads, MLP 48.
        sizes = {"vocabulary": 64, "width": 32, "heads": 4, "kv_heads": 2, "mlp": 48}
        assert all(axis is None or sizes[axis] == size for axis, size in zip(axes, leaf.shape)), name
        mesh_axes = [PARTITION_AXES[axis] for axis in axes if axis]
        assert len(set(mesh_axes)) == len(mesh_axes), name


def test_every_rule_is_used_and_every_axis_has_a_mesh_axis():
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for config in CONFIGS
        for path, _ in jax.tree_util.tree_leaves_with_path(abstract(config)[1])
    }
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern, _ in PARTITION_RULES)
    assert {axis for _, axes in PARTITION_RULES for axis in axes if axis} == set(PARTITION_AXES)
    assert set(PADDED_AXES) <= set(PARTITION_AXES)
