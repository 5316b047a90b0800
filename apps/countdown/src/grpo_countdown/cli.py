"""`grpo-countdown`: the trainer's commands for Countdown, and the one that makes the embedded policy."""

from collections.abc import Sequence

from grpo_countdown.task import TASK
from grpo_trainer import cli

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, cli.Command] = {
    "warmstart": ("grpo_countdown.warmstart:main", "make the embedded policy from scratch by supervised training"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see `grpo_trainer.cli.main`."""
    return cli.main(TASK, arguments, commands=COMMANDS)


if __name__ == "__main__":
    cli.run_app(TASK, COMMANDS)
