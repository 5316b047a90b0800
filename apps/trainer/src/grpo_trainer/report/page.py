"""report.html: what a run learned, how it went, and what the policy wrote; one file, no script, opens anywhere."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from grpo_trainer.report.accuracy import Accuracy
from grpo_trainer.report.charts import Series, intervals, lines, number, stacked
from grpo_trainer.report.printable import printable
from grpo_trainer.run.files import read_lines, read_summary, replace, writing
from grpo_trainer.run.history import missing_records
from grpo_trainer.run.progress import duration
from grpo_trainer.settings.layers import flat, load_saved
from grpo_trainer.settings.schema import Settings

__all__ = ["write_report"]

_EXAMPLES = 3
_PHASES = ("seconds/rollout", "seconds/reward", "seconds/advantage", "seconds/update", "seconds/evaluation")


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
    rows = [
        (name, Accuracy(round(summary[f"accuracy_{name}"] * summary[f"problems_{name}"]), summary[f"problems_{name}"]))
        for name in ("before", "after")
        if summary.get(f"accuracy_{name}") is not None
    ]
    environment = Environment(
        loader=PackageLoader("grpo_trainer", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        name=folder.absolute().name,
        accuracies=dict(rows),
        verdict=_verdict(dict(rows)),
        intervals=Markup(intervals(rows)) if rows else None,  # our own SVG, its labels escaped
        facts=_facts(folder, settings, records, summary),
        charts=[chart for chart in (plan.draw(records) for plan in _plans(records)) if chart],
        settings=_settings(settings),
        prompt=_prompt(folder / "prompt.txt"),
        examples=_examples(read_lines(folder / "completions.jsonl")),
        versions=summary.get("versions", {}),
        number=number,
    )
    file = folder / "report.html"
    with writing(folder):
        replace(file, page)
    return file


def _prompt(file: Path) -> str:
    return printable(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else ""


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _seconds(value: float) -> str:
    return f"{number(value)} s"


@dataclass(frozen=True)
class _Plan:
    """One chart: which metrics, under which names."""

    title: str
    caption: str
    metrics: Mapping[str, str]
    form: Callable[[float], str] = number
    log: bool = False
    zero: bool = False
    smooth: bool = True
    stack: bool = False
    dots: tuple[str, ...] = ()

    def draw(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        found = {
            metric: [(float(r["step"]), float(r[metric])) for r in records if r.get(metric) is not None]
            for metric in self.metrics
        }
        present = {metric: points for metric, points in found.items() if points}
        caption = self.caption
        if self.stack:
            steps = [record["step"] for record in records if record["step"] > 0]
            amounts = {metric: dict(points) for metric, points in present.items()}
            series = [
                Series(self.metrics[metric], [(step, amount.get(step, 0.0)) for step in steps])
                for metric, amount in amounts.items()
                if any(amount.get(step) for step in steps)
            ]
            if not series:
                return None
            svg, beyond = stacked(series, form=self.form)
            if beyond:
                caption += f" Beyond the axis: {beyond} of {len(steps)} steps, such as the first, which compiles."
        else:
            series = [Series(self.metrics[m], points, dots=m in self.dots) for m, points in present.items()]
            if not series:
                return None
            svg = lines(series, form=self.form, log=self.log, zero=self.zero, smooth=self.smooth)
        latest = next(iter(present.values()))[-1][1]
        return {
            "title": self.title,
            "caption": caption,
            "latest": None if self.stack else self.form(latest),
            "legend": [one.label for one in series] if len(series) > 1 else [],
            "svg": Markup(svg),  # our own, its labels escaped
        }


def _plans(records: Sequence[Mapping[str, Any]]) -> list[_Plan]:
    rewards = sorted({name for record in records for name in record if name.startswith("reward/")})
    timed = {name for record in records for name in record if name.startswith("seconds/")} - {"seconds/step"}
    phases = sorted(timed, key=lambda name: (_PHASES.index(name) if name in _PHASES else len(_PHASES), name))
    return [
        _Plan(
            "Accuracy",
            "Right answers: of the sampled completions, and greedy on held-out problems.",
            {"accuracy": "sampled, training problems", "eval/accuracy": "greedy, held-out problems"},
            _percent,
            dots=("eval/accuracy",),
        ),
        _Plan(
            "Reward",
            "Weighted sum, and each function's raw value.",
            {"reward": "reward", **{name: printable(name.removeprefix("reward/")) for name in rewards}},
        ),
        _Plan("Entropy", "Of the policy's next-token distribution, in nats.", {"entropy": "entropy"}, zero=True),
        _Plan("KL to the reference", "k3 estimate, in nats a token.", {"kl": "kl"}, zero=True),
        _Plan(
            "Completion length",
            "Tokens.",
            {"completions/mean_length": "mean", "completions/max_length": "longest"},
            zero=True,
        ),
        _Plan(
            "Without signal, cut, unscored",
            "Groups whose rewards are all equal teach nothing; cut completions reached the limit.",
            {
                "frac_reward_zero_std": "groups without signal",
                "completions/clipped_ratio": "completions cut",
                "unscored": "completions unscored",
            },
            _percent,
            zero=True,
        ),
        _Plan("Gradient norm", "Global norm before clipping.", {"grad_norm": "grad_norm"}, zero=True),
        _Plan(
            "Ratio clipping",
            "Share of tokens whose importance ratio was clipped.",
            {"clip_ratio/region": "either side", "clip_ratio/low": "low", "clip_ratio/high": "high"},
            _percent,
            zero=True,
        ),
        _Plan(
            "Sampler and trainer apart",
            "Difference of their log-probabilities of the same tokens, in nats.",
            {"sampling_logp_difference/mean": "mean", "sampling_logp_difference/max": "largest"},
            log=True,
        ),
        _Plan("Reward spread", "Standard deviation within groups.", {"reward_std": "reward_std"}, zero=True),
        _Plan(
            "Time of a step",
            "Seconds by phase.",
            {name: name.removeprefix("seconds/") for name in phases},
            _seconds,
            stack=True,
        ),
        _Plan(
            "Throughput",
            "Tokens a second.",
            {
                "rollout/tokens_per_second": "rollout",
                "update/tokens_per_second": "update",
                "tokens_per_second": "whole step",
            },
            zero=True,
        ),
        _Plan(
            "Learning rate",
            "As used by the optimizer.",
            {"learning_rate": "learning_rate"},
            zero=True,
            smooth=False,
        ),
    ]


def _verdict(accuracies: Mapping[str, Accuracy]) -> str:
    if len(accuracies) < 2:
        return "This run has no held-out accuracy both before and after training."
    before, after = accuracies["before"], accuracies["after"]
    points = 100 * (after.share - before.share)
    if before == after:
        return f"No change on {after.total:,} held-out problems, decoded greedily."
    apart = before.interval[1] < after.interval[0] or after.interval[1] < before.interval[0]
    return f"{points:+.1f} points on {after.total:,} held-out problems, decoded greedily; the 95 % intervals " + (
        "do not overlap." if apart else "overlap: this may be chance."
    )


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
