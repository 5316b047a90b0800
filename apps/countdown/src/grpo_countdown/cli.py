"""`grpo-countdown`: the trainer's commands for Countdown, and the one that makes the embedded policy."""

from functools import partial

from grpo_countdown.task import TASK
from grpo_trainer import cli

__all__ = ["COMMANDS", "main", "run"]

COMMANDS = {"warmstart": ("grpo_countdown.warmstart:main", "make the embedded policy by supervised training")}
main = partial(cli.main, TASK, commands=COMMANDS)
run = partial(cli.run_app, TASK, COMMANDS)

if __name__ == "__main__":
    run()
