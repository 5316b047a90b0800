"""What a policy answered to each problem of an evaluation, as a file of JSON lines, and two policies side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_trainer.evaluate.accuracy import Accuracy
from grpo_trainer.evaluate.estimates import (
    Difference,
    Estimate,
    estimate,
    majority_at_k,
    paired_difference,
    pass_at_k,
)
from grpo_trainer.task import Judgement

__all__ = ["Answer", "Comparison", "Evaluation", "Record", "compare", "read_records"]


@dataclass(frozen=True)
class Answer:
    """A completion and what the task says of it.

    Args:
        completion: its text, without the stop token.
        judgement: of the task.
        finish: `stop` or `length`.
        tokens: of the completion.
    """

    completion: str
    judgement: Judgement
    finish: str
    tokens: int


@dataclass(frozen=True)
class Record:
    """What a policy answered to one problem.

    Args:
        problem: its index among the held-out problems.
        place: where it was read.
        question: the text put to the policy.
        gold: the answer of the data set.
        prompt_tokens: of the whole prompt.
        greedy: the answer decoded greedily.
        samples: sampled answers.
    """

    problem: int
    place: str
    question: str
    gold: str
    prompt_tokens: int
    greedy: Answer
    samples: tuple[Answer, ...] = ()

    def line(self, evaluation: str) -> str:
        """One line of the file; `evaluation` identifies the policy, prompts and settings."""
        fields = {"evaluation": evaluation, **vars(self)}
        fields |= {"greedy": _plain(self.greedy), "samples": [_plain(answer) for answer in self.samples]}
        return json.dumps(fields, ensure_ascii=False) + "\n"


def read_records(file: Path, evaluation: str | None = None) -> list[Record]:
    """The leading problems of a records file, without a last line cut short by a kill.

    Args:
        file: may be missing.
        evaluation: read the lines of this evaluation, up to the first of another; None: of any.

    Returns:
        Records of problems 0, 1, 2, ... in order.
    """
    records: list[Record] = []
    for line in file.read_bytes().split(b"\n")[:-1] if file.is_file() else ():
        try:
            fields = json.loads(line)
            whose = fields.pop("evaluation")
            answers = {"greedy": _answer(fields["greedy"]), "samples": tuple(map(_answer, fields["samples"]))}
            record = Record(**fields | answers)
        except (ValueError, KeyError, TypeError):
            break  # the rest is measured again
        if evaluation not in (None, whose) or record.problem != len(records):
            break
        records.append(record)
    return records


def _plain(answer: Answer) -> dict[str, Any]:
    return {**vars(answer), "judgement": asdict(answer.judgement)}


def _answer(fields: dict[str, Any]) -> Answer:
    return Answer(**{**fields, "judgement": Judgement(**fields["judgement"])})


@dataclass(frozen=True)
class Evaluation:
    """A policy on held-out problems.

    Args:
        records: one a problem, at least one; all with equally many samples.
    """

    records: Sequence[Record]

    @property
    def strict(self) -> Accuracy:
        """Greedy answers that are right by the rule that results are published by."""
        return Accuracy(sum(record.greedy.judgement.strict for record in self.records), len(self.records))

    @property
    def lenient(self) -> Accuracy:
        """Greedy answers that are right, however they are put."""
        return Accuracy(sum(record.greedy.judgement.lenient for record in self.records), len(self.records))

    @property
    def formed(self) -> Accuracy:
        """Greedy answers in the form that was asked for."""
        return Accuracy(sum(record.greedy.judgement.formed for record in self.records), len(self.records))

    def sampled(self) -> dict[str, Estimate]:
        """Of the samples: mean@n, pass@k and maj@k for k = 1, 2, 4, ... up to n; empty without samples.

        Strict, and by the lenient rule under names that end in ``_flexible``; a majority is of answers as the lenient
        rule reads them.
        """
        count = len(self.records[0].samples)
        found: dict[str, list[float]] = {}
        for rule, suffix in (("strict", ""), ("lenient", "_flexible")) if count else ():
            right = [[getattr(answer.judgement, rule) for answer in record.samples] for record in self.records]
            found[f"mean@{count}{suffix}"] = [sum(flags) / count for flags in right]
            for k in _powers(count):
                found[f"pass@{k}{suffix}"] = [pass_at_k(sum(flags), count, k) for flags in right]
        for k in _powers(count) if count else ():
            found[f"maj@{k}"] = [
                majority_at_k(
                    [answer.judgement.answer or answer.judgement.read for answer in record.samples],
                    [answer.judgement.lenient for answer in record.samples],
                    k,
                )
                for record in self.records
            ]
        return {name: estimate(values) for name, values in found.items()}

    def metrics(self) -> dict[str, float]:
        """As in metrics.jsonl."""
        answers = [record.greedy for record in self.records]
        return {
            "eval/accuracy": self.strict.share,
            "eval/accuracy_flexible": self.lenient.share,
            "eval/format": self.formed.share,
            "eval/clipped_ratio": float(np.mean([answer.finish == "length" for answer in answers])),
            "eval/mean_length": float(np.mean([answer.tokens for answer in answers])),
            **{f"eval/{name}": found.mean for name, found in self.sampled().items()},
        }

    def record(self) -> dict[str, Any]:
        """As in the checkpoint's notes and summary.json."""
        sampled = {f"eval/{name}_interval": [found.low, found.high] for name, found in self.sampled().items()}
        return {"correct": self.strict.correct, "total": self.strict.total, **self.metrics(), **sampled}

    def __str__(self) -> str:
        return self.describe("held-out accuracy")

    def describe(self, what: str) -> str:
        """The figures in one line.

        Args:
            what: the first one is, such as ``held-out accuracy``.
        """
        text = f"{what} {self.strict}, lenient {self.lenient.share:.1%}, form {self.formed.share:.1%}"
        count, found = len(self.records[0].samples), self.sampled()
        shown = dict.fromkeys([f"mean@{count}", f"pass@{count}", f"maj@{count}"]) if count else ()
        return text + "".join(f", {name} {found[name]}" for name in shown if name in found)


