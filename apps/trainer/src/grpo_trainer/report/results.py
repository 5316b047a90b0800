"""What a run's evaluations say: before, after, the difference, and the problems won and lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_trainer.evaluate.accuracy import Accuracy
from grpo_trainer.evaluate.estimates import Estimate
from grpo_trainer.evaluate.records import Comparison, Record, compare, read_records
from grpo_trainer.report.terminal import printable

__all__ = ["Results", "summary_accuracies"]

_SAMPLED = ("mean@", "pass@", "maj@")
_LISTED = 12  # problems won, and as many lost


@dataclass(frozen=True)
class Results:
    """The evaluations of one run.

    Args:
        accuracies: strict and greedy, by `before` and `after`; without what was not measured.
        rows: (figure, before, after, difference), as shown.
        paired: after against before; None without the records of both.
    """

    accuracies: dict[str, Accuracy]
    rows: list[tuple[str, str, str, str]]
    paired: Comparison | None

    @classmethod
    def read(cls, folder: Path, summary: Mapping[str, Any]) -> "Results":
        """Read them from a run's summary and its records.

        Args:
            folder: of the run.
            summary: of the run; empty while it is not finished.
        """
        accuracies = summary_accuracies(summary, "accuracy")
        lenient = summary_accuracies(summary, "accuracy_flexible")
        paired = None
        if len(accuracies) == 2 and summary.get("paired"):
            files = [folder / "evaluations" / f"step_{step}.jsonl" for step in (0, summary["steps"])]
            paired = compare(*map(read_records, files))
        rows = []
        for name, found, difference in (
            ("strict", accuracies, paired and paired.strict),
            ("lenient", lenient, paired and paired.lenient),
        ):
            texts = [str(found[when]) if when in found else "" for when in ("before", "after")]
            rows.append((name, *texts, str(difference or "")))
        names = [key.removesuffix("_after").removesuffix("_before") for key in summary if key.startswith(_SAMPLED)]
        for name in dict.fromkeys(name for name in names if not name.endswith("_interval")):
            texts = [
                str(Estimate(summary[f"{name}_{when}"], *summary[f"{name}_interval_{when}"]))
                if f"{name}_{when}" in summary
                else ""
                for when in ("before", "after")
            ]
            difference = paired.mean if paired and name.startswith("mean@") and not name.endswith("_flexible") else None
            rows.append((name.replace("_flexible", ", lenient"), *texts, str(difference or "")))
        return cls(accuracies, [row for row in rows if row[1] or row[2]], paired)

    def verdict(self) -> str:
        """One or two sentences."""
        if len(self.accuracies) < 2:
            return "This run has no held-out accuracy both before and after training."
        before, after = self.accuracies["before"], self.accuracies["after"]
        where = f"{after.total:,} held-out problems, decoded greedily"
        points = f"{100 * (after.share - before.share):+.1f} points on {where}"
        if self.paired:
            found = self.paired.strict
            chance = "" if found.low > 0 or found.high < 0 else " This may be chance."
            return (
                f"{points}; 95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}, paired by problem: "
                f"{found.won:,} won, {found.lost:,} lost (McNemar's exact p = {found.p:.2g}).{chance}"
            )
        if before == after:
            return f"No change on {where}."
        apart = before.interval[1] < after.interval[0] or after.interval[1] < before.interval[0]
        return f"{points}; the 95 % intervals " + ("do not overlap." if apart else "overlap: this may be chance.")

    def problems(self) -> list[tuple[str, int, list[dict[str, str]]]]:
        """Problems won and lost: (title, how many, the first of them with what was read before and after)."""
        sides = (("Won", self.paired.won), ("Lost", self.paired.lost)) if self.paired else ()
        return [(title, len(pairs), [_row(*pair) for pair in pairs[:_LISTED]]) for title, pairs in sides if pairs]


def summary_accuracies(summary: Mapping[str, Any], name: str) -> dict[str, Accuracy]:
    """What a run's summary holds of an accuracy, by `before` and `after`.

    Args:
        summary: of the run.
        name: `accuracy` or `accuracy_flexible`.
    """
    return {
        when: Accuracy(round(summary[f"{name}_{when}"] * summary[f"problems_{when}"]), summary[f"problems_{when}"])
        for when in ("before", "after")
        if summary.get(f"{name}_{when}") is not None
    }


def _row(before: Record, after: Record) -> dict[str, str]:
    reads = [printable(record.greedy.judgement.read or "nothing") for record in (before, after)]
    question, gold = printable(after.question), printable(after.gold[-60:])
    return {"place": printable(after.place), "question": question, "gold": gold, "before": reads[0], "after": reads[1]}
