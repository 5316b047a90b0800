"""Padding dimensions that do not divide, where the rules allow it: usually the vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from grpo_mesh._errors import MeshError
from grpo_mesh._rules import AnyMesh, Rules, check_array, check_mesh, may_pad, path_name, shard_count


def pad(tree: Any, mesh: AnyMesh, rules: Rules) -> Any:
    """Enlarges the dimensions named by `rules.pad` with zeros until they divide over their mesh axes.

    Rows added to a vocabulary have logit 0, not -inf: mask them before a softmax.

    Args:
        tree: pytree of arrays or `jax.ShapeDtypeStruct`.
        mesh: mesh the tree will be sharded over.
        rules: see `Rules`.

    Returns:
        The tree with padded leaves; leaves that divide are returned as they are.

    Raises:
        MeshError: a leaf without a rule or with an unknown axis.
    """

    check_mesh(mesh, rules)

    def enlarge(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        check_array(name, leaf)
        shape = list(leaf.shape)
        for dimension, entry in enumerate(rules.match(name, len(shape))):
            if may_pad(entry, rules):
                shape[dimension] += -shape[dimension] % shard_count(mesh, rules.resolve(name, entry, mesh))
        if tuple(shape) == tuple(leaf.shape):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
        return jnp.pad(leaf, [(0, new - old) for new, old in zip(shape, leaf.shape)])

    return jax.tree_util.tree_map_with_path(enlarge, tree)


def unpad(tree: Any, like: Any) -> Any:
    """Cuts a padded tree back.

    Args:
        tree: what `pad` returned, or a tree of the same structure, such as an update of it.
        like: the tree before padding, or its shapes.

    Returns:
        The tree with the shapes of `like`.

    Raises:
        MeshError: a leaf is smaller than its counterpart.
    """

    def cut(path: Any, leaf: Any, target: Any) -> Any:
        if len(leaf.shape) != len(target.shape) or any(a < b for a, b in zip(leaf.shape, target.shape)):
            raise MeshError(f"{path_name(path)!r}: {leaf.shape} cannot be cut to {target.shape}. Pass the padded tree.")
        return leaf if leaf.shape == target.shape else leaf[tuple(slice(size) for size in target.shape)]

    return jax.tree_util.tree_map_with_path(cut, tree, like)
