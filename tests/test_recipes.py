"""The README's table from papers to YAML: every row loads, means what it says, and builds the loss it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_gsm8k.task import TASK
from grpo_trainer.assemble.objective import make_policy_loss
from grpo_trainer.settings import layers
from grpo_trainer.settings.schema import Settings

README = Path(__file__).parents[1] / "README.md"
PAPERS = (
    "GRPO", "DAPO", "Dr.GRPO", "RLOO", "GSPO", "CISPO", "SAPO", "REINFORCE++", "REINFORCE++-baseline", "GDPO", "TIS",
    "IcePop", "KL in the reward", "KL in the loss", "80/20: the tokens of highest entropy",
)  # fmt: skip


def recipes() -> dict[str, str]:
    """Paper -> YAML document, from the table under `| paper | YAML |`."""
    table = README.read_text().split("| paper | YAML |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [re.fullmatch(r"\| (.+?) \| (.+) \|", line) for line in table.splitlines()]
    return {row[1]: "\n".join(re.findall(r"`(.+?)`", row[2])) for row in rows if row}


def resolve(folder: Path, recipe: str) -> Settings:
    file = folder / "recipe.yaml"
    file.write_text(recipe)
    return layers.load(TASK, [str(file)])


def test_the_table_has_these_papers() -> None:
    assert tuple(recipes()) == PAPERS


@pytest.mark.parametrize("paper", PAPERS)
def test_a_row_loads_and_changes_the_loss(paper: str, tmp_path: Path) -> None:
    recipe = recipes()[paper]
    settings = resolve(tmp_path, recipe)
    written: dict[str, Any] = yaml.safe_load(recipe)
    resolved = settings.model_dump(mode="json")
    for section, values in written.items():
        assert {name: resolved[section][name] for name in values} == values
    make_policy_loss(settings)  # the library takes what the schema lets through
    changed = layers.changed_keys(layers.load(TASK), settings)
    assert changed.keys() & {f"{section}.{name}" for section, values in written.items() for name in values}