def _powers(count: int) -> list[int]:
    """1, 2, 4, ... and `count` itself."""
    return sorted({2**n for n in range(math.floor(math.log2(count)) + 1)} | {count})


@dataclass(frozen=True)
class Comparison:
    """One policy against another, problem by problem.

    Args:
        strict, lenient: of greedy answers.
        mean: of the share of right samples, strict; None where one of them has no samples.
        won, lost: the records of problems that, strict and greedy, only the other or only the one has right.
        problems: that both were given.
    """

    strict: Difference
    lenient: Difference
    mean: Difference | None
    won: tuple[tuple[Record, Record], ...]
    lost: tuple[tuple[Record, Record], ...]
    problems: int

    def record(self) -> dict[str, Any]:
        """As in summary.json."""
        differences = {"strict": self.strict, "lenient": self.lenient, "mean": self.mean}
        plain = {name: asdict(found) for name, found in differences.items() if found}
        problems = {"won": self.won, "lost": self.lost}
        plain |= {"problems": self.problems}
        return plain | {f"{name}_problems": [one.problem for one, _ in pairs] for name, pairs in problems.items()}

    def lines(self) -> Iterator[str]:
        """What differs, a line each."""
        yield f"strict   {self.strict}"
        yield f"lenient  {self.lenient}"
        if self.mean:
            yield f"mean     {self.mean} (share of right samples, strict)"


def compare(one: Sequence[Record], other: Sequence[Record]) -> Comparison | None:
    """Compare two policies by the problems that both were given; None without any.

    Args:
        one: records of the policy before, or of the first.
        other: of the policy after, or of the second.
    """
    theirs = {record.question: record for record in other}
    pairs = [(record, theirs[record.question]) for record in one if record.question in theirs]
    if not pairs:
        return None

    def greedy(rule: str) -> Difference:
        columns = zip(*[[float(getattr(record.greedy.judgement, rule)) for record in pair] for pair in pairs])
        return paired_difference(*columns)

    mean = None
    if all(record.samples for pair in pairs for record in pair):
        shares = [[float(np.mean([a.judgement.strict for a in record.samples])) for record in pair] for pair in pairs]
        mean = paired_difference(*zip(*shares))
    flags = [[record.greedy.judgement.strict for record in pair] for pair in pairs]
    return Comparison(
        strict=greedy("strict"),
        lenient=greedy("lenient"),
        mean=mean,
        won=tuple(pair for pair, (before, after) in zip(pairs, flags) if after > before),
        lost=tuple(pair for pair, (before, after) in zip(pairs, flags) if before > after),
        problems=len(pairs),
    )
