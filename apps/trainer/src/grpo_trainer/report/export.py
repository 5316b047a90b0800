"""A run's policy as a Hugging Face folder: weights, tokenizer, template, generation settings, model card."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo_contracts import GrpoError
from grpo_trainer.run.files import read_summary, writing
from grpo_trainer.settings.layers import load_saved
from grpo_trainer.settings.paths import argument_path
from grpo_trainer.settings.schema import Settings
from grpo_trainer.settings.startup import prepare_process
from grpo_trainer.task import Task

__all__ = ["ExportError", "export_policy", "main"]

_HELP = "Write a run's policy as a Hugging Face folder."
_SHARD_BYTES = 5_000_000_000
# What a tokenizer may consist of, besides its configuration.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
    "*.model",
)


class ExportError(GrpoError, RuntimeError):
    """A policy cannot be exported: no such checkpoint, or a folder that holds something already."""


def main(task: Task, arguments: Sequence[str]) -> int:
    """``export``: write a run's policy as a Hugging Face folder.

    Args:
        task: of the run.
        arguments: of the command line.

    Returns:
        Exit code 0.
    """
    parser = argparse.ArgumentParser(prog=f"grpo-{task.name} export", description=_HELP, allow_abbrev=False)
    parser.add_argument("run", type=argument_path, help="folder of a run, with its checkpoints")
    parser.add_argument("folder", type=argument_path, help="where to write; must be empty or missing")
    parser.add_argument("--step", type=int, help="checkpoint of this step; default: the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the run's model.dtype")
    given = parser.parse_args(arguments)
    settings = load_saved(given.run / "config.yaml").model_copy(update={"mesh": "auto", "slices": (), "cpu_devices": 0})
    for line in prepare_process(settings):
        print(line, flush=True)

    from grpo_mesh import make_mesh
    from grpo_sampler import ModelConfig
    from grpo_trainer.assemble import blueprint
    from grpo_trainer.assemble.policy import policy_folder
    from grpo_trainer.run.checkpoint import Checkpoints

    source = policy_folder("model.path", settings.model.path, task.policies)
    model = ModelConfig.from_file(source)
    plan = blueprint(settings, model, make_mesh(settings.mesh))
    checkpoints = Checkpoints.reader(given.run / "checkpoints")
    if given.step is not None and given.step not in checkpoints.steps:
        held = ", ".join(map(str, checkpoints.steps)) or "none"
        raise ExportError(f"{given.run} must hold a checkpoint of step {given.step}: it holds those of steps {held}")
    restored = checkpoints.restore(plan.state, None, at=given.step)
    if restored is None:
        raise ExportError(f"{given.run} holds no checkpoint to export")
    summary = read_summary(given.run)
    export_policy(
        given.folder,
        restored.state.params,
        model,
        source,
        card=model_card(task, settings, restored.step, summary),
        dtype=given.dtype,
    )
    print(f"{given.folder}: the policy of {given.run} after step {restored.step}")
    return 0


def export_policy(folder: Path, params: Any, model: Any, source: Path, *, card: str, dtype: str | None = None) -> None:
    """Write a policy so that transformers, and `grpo_sampler.load_pretrained`, load it.

    Args:
        folder: where to write; must be empty or missing.
        params: the policy's, on any mesh; every process must call this, and the first one writes.
        model: its dimensions.
        source: folder that training started from, whose tokenizer and generation settings are copied.
        card: text of README.md.
        dtype: of the weights; None: as they are.

    Raises:
        ExportError: the folder holds something already.
        RunFolderError: it cannot be written.
    """
    import jax

    from grpo_sampler import save_pretrained

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} must be an empty or a new folder: it holds something already")
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    with writing(folder):
        save_pretrained(folder, model, params, max_shard_bytes=_SHARD_BYTES)
        if jax.process_index() == 0:
            for pattern in _TOKENIZER:
                for file in source.glob(pattern):
                    shutil.copyfile(file, folder / file.name)
            (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(task: Task, settings: Settings, step: int, summary: dict[str, Any]) -> str:
    """README.md of an exported policy: what it was trained on, how, and what was measured.

    Args:
        task: of the run.
        settings: of the run.
        step: of the checkpoint.
        summary: of the run; empty while it is not finished.

    Returns:
        Markdown with a YAML head, as the Hub reads it.
    """
    head = yaml.safe_dump(
        {"library_name": "transformers", "tags": ["grpo", task.name], "base_model": settings.model.path}
    )
    facts = {
        "policy before": settings.model.path,
        "problems": settings.data.source,
        "steps": f"{step} of {settings.steps}, {settings.rollout.prompts} prompts x {settings.rollout.group_size}",
        "objective": f"{settings.loss.kind}, advantage {settings.loss.advantage}, {settings.loss.aggregation}",
        "optimizer": f"{settings.optimizer.name}, learning rate {settings.optimizer.learning_rate:g}",
        "rewards": ", ".join(settings.reward.functions),
    }
    for when in ("before", "after"):
        if summary.get(f"accuracy_{when}") is not None:
            low, high = summary[f"accuracy_{when}_interval"]
            facts[f"held-out accuracy {when}"] = (
                f"{summary[f'accuracy_{when}']:.1%} ({low:.1%} to {high:.1%}, {summary[f'problems_{when}']} problems)"
            )
    rows = "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items())
    prompt = json.dumps(settings.prompt.model_dump(mode="json"), ensure_ascii=False, indent=1)
    return (
        f"---\n{head}---\n# A policy trained with GRPO on {task.name}\n\n| | |\n|---|---|\n{rows}\n\n"
        f"How questions were put:\n\n```json\n{prompt}\n```\n"
    )
