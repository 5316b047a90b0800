"""A run's policy as a Hugging Face folder: weights, tokenizer, template, generation settings, model card."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from grpo_contracts import GrpoError
from grpo_trainer.evaluate.estimates import Difference
from grpo_trainer.report.results import summary_accuracies
from grpo_trainer.run.files import check_run_folder, locate_run, read_summary, writing
from grpo_trainer.settings.layers import load_saved
from grpo_trainer.settings.paths import argument_path
from grpo_trainer.settings.schema import Settings
from grpo_trainer.settings.startup import prepare_process
from grpo_trainer.task import Task

if TYPE_CHECKING:
    from grpo_trainer.assemble import Run

__all__ = ["ExportError", "check_export", "export_policy", "export_run", "main"]

_HELP = "Write a run's policy as a Hugging Face folder."
_SHARD_BYTES = 5_000_000_000
_TITLE = "# A policy trained with GRPO on "
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
    run_help = "folder of a run, or of one checkpoint such as RUN/checkpoints/step_40"
    parser.add_argument("run", type=argument_path, help=run_help)
    parser.add_argument("folder", type=argument_path, help="where to write; must be empty or missing")
    parser.add_argument("--step", type=int, help="checkpoint of this step; default: the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the run's model.dtype")
    given = parser.parse_args(arguments)
    run, step = locate_run(given.run.expanduser()) or (given.run, None)
    check_run_folder(run)
    step = given.step if step is None else step
    settings = load_saved(run / "config.yaml").on_any_devices()
    for line in prepare_process(settings):
        print(line, flush=True)

    from grpo_mesh import make_mesh
    from grpo_sampler import ModelConfig
    from grpo_trainer.assemble import blueprint, load_frozen
    from grpo_trainer.assemble.policy import policy_folder
    from grpo_trainer.run.checkpoint import Checkpoints

    source = policy_folder("model.path", settings.model.path, task.policies)
    model = ModelConfig.from_file(source)
    plan = blueprint(settings, model, make_mesh(settings.mesh))
    if not (run / "checkpoints").is_dir():
        raise ExportError(f"{run} holds no checkpoint to export")
    checkpoints = Checkpoints.reader(run / "checkpoints")
    if step is not None and step not in checkpoints.steps:
        held = ", ".join(map(str, checkpoints.steps)) or "none"
        raise ExportError(f"{run} must hold a checkpoint of step {step}: it holds those of steps {held}")
    restored = checkpoints.restore(plan.state, None, at=step)
    if restored is None:
        raise ExportError(f"{run} holds no checkpoint to export")
    summary = read_summary(run)
    export_policy(
        given.folder,
        plan.network(restored.state.params, *load_frozen(source, plan)),
        plan.model,
        source,
        card=model_card(task, settings, restored.step, summary),
        base=settings.model.path,
        dtype=given.dtype,
    )
    print(f"{given.folder}: the policy of {run} after step {restored.step}")
    return 0


def check_export(settings: Settings, run: Path) -> None:
    """Refuse a `checkpoint.export` that holds something already, before a run begins.

    Args:
        settings: of the run.
        run: its folder.

    Raises:
        ExportError: the folder holds something that is no export.
    """
    if settings.checkpoint.export:
        _check_free(_target(settings, run), replace=True)


def export_run(run: Run, folder: Path, params: Any, step: int, summary: Mapping[str, Any]) -> Path:
    """Export the policy of a run that ends, as `checkpoint.export` says; every process must call this.

    Args:
        run: assembled.
        folder: of the run.
        params: what was trained.
        step: after which it ends.
        summary: what it measured, for the model card.

    Returns:
        Where the policy is.
    """
    from grpo_trainer.assemble.policy import policy_folder

    settings, target = run.settings, _target(run.settings, folder)
    source = policy_folder("model.path", settings.model.path, run.task.policies)
    card = model_card(run.task, settings, step, summary)
    export_policy(
        target, run.network(params), run.plan.model, source, card=card, base=settings.model.path, replace=True
    )
    return target


def _target(settings: Settings, run: Path) -> Path:
    export = settings.checkpoint.export
    return run / "export" if export == "auto" else Path(export).expanduser()


def _check_free(folder: Path, *, replace: bool) -> None:
    """Refuse a folder that holds something; `replace`: but for an earlier export, as that of a run with fewer steps."""
    card = folder / "README.md"
    if replace and card.is_file() and _TITLE in card.read_text(encoding="utf-8", errors="replace"):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} must be an empty or a new folder: it holds something already")


def export_policy(
    folder: Path,
    params: Any,
    model: Any,
    source: Path,
    *,
    card: str,
    base: str = "",
    dtype: str | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write a policy so that transformers, and `grpo_sampler.load_pretrained`, load it.

    Adapters are merged, and also written as they are, for peft, to the folder `adapter` inside. Everything is written
    beside the folder and then renamed into place: a folder of this name is whole.

    Args:
        folder: where to write; must be empty or missing.
        params: the network's, on any mesh; every process must call this, and the first one writes.
        model: its dimensions.
        source: folder that training started from, whose tokenizer and generation settings are copied.
        card: text of README.md.
        base: name of the base model that adapters are written with; empty: `source`.
        dtype: of the weights; None: as they are.
        max_shard_bytes: size above which the weights are split into several files with an index.
        replace: an earlier export that the folder holds.

    Raises:
        ExportError: the folder holds something already.
        RunFolderError: it cannot be written.
    """
    import jax

    from grpo_mesh import to_host
    from grpo_sampler import merge_adapters, save_adapters, save_pretrained, split_adapters

    writes, part = jax.process_index() == 0, folder.with_name(f".{folder.name}.part")
    if writes:
        _check_free(folder, replace=replace)
    adapters, merged = None, dataclasses.replace(model, lora=None)
    if model.lora is not None:
        adapters = jax.tree.map(to_host, split_adapters(params)[1])
        params = jax.jit(partial(merge_adapters, config=model))(params)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    with writing(folder):
        if writes and part.exists():
            shutil.rmtree(part)
        save_pretrained(part, merged, params, max_shard_bytes=max_shard_bytes)  # every process: it gathers
        if writes:
            for pattern in _TOKENIZER:
                for file in source.glob(pattern):
                    shutil.copyfile(file, part / file.name)
            _write_ends(part, source, model)
            if adapters is not None:
                save_adapters(part / "adapter", model, adapters, base=base or str(source))
            (part / "README.md").write_text(card, encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)


