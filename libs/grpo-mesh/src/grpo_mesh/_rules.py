"""Sharding rules: a regular expression on the parameter's path, the axes of its dimensions, first match wins."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from grpo_mesh._errors import MeshError

AnyMesh = Mesh | AbstractMesh
Names = str | tuple[str, ...] | None
_ORDER = "The order is (tree, mesh, rules)."
# Elements of a leaf of optimizer state that may be replicated although it belongs to no parameter and no rule says so.
_SMALL = 1024


@dataclasses.dataclass(frozen=True)
class Rules:
    """Ordered rules from parameter paths to axes.

    Args:
        rules: pairs (pattern, axes). The pattern must match the whole path, keys joined by "/" ("layers/q",
            "layers/(q|k|v)", ".*/kernel"). The axes have one entry per dimension (missing ones: replicated): a mesh
            axis, a logical axis name, a tuple of these, or None. A `PartitionSpec` works too.
        axes: logical axis name to mesh axis, tuple of mesh axes, or None (replicated).
        pad: logical axes that `pad` may enlarge with zeros to make them divide (the vocabulary).

    Raises:
        MeshError: a pattern is not a regular expression, or `pad` names something else than logical axes.
    """

    rules: Sequence[tuple[str, Sequence[Names] | PartitionSpec]]
    axes: Mapping[str, Names] = dataclasses.field(default_factory=dict)
    pad: Sequence[str] = ()

    def __post_init__(self) -> None:
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise MeshError(f"rule {pattern!r} must be a regular expression: {error}.") from error
        if strange := sorted(set(self.pad) - set(self.axes)):
            raise MeshError(f"pad must name logical axes of `axes` ({', '.join(self.axes)}): got {', '.join(strange)}.")

    def match(self, path: str, rank: int) -> tuple[Names, ...]:
        """Finds the axes of a leaf, one entry per dimension, as the rule names them.

        Args:
            path: of the leaf, keys joined by "/".
            rank: its number of dimensions; a scalar needs no rule.

        Raises:
            MeshError: no rule matches, or the rule that does has more entries than the leaf has dimensions.
        """
        if rank == 0:
            return ()
        for pattern, entries in self.rules:
            if re.fullmatch(pattern, path):
                if len(entries) > rank:
                    raise MeshError(
                        f"{path!r} has {rank} dimensions but rule {pattern!r} names {len(entries)}: {tuple(entries)}. "
                        "Narrow the pattern, or put a rule for this leaf before it."
                    )
                return tuple(entries) + (None,) * (rank - len(entries))
        near = [pattern for pattern, _ in self.rules if re.search(pattern, path)]
        hint = f" ({near[0]!r} matches a part of it; patterns must match the whole path)" if near else ""
        raise MeshError(f"no rule matches {path!r}{hint}. Add one; ('{path}', ()) replicates it.")

    def resolve(self, path: str, entry: Names, mesh: AnyMesh) -> tuple[str, ...]:
        """Returns the mesh axes behind one entry of a rule.

        Raises:
            MeshError: the entry names neither a mesh axis nor a logical axis.
        """
        names: list[str] = []
        for name in (entry,) if isinstance(entry, str) else entry or ():
            if name in self.axes:
                target = self.axes[name]
                names += (target,) if isinstance(target, str) else target or ()
            else:
                names.append(name)
        for name in names:
            if name not in mesh.axis_names:
                raise MeshError(
                    f"{path!r}: axis {name!r} is neither a mesh axis ({', '.join(mesh.axis_names)}) "
                    f"nor a logical axis ({', '.join(self.axes) or 'none given'})."
                )
        return tuple(names)


def shardings(tree: Any, mesh: AnyMesh, rules: Rules) -> Any:
    """Gives every leaf its sharding.

    Args:
        tree: pytree of arrays or `jax.ShapeDtypeStruct`.
        mesh: mesh to shard over.
        rules: see `Rules`.

    Returns:
        A pytree of the same structure with `NamedSharding` leaves.

    Raises:
        MeshError: a leaf without a rule, with an unknown or repeated axis, or with a dimension that does not divide;
            the message names the leaf and the nearest fix.
    """
    check_mesh(mesh, rules)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf_sharding(path_name(path), leaf, mesh, rules), tree)


def state_shardings(state: Any, params: Any, mesh: AnyMesh, rules: Rules) -> Any:
    """Gives optimizer state the shardings of the parameters it belongs to.

    A leaf belongs to the parameter whose path ends its own path (".../mu/layers/q"). With the parameter's shape it has
    the parameter's sharding. With one dimension less, as in Adafactor, it keeps the sharding of the others, or is
    replicated where the sizes do not tell which dimension is missing. Any other leaf of up to 1,024 elements is
    replicated. A larger one must match a rule with its own path.

    Args:
        state: optimizer state (arrays or `jax.ShapeDtypeStruct`), e.g. `jax.eval_shape(optimizer.init, params)`.
        params: the parameters it was made for.
        mesh: mesh to shard over.
        rules: the parameters' rules.

    Returns:
        A pytree shaped like `state` with `NamedSharding` leaves.

    Raises:
        MeshError: as `shardings`.
    """
    check_mesh(mesh, rules)
    owners = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = path_name(path)
        check_array(name, leaf)
        shape = tuple(leaf.shape)
        keys = [path_name((key,)) for key in path]
        suffixes = ["/".join(keys[start:]) for start in range(len(keys) + 1)]  # the longest first
        owned = [suffix for suffix in suffixes if suffix in owners]
        for owner in owned:
            if tuple(owners[owner].shape) == shape:
                return _leaf_sharding(owner, leaf, mesh, rules)
        for owner in owned[:1]:
            specs = _specs_without_one(_leaf_sharding(owner, owners[owner], mesh, rules), owners[owner].shape, shape)
            if specs:
                return NamedSharding(mesh, specs.pop() if len(specs) == 1 else PartitionSpec())
        if math.prod(shape) <= _SMALL:
            return NamedSharding(mesh, PartitionSpec())
        return _leaf_sharding(name, leaf, mesh, rules)

    return jax.tree_util.tree_map_with_path(place, state)


def _specs_without_one(sharding: NamedSharding, sizes: tuple[int, ...], shape: tuple[int, ...]) -> set[PartitionSpec]:
    """The specs that remain when one of the dimensions is dropped, for every dimension that leaves this shape."""
    entries = tuple(sharding.spec) + (None,) * (len(sizes) - len(sharding.spec))
    return {
        _trimmed([*entries[:dimension], *entries[dimension + 1 :]])
        for dimension in range(len(sizes))
        if (*sizes[:dimension], *sizes[dimension + 1 :]) == shape
    }


def path_name(path: Sequence[Any]) -> str:
    """Returns the keys of a pytree path joined by "/"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def shard_count(mesh: AnyMesh, names: Sequence[str]) -> int:
    """Returns the number of shards that a dimension over these mesh axes has."""
    return math.prod(mesh.shape[name] for name in names)


