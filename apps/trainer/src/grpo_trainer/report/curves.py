"""The curves of a run: which metrics belong on one chart, of one run or of several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from grpo_trainer.report.charts import Series, lines, number, stacked
from grpo_trainer.report.terminal import printable

__all__ = ["Plan", "plans"]

_PHASES = ("seconds/rollout", "seconds/reward", "seconds/advantage", "seconds/update", "seconds/evaluation")


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _seconds(value: float) -> str:
    return f"{number(value)} s"


@dataclass(frozen=True)
class Plan:
    """One chart: which metrics, under which names.

    Args:
        title, caption: as shown.
        metrics: names as in metrics.jsonl, and in the legend.
        form: how to write a value.
        log, zero, smooth: as of `lines`.
        stack: amounts that add up.
        dots: metrics measured now and then.
        compared: metrics that have a chart each where runs are compared; the first by default.
    """

    title: str
    caption: str
    metrics: Mapping[str, str]
    form: Callable[[float], str] = number
    log: bool = False
    zero: bool = False
    smooth: bool = True
    stack: bool = False
    dots: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()

    def draw(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The chart of one run, for the page; None without a value."""
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

    def overlay(self, groups: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Iterator[dict[str, Any]]:
        """A chart a compared metric, with a curve a group: of one run, or the mean of several with their range."""
        for metric in () if self.stack else self.compared or tuple(self.metrics)[:1]:
            drawn = {name: _curve(runs, metric) for name, runs in groups.items()}
            series = [
                Series(name, points, dots=metric in self.dots, band=band) if points else Series(name, ())
                for name, (points, band) in drawn.items()
            ]
            if not any(one.points for one in series):
                continue
            label = self.metrics[metric]
            yield {
                "title": self.title if len(self.compared) < 2 else f"{self.title}: {label}",
                "caption": self.caption if len(self.compared) < 2 else "",
                "latest": None,
                "legend": list(groups),
                "svg": Markup(lines(series, form=self.form, log=self.log, zero=self.zero, smooth=self.smooth)),
            }


def _curve(
    runs: Sequence[Sequence[Mapping[str, Any]]], metric: str
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """The mean and range over runs at the steps that all have which measured it at all; no range of one run."""
    found = [{float(r["step"]): float(r[metric]) for r in run if r.get(metric) is not None} for run in runs]
    found = [values for values in found if values]
    if not found:
        return [], []
    steps = sorted(set.intersection(*map(set, found)))
    columns = [(step, [values[step] for values in found]) for step in steps]
    band = [(step, min(column), max(column)) for step, column in columns] if len(found) > 1 else []
    return [(step, sum(column) / len(column)) for step, column in columns], band


def plans(records: Sequence[Mapping[str, Any]]) -> list[Plan]:
    """Every chart that a run may have.

    Args:
        records: of metrics.jsonl, of one run or of several; they name its reward functions and phases.
    """
    rewards = sorted({name for record in records for name in record if name.startswith("reward/")})
    timed = {name for record in records for name in record if name.startswith("seconds/")} - {"seconds/step"}
    phases = sorted(timed, key=lambda name: (_PHASES.index(name) if name in _PHASES else len(_PHASES), name))
    return [
        Plan(
            "Accuracy",
            "Right answers: of the sampled completions, and greedy on held-out problems.",
            {
                "accuracy": "sampled, training problems",
                "eval/accuracy": "greedy, held-out problems",
                "eval/accuracy_flexible": "greedy, held-out problems, lenient",
            },
            _percent,
            dots=("eval/accuracy", "eval/accuracy_flexible"),
            compared=("accuracy", "eval/accuracy", "eval/accuracy_flexible"),
        ),
        Plan(
            "Reward",
            "Weighted sum, and each function's raw value.",
            {"reward": "reward", **{name: printable(name.removeprefix("reward/")) for name in rewards}},
        ),
        Plan("Entropy", "Of the policy's next-token distribution, in nats.", {"entropy": "entropy"}, zero=True),
        Plan("KL to the reference", "k3 estimate, in nats a token.", {"kl": "kl"}, zero=True),
        Plan(
            "Completion length",
            "Tokens.",
            {"completions/mean_length": "mean", "completions/max_length": "longest"},
            zero=True,
        ),
        Plan(
            "Without signal, cut, unscored",
            "Groups whose rewards are all equal teach nothing; cut completions reached the limit.",
            {
                "frac_reward_zero_std": "groups without signal",
                "completions/clipped_ratio": "completions cut",
                "unscored": "completions unscored",
            },
            _percent,
            zero=True,
            compared=("frac_reward_zero_std", "completions/clipped_ratio"),
        ),
        Plan("Gradient norm", "Global norm before clipping.", {"grad_norm": "grad_norm"}, zero=True),
        Plan(
            "Ratio clipping",
            "Share of tokens whose importance ratio was clipped.",
            {"clip_ratio/region": "either side", "clip_ratio/low": "low", "clip_ratio/high": "high"},
            _percent,
            zero=True,
        ),
        Plan(
            "Sampler and trainer apart",
            "Difference of their log-probabilities of the same tokens, in nats.",
            {"sampling_logp_difference/mean": "mean", "sampling_logp_difference/max": "largest"},
            log=True,
        ),
        Plan("Reward spread", "Standard deviation within groups.", {"reward_std": "reward_std"}, zero=True),
        Plan(
            "Time of a step",
            "Seconds by phase.",
            {name: name.removeprefix("seconds/") for name in phases},
            _seconds,
            stack=True,
        ),
        Plan(
            "Throughput",
            "Tokens a second.",
            {
                "rollout/tokens_per_second": "rollout",
                "update/tokens_per_second": "update",
                "tokens_per_second": "whole step",
            },
            zero=True,
        ),
        Plan(
            "Learning rate",
            "As used by the optimizer.",
            {"learning_rate": "learning_rate"},
            zero=True,
            smooth=False,
        ),
    ]
