"""From settings to a run: shapes first, then weights and data."""

from grpo_trainer.assemble.blueprint import Blueprint, blueprint
from grpo_trainer.assemble.run import Evaluator, Run, assemble, assemble_evaluator, load_frozen

__all__ = ["Blueprint", "Evaluator", "Run", "assemble", "assemble_evaluator", "blueprint", "load_frozen"]
