"""The release tools find and name a deliberate break of each kind in each library."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.version import Version
from tools.release.meaning import GOLDEN, changed_meanings
from tools.release.surface import Change, compare
from tools.release.verdict import Level, Verdict
from tools.release.workspace import ROOT, read_workspace

from deliberate_breaks import BREAKS, Break, break_tree, copy_libraries


def surface_of(broken: Break, tree: Path) -> Change:
    package = read_workspace(ROOT)[broken.library]
    return compare(package.sources, read_workspace(tree)[broken.library].sources, package.module)


def test_every_library_is_broken_in_every_way() -> None:
    ways = {"renamed keyword", "changed shape", "changed meaning"}
    expected = {(library.name, way) for library in read_workspace(ROOT).libraries for way in ways}
    assert {(broken.library, broken.what) for broken in BREAKS} == expected


@pytest.mark.parametrize("broken", BREAKS, ids=str)
def test_a_deliberate_break_is_found(broken: Break, tmp_path: Path) -> None:
    tree = copy_libraries(tmp_path)
    break_tree(tree, broken)
    change = surface_of(broken, tree)
    if broken.part is None:
        found = list(change.breaking)
    else:
        assert not change.breaking, "this break must not change a signature"
        found = changed_meanings(ROOT / GOLDEN, broken.library, tree=tree, part=broken.part)
    assert any(broken.finding in text for text in found), found
    demanded = Verdict(change.breaking, tuple(found), change.added)
    assert demanded.demands(Version("0.1.0")) == Level.MINOR
    assert demanded.demands(Version("1.4.2")) == Level.MAJOR


@pytest.mark.parametrize("library", [library.name for library in read_workspace(ROOT).libraries])
def test_an_unbroken_copy_has_no_changes(library: str, tmp_path: Path) -> None:
    package, tree = read_workspace(ROOT)[library], read_workspace(copy_libraries(tmp_path))
    assert compare(package.sources, tree[library].sources, package.module) == Change((), ())


BEFORE = """
from ._inside import Box, area, scale
__all__ = ["Box", "area", "scale"]
"""
INSIDE = '''
from dataclasses import dataclass
from jaxtyping import Array, Float

@dataclass(frozen=True)
class Box:
    """A box."""
    sides_N: Float[Array, "N"]
    name: str | None = None

    def _hidden(self, x: int) -> int: ...

def area(x_N: Float[Array, "N"], *, power: int = 2) -> Float[Array, ""]: ...

def scale(x: int | str) -> int | None: ...
'''
CHANGES = {
    "nothing": ((), None),
    "a private signature": ((("def _hidden(self, x: int)", "def _hidden(self, y: str)"),), None),
    "a wider argument": ((("def scale(x: int | str)", "def scale(x: int | float | str)"),), None),
    "a narrower result": ((("-> int | None", "-> int"),), None),
    "an optional keyword more": ((("power: int = 2)", "power: int = 2, axis: int = 0)"),), None),
    "a narrower argument": ((("def scale(x: int | str)", "def scale(x: int)"),), "scale(x): int | str became int"),
    "a wider result": ((("-> int | None", "-> int | str | None"),), "scale: returned int | None"),
    "another shape of an argument": ((('x_N: Float[Array, "N"]', 'x_N: Float[Array, "N 1"]'),), "area(x_N)"),
    "another shape of a result": ((('-> Float[Array, ""]', '-> Float[Array, "1"]'),), "area: returned"),
    "another shape of a field": ((('sides_N: Float[Array, "N"]', 'sides_N: Float[Array, "2 N"]'),), "Box.sides_N"),
    "another default": ((("power: int = 2", "power: int = 3"),), "area(power)"),
    "a default less": ((("power: int = 2", "power: int"),), "area(power)"),
    "a required keyword more": ((("power: int = 2)", "power: int = 2, axis: int)"),), "area(axis)"),
    "a keyword less": (((", *, power: int = 2", ""),), "area(power)"),
    "a field less": ((("    name: str | None = None\n", ""),), "Box.name"),
    "a function less": ((("def scale", "def rescale"),), "scale"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_breaks_a_signature_and_what_does_not(name: str, tmp_path: Path) -> None:
    edits, finding = CHANGES[name]
    text = INSIDE
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    for folder, inside in (("old", INSIDE), ("new", text)):
        package = tmp_path / folder / "toy"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(BEFORE)
        (package / "_inside.py").write_text(inside)
    breaking = compare(tmp_path / "old", tmp_path / "new", "toy").breaking
    if finding is None:
        assert not breaking
    else:
        assert any(finding in text for text in breaking), breaking
