"""Settings of small runs, written once: everything here is the trainer's, with GSM8K for its task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from grpo_gsm8k.task import TASK
from grpo_trainer import assemble as assembling
from grpo_trainer import train as training
from grpo_trainer.assemble import Run
from grpo_trainer.run.folder import versions
from grpo_trainer.settings import layers
from grpo_trainer.settings.schema import Settings

load = partial(layers.load, TASK)
train = partial(training.train, task=TASK)
VERSIONS = versions("grpo-gsm8k")

# A toy policy's run, seconds long.
SMALL = (
    "data.train_size=40",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "rollout.max_new_tokens=16",
    "loss.rows=4",
    "eval.problems=8",
    "log.tensorboard=false",
    "mesh=dp:-1",
    "reward.functions=[graders:digits]",
)


def assemble(settings: Settings, *, devices: Sequence[Any] | None = None) -> Run:
    return assembling.assemble(settings, TASK, devices=devices)


def small(policy: Path, folder: Path, *more: str) -> Settings:
    """Of a small run of a toy policy."""
    return load([], [f"model.path={policy}", f"run.dir={folder}", *SMALL, *more])