def check_mesh(mesh: Any, rules: Any) -> None:
    """Refuses arguments in another order.

    Raises:
        MeshError: `mesh` is not a mesh, or `rules` are not `Rules`.
    """
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise MeshError(f"mesh must be a jax.sharding.Mesh (see `make_mesh`): got {type(mesh).__name__}. {_ORDER}")
    if not isinstance(rules, Rules):
        raise MeshError(f"rules must be grpo_mesh.Rules: got {type(rules).__name__}. {_ORDER}")


def check_array(path: str, leaf: Any) -> None:
    """Refuses a leaf without a shape.

    Raises:
        MeshError: names the leaf.
    """
    if not hasattr(leaf, "shape"):
        raise MeshError(f"{path!r} must be an array or a ShapeDtypeStruct: got {type(leaf).__name__}.")


def _leaf_sharding(path: str, leaf: Any, mesh: AnyMesh, rules: Rules) -> NamedSharding:
    check_array(path, leaf)
    entries = rules.match(path, len(leaf.shape))
    resolved = [rules.resolve(path, entry, mesh) for entry in entries]
    used = [name for names in resolved for name in names]
    if twice := sorted({name for name in used if used.count(name) > 1}):
        raise MeshError(f"{path!r}: mesh axis {', '.join(twice)} shards two dimensions: {tuple(entries)}. Drop one.")
    for dimension, (size, entry, names) in enumerate(zip(leaf.shape, entries, resolved)):
        if size % shard_count(mesh, names):
            raise MeshError(_indivisible(path, leaf.shape, dimension, entry, names, mesh, rules))
    return NamedSharding(mesh, _trimmed([names[0] if len(names) == 1 else names or None for names in resolved]))


def _trimmed(entries: list[Any]) -> PartitionSpec:
    # Compiled programs return specs without trailing Nones; writing ours the same way saves a recompilation.
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return PartitionSpec(*entries)


def _indivisible(path: str, shape: Any, dimension: int, entry: Names, names: Any, mesh: AnyMesh, rules: Rules) -> str:
    size, shards = shape[dimension], shard_count(mesh, names)
    fitting = max(n for n in range(1, shards + 1) if size % n == 0)
    padded = size + -size % shards
    if may_pad(entry, rules):
        fix = f"Call `pad(tree, mesh, rules)` first: {size} becomes {padded}."
    else:
        smaller = f"let {'·'.join(names)} be {fitting}, " if fitting > 1 else ""
        fix = f"Nearest fix: {smaller}pad the dimension to {padded}, or give this dimension None in its rule."
    return (
        f"{path!r}: dimension {dimension} of {tuple(shape)} must divide by {'·'.join(names)} = {shards}: "
        f"{size} / {shards} = {size / shards:g}. {fix}"
    )


def may_pad(entry: Names, rules: Rules) -> bool:
    """Tells whether the rules allow this entry's dimension to be padded."""
    return any(name in rules.pad for name in ((entry,) if isinstance(entry, str) else entry or ()))
