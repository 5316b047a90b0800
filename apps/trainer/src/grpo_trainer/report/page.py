"""report.html: what a run learned, how it went, and what the policy wrote; one file, no script, opens anywhere."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from grpo_trainer.report.charts import intervals, number
from grpo_trainer.report.curves import plans
from grpo_trainer.report.results import Results
from grpo_trainer.report.terminal import printable
from grpo_trainer.run.files import missing_records, read_lines, read_summary, replace, writing
from grpo_trainer.run.progress import duration
from grpo_trainer.settings.layers import flat, load_saved
from grpo_trainer.settings.schema import Settings

__all__ = ["environment", "write_report"]

_EXAMPLES = 3


def write_report(folder: Path) -> Path:
    """Write report.html from what the run folder holds; also of a run that is not finished.

    Args:
        folder: of the run, with config.yaml and metrics.jsonl.

    Returns:
        Path of the report.

    Raises:
        RunFolderError: a file of the folder cannot be read, or the report not written.
    """
    settings = load_saved(folder / "config.yaml")
    records = read_lines(folder / "metrics.jsonl")
    summary = read_summary(folder)
    results = Results.read(folder, summary)
    accuracies = results.accuracies
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            name=printable(folder.absolute().name, newlines=False),
            results=results,
            accuracies=accuracies,
            intervals=Markup(intervals(list(accuracies.items()))) if accuracies else None,  # our own, labels escaped
            facts=_facts(folder, settings, records, summary),
            charts=[chart for chart in (plan.draw(records) for plan in plans(records)) if chart],
            settings=_settings(settings),
            prompt=_prompt(folder / "prompt.txt"),
            examples=_examples(read_lines(folder / "completions.jsonl")),
            versions=summary.get("versions", {}),
            number=number,
        )
    )
    file = folder / "report.html"
    with writing(folder):
        replace(file, page)
    return file


def environment() -> Environment:
    """Templates of pages, with everything escaped."""
    return Environment(
        loader=PackageLoader("grpo_trainer", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def _prompt(file: Path) -> str:
    return printable(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else ""


def _facts(
    folder: Path, settings: Settings, records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, str]:
    done = max((record["step"] for record in records), default=0)
    facts = {"steps": f"{done:,} of {settings.steps:,}"}
    if "seconds" in summary:
        facts["time"] = duration(summary["seconds"])
        facts["device"] = summary["device"]
    for name, steps in missing_records(folder, settings, done).items():
        facts[f"lost from {name}"] = steps
    return facts | {
        "policy": settings.model.path,
        "problems": settings.data.source,
        "step": f"{settings.rollout.prompts} prompts x {settings.rollout.group_size} samples",
    }


def _settings(settings: Settings) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Sections of (key, value, whether it is not the default)."""
    defaults = flat(Settings())
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for key, value in flat(settings).items():
        section, _, leaf = key.rpartition(".")
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if value is None or isinstance(value, bool):
            text = json.dumps(value)  # as people write it in YAML
        sections.setdefault(section or "run", []).append((leaf, printable(text), value != defaults[key]))
    return list(sections.items())


def _examples(completions: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The first and the last recorded step's completions, side by side."""
    if not completions:
        return []
    steps = sorted({record["step"] for record in completions})
    chosen = [("Early", steps[0]), ("Late", steps[-1])] if len(steps) > 1 else [("Sampled", steps[0])]
    return [
        (f"{label}: step {step}", [_example(r) for r in completions if r["step"] == step][:_EXAMPLES])
        for label, step in chosen
    ]


def _example(record: Mapping[str, Any]) -> dict[str, Any]:
    rewards = record.get("rewards") or {}
    return {
        "prompt": printable(str(record.get("prompt", ""))),
        "completion": printable(str(record.get("completion", ""))),
        "reward": record.get("reward"),
        "rewards": {printable(str(name)): value for name, value in rewards.items()},
        "answer": None if record.get("answer") is None else printable(str(record["answer"])),
        "read": printable(str(record.get("read") or "")),
        "finish": record.get("finish"),
    }
