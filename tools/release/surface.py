"""The public surface of a library, read without importing it, and what changed between two trees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import griffe

from .workspace import ReleaseError


@dataclass(frozen=True)
class Change:
    """What changed in a public surface.

    Args:
        breaking: changes that may break code written against the old tree, one sentence each.
        added: new public names.
    """

    breaking: tuple[str, ...]
    added: tuple[str, ...]


def public_names(sources: Path, module: str) -> list[str]:
    """The public names of a library: `__all__` of the package and of each public submodule that has one.

    Args:
        sources: folder on the import path.
        module: the package.

    Returns:
        Sorted; names of a submodule with the submodule in front: `jax.register`.

    Raises:
        ReleaseError: there is no such package, or it has no `__all__`.
    """
    package = _read(sources, module)
    if package.exports is None:
        raise ReleaseError(f"{module}/__init__.py must have __all__, the list of its public names.")
    return sorted(_exported(package, ""))


def compare(old: Path, new: Path, module: str) -> Change:
    """Compare a library's public surface in two trees.

    griffe finds what was removed, moved, renamed or given another default. Annotations, which carry the shapes of
    arrays, are compared here.

    Args:
        old, new: source folders.
        module: the package.
    """
    before, after = _read(old, module), _read(new, module)
    breaking = [_describe(breakage, module) for breakage in griffe.find_breaking_changes(before, after)]
    names_before, names_after = set(_exported(before, "")), set(_exported(after, ""))
    breaking += [f"{name}: left __all__" for name in sorted(names_before - names_after)]
    for name in sorted(names_before & names_after):
        breaking += _retyped(name, before[name], after[name])
    return Change(tuple(dict.fromkeys(breaking)), tuple(sorted(names_after - names_before)))


def _read(sources: Path, module: str) -> griffe.Module:
    if not (sources / module / "__init__.py").exists():
        raise ReleaseError(f"{sources} must hold the package {module}.")
    loaded = griffe.load(
        module, search_paths=[str(sources)], allow_inspection=False, try_relative_path=False, resolve_aliases=True
    )
    if not isinstance(loaded, griffe.Module):
        raise ReleaseError(f"{module} must be a package: griffe read a {type(loaded).__name__}.")
    return loaded


def _exported(module: griffe.Module, prefix: str) -> Iterator[str]:
    for export in module.exports or ():
        yield f"{prefix}{export if isinstance(export, str) else export.name}"
    for name, submodule in module.modules.items():
        if not name.startswith("_"):
            yield f"{prefix}{name}"
            yield from _exported(submodule, f"{prefix}{name}.")


def _describe(breakage: griffe.Breakage, module: str) -> str:
    path = breakage.obj.path.removeprefix(f"{module}.").split(".")
    name = ".".join(part for part in path if not part.startswith("_") or part in ("__init__", "__call__"))
    before, after = breakage.old_value, breakage.new_value
    parameter = before if isinstance(before, griffe.Parameter) else after
    if isinstance(parameter, griffe.Parameter):
        name = f"{name}({parameter.name})"
    description = f"{name}: {breakage.kind.value.lower()}"
    if breakage.kind == griffe.BreakageKind.PARAMETER_CHANGED_DEFAULT:
        description += f" ({before.default} -> {after.default})"
    return description


def _retyped(name: str, before: Any, after: Any) -> Iterator[str]:
    """Find annotations that narrowed for an argument, or widened for a result.

    Both are griffe's objects, or aliases of one, which its types cannot express.
    """
    if after.kind != before.kind:
        if after.kind == griffe.Kind.ALIAS:  # imported and in __all__, but no longer defined where it is imported from
            yield f"{name}: is not defined"
        return
    if before.is_function:
        old_parameters = {parameter.name: parameter for parameter in before.parameters}
        for parameter in after.parameters:
            old = old_parameters.get(parameter.name)
            if old is not None and not _members(old.annotation) <= _members(parameter.annotation):
                yield f"{name}({parameter.name}): {old.annotation} became {parameter.annotation}"
        if not _members(after.returns) <= _members(before.returns):
            yield f"{name}: returned {before.returns}, returns {after.returns}"
    elif before.is_attribute:
        if _members(before.annotation) != _members(after.annotation):
            yield f"{name}: {before.annotation} became {after.annotation}"
    elif before.is_class:
        for member, old in before.all_members.items():
            public = member in ("__init__", "__call__") or not member.startswith("_")
            if public and member in after.all_members:
                yield from _retyped(f"{name}.{member}", old, after.all_members[member])


def _members(annotation: object) -> set[str]:
    """The alternatives of a union; a missing annotation has one, the empty text."""
    alternatives, depth, start = set[str](), 0, 0
    text = "" if annotation is None else str(annotation)
    for place, letter in enumerate(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "|" and not depth:
            alternatives.add(text[start:place].strip())
            start = place + 1
    return alternatives | {text[start:].strip()}
