"""A policy on held-out problems, and several policies side by side."""

from grpo_trainer.evaluate.decode import evaluate, evaluation_key

__all__ = ["evaluate", "evaluation_key"]
