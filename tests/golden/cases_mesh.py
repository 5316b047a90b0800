"""What grpo-mesh decides: sizes of axes, shardings by rule, padding, digests, slices. No device is asked."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from golden_numbers import integers, wave
from jax.sharding import AbstractMesh

import grpo_mesh as gm

_RULES = gm.Rules(
    (
        ("embed|unembed", ("vocab", "embed")),
        (r"layers/(q|k|v)", (None, "embed", "heads")),
        (r"layers/down", (None, "mlp", "embed")),
        (".*norm", ()),
    ),
    axes={"vocab": "tp", "embed": "fsdp", "heads": "tp", "mlp": "tp"},
    pad=("vocab",),
)
_SHAPES = {
    "embed": (33, 16),
    "final_norm": (16,),
    "layers": {"q": (2, 16, 4, 8), "down": (2, 32, 16), "attn_norm": (2, 16)},
}


def _topology() -> dict[str, Any]:
    cases: dict[str, Any] = {"axes": gm.AXES, "batch axes": gm.BATCH_AXES}
    for spec, devices, slices in (
        ("auto", 8, 1),
        ("auto", 8, 2),
        ("dp:1,fsdp:-1,tp:2", 8, 1),
        ("2,-1,1", 8, 1),
        ("tp:4,dp:-1", 16, 2),
    ):
        cases[f"parse_mesh {spec} on {devices} in {slices}"] = repr(gm.parse_mesh(spec, devices, slices))
    for name in ("v4-8", "v5e-8", "v5e-16", "v5p-32", "v6e-64"):
        found = gm.find_slice(name)
        cases[f"find_slice {name}"] = np.array(
            [found.topology, str(found.chips), str(found.hosts), str(found.chips_per_host)]
        )
        cases[f"chip of {name}"] = np.array([found.chip.hbm_bytes, found.chip.flops], np.float64)
    return cases


def _sharded() -> dict[str, Any]:
    mesh = AbstractMesh((1, 4, 2), gm.AXES)
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32), _SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )
    padded = gm.pad(tree, mesh, _RULES)
    cases: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(padded):
        cases[f"pad {jax.tree_util.keystr(path)}"] = leaf.shape
    for path, sharding in jax.tree_util.tree_leaves_with_path(gm.shardings(padded, mesh, _RULES)):
        cases[f"shardings {jax.tree_util.keystr(path)}"] = repr(tuple(sharding.spec))
    moments = {"mu": padded, "count": jax.ShapeDtypeStruct((), np.int32)}
    for path, sharding in jax.tree_util.tree_leaves_with_path(gm.state_shardings(moments, padded, mesh, _RULES)):
        cases[f"state_shardings {jax.tree_util.keystr(path)}"] = repr(tuple(sharding.spec))
    return cases


def _digests() -> dict[str, Any]:
    """A digest is kept in rollouts and checkpoints: the same parameters must have the same name in later versions."""
    return {
        "digest": gm.digest({"embed": wave(3, 4), "layers": {"q": integers(2, 5, below=100)}}),
        "digest of bfloat16": gm.digest({"x": jax.numpy.asarray(wave(7), jax.numpy.bfloat16)}),
        "digest of nothing": gm.digest({}),
    }


PARTS = {"topology": _topology, "shardings": _sharded, "digests": _digests}
