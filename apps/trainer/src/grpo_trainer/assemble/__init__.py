"""From settings to a run: shapes first, then weights and data."""

from grpo_trainer.assemble.blueprint import Blueprint, blueprint
from grpo_trainer.assemble.run import Run, assemble

__all__ = ["Blueprint", "Run", "assemble", "blueprint"]
