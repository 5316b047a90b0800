"""The arrows of the design, and the sizes that it promises."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = ["libs/grpo-contracts", "libs/grpo-loss", "libs/grpo-mesh", "libs/grpo-sampler"]
TRAINER = "apps/trainer"
APPS = sorted({f"apps/{path.parent.name}" for path in ROOT.glob("apps/*/pyproject.toml")} - {TRAINER})
PACKAGES = [*LIBRARIES, TRAINER, *APPS]

# Our own packages that each may import.
ARROWS = {
    "libs/grpo-contracts": set(),
    "libs/grpo-loss": {"grpo_contracts"},
    "libs/grpo-mesh": {"grpo_contracts"},
    "libs/grpo-sampler": {"grpo_contracts"},
    "apps/trainer": {"grpo_contracts", "grpo_loss", "grpo_mesh", "grpo_sampler"},
    **{app: {"grpo_contracts", "grpo_trainer"} for app in APPS},
}
# Third parties of those that others install. An app may import what it declares.
THIRD_PARTIES = {
    "libs/grpo-contracts": {"numpy"},
    "libs/grpo-loss": {"jax", "jaxtyping", "numpy", "optax"},
    "libs/grpo-mesh": {"jax", "jaxtyping", "numpy"},
    "libs/grpo-sampler": {"flax", "jax", "jaxtyping", "numpy", "safetensors"},
    "apps/trainer": {
        *("flax", "grain", "huggingface-hub", "jax", "jaxtyping", "jinja2", "markupsafe", "numpy", "optax"),
        *("orbax-checkpoint", "pyarrow", "pydantic", "pyyaml", "rich", "tensorboardX", "tokenizers", "transformers"),
    },
}
# Declared in an extra, and imported only where it is used.
OPTIONAL = {
    "libs/grpo-contracts": {"jax"},
    "libs/grpo-mesh": {"libtpu"},
    "libs/grpo-sampler": {"huggingface-hub", "torch", "transformers"},
    "apps/trainer": {"wandb"},
    "apps/gsm8k": {"math-verify"},
}
# Distributions whose import name is another. jax brings ml_dtypes.
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "math_verify": "math-verify",
    "ml_dtypes": "jax",
    "orbax": "orbax-checkpoint",
    "yaml": "pyyaml",
}
# Lines of Python outside the embedded demo or the warm start: (limit, what is left out).
APP_LINES = {"apps/gsm8k": (400, "embedded"), "apps/countdown": (250, "warmstart")}
# Folders and modules on one floor of the trainer. The top floor is as DESIGN.md lists it.
TOP_ROOMS, ROOMS = 11, 9


def project(folder: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]


def dependencies(folder: str) -> dict[str, str]:
    """What a package declares: version specifiers by distribution."""
    found = (re.fullmatch(r"([\w-]+)(.*)", line) for line in project(folder)["dependencies"])
    return {match[1]: match[2] for match in found if match}


def module(folder: str) -> str:
    return project(folder)["name"].replace("-", "_")


def sources(folder: str, pattern: str = "*.py") -> list[Path]:
    found = [path for path in (ROOT / folder / "src").rglob(pattern) if path.is_file() and path.suffix != ".pyc"]
    assert found
    return sorted(found)


def imports(path: Path, *, typing: bool = True) -> set[str]:
    """Top-level names of everything a module imports, wherever in the file, without the standard library.

    Args:
        path: of the module.
        typing: include what only type checkers import.
    """
    nodes = list(ast.walk(ast.parse(path.read_text())))
    unread = [n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING" and not typing]
    left_out = {id(node) for block in unread for node in ast.walk(block)}
    names: set[str] = set()
    for node in (node for node in nodes if id(node) not in left_out):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


def ours(names: Iterable[str]) -> set[str]:
    return {module(folder) for folder in PACKAGES} & set(names)


@pytest.mark.parametrize("folder", PACKAGES)
def test_a_package_imports_only_what_its_arrows_allow(folder: str) -> None:
    for source in sources(folder):
        assert ours(imports(source)) <= ARROWS[folder] | {module(folder)}, source


@pytest.mark.parametrize("folder", PACKAGES)
def test_a_package_declares_what_it_imports_and_nothing_else(folder: str) -> None:
    imported = {name for source in sources(folder) for name in imports(source, typing=False)}
    needed = {DISTRIBUTIONS.get(name, name) for name in imported - ours(imported)} - OPTIONAL.get(folder, set())
    declared = {name for name in dependencies(folder) if not name.startswith("grpo-")}
    assert declared == needed
    assert declared == THIRD_PARTIES.get(folder, declared)
    assert {name.replace("_", "-") for name in ours(imported)} - {project(folder)["name"]} <= dependencies(
        folder
    ).keys()


@pytest.mark.parametrize("folder", LIBRARIES)
def test_the_tests_of_a_library_do_not_use_its_sisters(folder: str) -> None:
    for source in sorted((ROOT / folder / "tests").glob("*.py")):
        assert ours(imports(source)) <= {"grpo_contracts", module(folder)}, source


@pytest.mark.parametrize("folder", PACKAGES)
def test_init_only_re_exports(folder: str) -> None:
    for source in sources(folder, "__init__.py"):
        for node in ast.parse(source.read_text()).body:
            documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            listing = [getattr(target, "id", "") for target in targets] == ["__all__"]
            assert documentation or listing or isinstance(node, ast.ImportFrom), f"{source}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", [TRAINER, *APPS])
def test_the_trainer_and_the_apps_pin_everything_below_them_exactly(folder: str) -> None:
    below = LIBRARIES if folder == TRAINER else [*LIBRARIES, TRAINER]
    pins = {name: version for name, version in dependencies(folder).items() if name.startswith("grpo-")}
    assert pins == {project(sister)["name"]: f"=={project(sister)['version']}" for sister in below}


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        (TRAINER, [path.removeprefix("apps/") for path in APPS]),
        ("libs/grpo-mesh", ["grpo-sampler", "grpo_sampler", "grpo-loss", "grpo_loss"]),
    ],
    ids=["trainer", "mesh"],
)
def test_nothing_names_what_its_arrows_do_not_reach(folder: str, names: list[str]) -> None:
    for path in sources(folder, "*"):
        text = f"{path.relative_to(ROOT)}\n{path.read_bytes().decode(errors='replace')}".lower()
        assert not [name for name in names if name in text], path


@pytest.mark.parametrize("folder", [folder for folder in APP_LINES if folder in APPS])
def test_an_app_is_thin(folder: str) -> None:
    limit, left_out = APP_LINES[folder]
    counted = [path for path in sources(folder) if not any(part.startswith(left_out) for part in path.parts)]
    assert sum(len(path.read_text().splitlines()) for path in counted) <= limit


def test_a_floor_of_the_trainer_has_few_rooms() -> None:
    house = ROOT / TRAINER / "src" / module(TRAINER)
    crowded = {}
    for floor in {path.parent for path in sources(TRAINER)}:
        modules = [path.stem for path in floor.glob("*.py") if path.stem != "__init__"]
        rooms = modules + [path.name for path in floor.iterdir() if path.is_dir() and any(path.glob("*.py"))]
        if len(rooms) > (TOP_ROOMS if floor == house else ROOMS):
            crowded[str(floor.relative_to(house))] = sorted(rooms)
    assert not crowded
