"""What the READMEs of the repository, the trainer and GSM8K tell a stranger to type exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "apps/trainer/README.md", "apps/gsm8k/README.md", "tools/BENCHMARKS.md")
PLAIN = {"python", "which"}  # programs, rather than scripts of an environment


def scripts(environments: dict[str, Any], name: str) -> set[str]:
    """The scripts of a hatch environment, with those of its template."""
    environment = environments[name]
    keys = {key.removeprefix("scripts.") for key in environment if key.startswith("scripts.")}
    above = environment.get("template", "default")
    return keys | set(environment.get("scripts", {})) | (scripts(environments, above) if above != name else set())


@pytest.mark.parametrize("page", PAGES)
def test_every_hatch_command_exists(page: str) -> None:
    environments = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]
    commands = re.findall(r"hatch run ([\w/.-]+):([\w-]+)", (ROOT / page).read_text())
    assert commands
    for environment, script in commands:
        assert script in scripts(environments, environment) | PLAIN, f"{environment}:{script}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    file = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
        assert (file.parent / target).exists(), target


def test_the_examples_run() -> None:
    reward, gradient = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(reward, names)
    graded = names["short_and_right"](prompts=["2 + 2?"], completions=["It is 4"], answers=["#### 4"], step=0)
    assert graded == pytest.approx([1 - 0.007])
    exec(gradient, names)
    counted_BT = names["mask_BT"]
    assert (abs(names["gradient_BT"]) > 0).tolist() == counted_BT.tolist()
