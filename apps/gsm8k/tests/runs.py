"""Settings of small GSM8K runs, written once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from grpo_gsm8k.task import TASK
from grpo_trainer import assemble as assembling
from grpo_trainer.assemble import Run
from grpo_trainer.settings import layers
from grpo_trainer.settings.schema import Settings

load = partial(layers.load, TASK)

_SMALL = (
    "data.train_size=40",
    "prompt.instruction=",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "rollout.max_new_tokens=16",
    "loss.rows=4",
    "eval.problems=8",
    "log.tensorboard=false",
    "mesh=dp:-1",
    "reward.functions=[own_rewards:digits]",
)


def small(policy: Path | str, folder: Path, *more: str) -> Settings:
    """Of a run of seconds.

    Args:
        policy: folder of the policy, or `embedded`.
        folder: of the run.
        more: assignments as of `--set`; they win.
    """
    return load([], [f"model.path={policy}", f"run.dir={folder}", *_SMALL, *more])


def assemble(settings: Settings) -> Run:
    """With GSM8K for its task."""
    return assembling.assemble(settings, TASK)
