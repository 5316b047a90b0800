"""The arrows of the design: which package may import which."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ALLOWED = {
    "libs/grpo-contracts": {"numpy"},
    "libs/grpo-mesh": {"grpo_contracts", "jax", "jaxtyping", "numpy"},
    "libs/grpo-sampler": {"flax", "grpo_contracts", "jax", "jaxtyping", "ml_dtypes", "numpy", "safetensors"},
    "libs/grpo-loss": {"grpo_contracts", "jax", "jaxtyping", "numpy", "optax"},
}
# Modules whose import is optional: they sit behind an extra and are imported where they are used.
OPTIONAL = {
    "libs/grpo-contracts": {"jax"},
    "libs/grpo-sampler": {"huggingface_hub", "torch", "transformers"},
    "libs/grpo-mesh": {"libtpu"},
    "libs/grpo-loss": set(),
}


def _imports(path: Path) -> set[str]:
    """Top-level names of everything a module imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("library", sorted(ALLOWED))
def test_a_library_imports_only_what_its_arrows_allow(library: str) -> None:
    package = library.removeprefix("libs/").replace("-", "_")
    sources = sorted((ROOT / library / "src" / package).rglob("*.py"))
    assert sources
    allowed = ALLOWED[library] | OPTIONAL[library] | {package} | set(sys.stdlib_module_names)
    for source in sources:
        assert _imports(source) <= allowed, source


@pytest.mark.parametrize("library", sorted(ALLOWED))
def test_the_tests_of_a_library_do_not_lean_on_its_sisters(library: str) -> None:
    package = library.removeprefix("libs/").replace("-", "_")
    sisters = {name.removeprefix("libs/").replace("-", "_") for name in ALLOWED} - {package, "grpo_contracts"}
    for source in sorted((ROOT / library / "tests").glob("*.py")):
        assert not _imports(source) & sisters, source


@pytest.mark.parametrize("library", sorted(ALLOWED))
def test_init_only_re_exports(library: str) -> None:
    package = library.removeprefix("libs/").replace("-", "_")
    tree = ast.parse((ROOT / library / "src" / package / "__init__.py").read_text())
    for node in tree.body:
        documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        listing = isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__all__"]
        assert documentation or listing or isinstance(node, ast.ImportFrom), ast.unparse(node)


def test_the_app_pins_every_library_exactly() -> None:
    app = tomllib.loads((ROOT / "apps/gsm8k/pyproject.toml").read_text())["project"]
    versions = {
        project["name"]: project["version"]
        for library in ALLOWED
        for project in [tomllib.loads((ROOT / library / "pyproject.toml").read_text())["project"]]
    }
    pins = dict(line.split("==") for line in app["dependencies"] if line.startswith("grpo-"))
    assert pins == versions