def _write_ends(folder: Path, source: Path, model: Any) -> None:
    """Tell transformers which tokens end a completion: all that did in training, wherever they were written."""
    from grpo_trainer.data.tokenizer import end_ids, load_tokenizer, padding_id

    tokenizer, file = load_tokenizer(source), folder / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    generation |= {"eos_token_id": list(end_ids(tokenizer, source, model.eos_ids))}
    generation.setdefault("pad_token_id", padding_id(tokenizer))
    file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def model_card(task: Task, settings: Settings, step: int, summary: Mapping[str, Any]) -> str:
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
    for name, accuracy in summary_accuracies(summary, "accuracy").items():
        facts[f"held-out accuracy {name}"] = str(accuracy)
    for name, accuracy in summary_accuracies(summary, "accuracy_flexible").items():
        facts[f"held-out accuracy {name}, lenient"] = str(accuracy)
    if summary.get("paired"):
        facts["after against before, by problem"] = str(Difference(**summary["paired"]["strict"]))
    rows = "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items())
    prompt = json.dumps(settings.prompt.model_dump(mode="json"), ensure_ascii=False, indent=1)
    return (
        f"---\n{head}---\n{_TITLE}{task.name}\n\n| | |\n|---|---|\n{rows}\n\n"
        f"How questions were put:\n\n```json\n{prompt}\n```\n"
    )
