"""`grpo-gsm8k`: the trainer's commands for GSM8K, and those that make the embedded demo."""

from collections.abc import Sequence
from typing import NoReturn

from grpo_gsm8k.task import TASK
from grpo_trainer import cli

__all__ = ["COMMANDS", "main", "run"]

COMMANDS: dict[str, cli.Command] = {
    "warmstart": (
        "grpo_gsm8k.embedded.warmstart:main",
        "make the embedded policy from scratch by supervised training",
    ),
    "make-data": ("grpo_gsm8k.embedded.problems:main", "write the embedded problems as JSONL in GSM8K's format"),
    "make-tokenizer": ("grpo_gsm8k.embedded.tokenizer:main", "make the embedded tokenizer from the problems"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see `grpo_trainer.cli.main`."""
    return cli.main(TASK, arguments, commands=COMMANDS)


def run() -> NoReturn:
    """Run the command that this process was started with; see `grpo_trainer.cli.run_app`."""
    cli.run_app(TASK, COMMANDS)


if __name__ == "__main__":
    run()
