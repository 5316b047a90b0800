"""Public names are frozen: adding one is a decision, losing one is a break.

After adding a name: `hatch run release:names --write`. Losing one needs a minor bump before 1.0, a major one after.
"""

from __future__ import annotations

import importlib

import pytest
from tools.release.surface import public_names
from tools.release.workspace import ROOT, Package, read_workspace

FROZEN = ROOT / "tests" / "public_names"


@pytest.mark.parametrize("package", read_workspace(ROOT).libraries, ids=lambda package: package.name)
def test_public_names_are_those_frozen(package: Package) -> None:
    assert public_names(package.sources, package.module) == (FROZEN / f"{package.module}.txt").read_text().split()


@pytest.mark.parametrize("package", read_workspace(ROOT).libraries, ids=lambda package: package.name)
def test_frozen_names_can_be_imported_and_are_documented(package: Package) -> None:
    module = importlib.import_module(package.module)
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert value.__doc__, f"{package.module}.{name} has no docstring"
