"""The `warmstart` command: the embedded policy, made from scratch from the unreliable teacher's lessons."""

from collections.abc import Sequence
from pathlib import Path

from grpo_gsm8k.embedded.lessons import Teacher, lessons
from grpo_gsm8k.embedded.tokenizer import texts
from grpo_trainer.assemble.teach import warmstart
from grpo_trainer.task import Task

__all__ = ["main"]


def main(task: Task, arguments: Sequence[str]) -> int:
    """``warmstart``: make the tokenizer and the policy and write them in Hugging Face layout."""
    folder = Path(__file__).parent / "policy"
    return warmstart(task, arguments, folder=folder, texts=texts, teacher=Teacher, lessons=lessons)
