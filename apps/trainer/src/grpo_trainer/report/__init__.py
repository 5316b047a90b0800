"""The page that shows a run."""

from grpo_trainer.report.page import write_report

__all__ = ["write_report"]
