"""`eval`: measure policies on held-out problems, and compare them problem by problem."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import jax

from grpo_mesh import digest
from grpo_trainer.assemble import Evaluator, assemble_evaluator
from grpo_trainer.evaluate.decode import evaluate, evaluation_key
from grpo_trainer.evaluate.records import Evaluation, Record, compare
from grpo_trainer.report.terminal import printable
from grpo_trainer.run.checkpoint import CheckpointError, Checkpoints
from grpo_trainer.run.files import locate_run
from grpo_trainer.run.progress import duration
from grpo_trainer.settings.layers import load_saved
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Split, Task

__all__ = ["evaluate_command"]

_ACCURACY = {"test": "held-out accuracy", "train": "accuracy on training problems"}
_LISTED = 5  # problems won, and as many lost


@dataclass(frozen=True)
class _Policy:
    """A policy ready to be measured.

    Args:
        name: as printed.
        evaluator: with the policy's own tokenizer.
        params: its parameters.
        records: folder of its records.
        stem: how their file's name begins.
    """

    name: str
    evaluator: Evaluator
    params: Any
    records: Path
    stem: str


def evaluate_command(
    settings: Settings,
    task: Task,
    *,
    policies: Sequence[str] = (),
    checkpoint: Path | None = None,
    split: Split = "test",
) -> int:
    """Measure one policy, or several on the same problems; what was measured before is read from its records.

    Args:
        settings: say how questions are put and answers decoded; `model.path` is the policy if none is named.
        task: reads the problems and judges the answers.
        policies: folders of runs or of one checkpoint, folders in Hugging Face layout, or Hub ids.
        checkpoint: a run's folder, one more policy.
        split: the problems: held-out ones, or those to train on, for `data.filter.pass_rate`.

    Returns:
        Exit code 0.
    """
    say = print if jax.process_index() == 0 else _silent
    named = list(policies)
    if checkpoint is not None:
        named.insert(0, str(checkpoint))
    measured: list[tuple[str, Evaluation]] = []
    for number, name in enumerate(named or [settings.model.path]):
        policy = _open(settings, task, name, split, is_run=checkpoint is not None and not number)
        for line in _description(policy.evaluator, split) if number == 0 else ():
            say(line, flush=True)
        key = evaluation_key(policy.evaluator, digest(policy.params))
        of_split = "" if split == "test" else f"-{split}"
        file = policy.records / f"{policy.stem}{of_split}-{key[:8]}.jsonl"
        say(f"records  {file}", flush=True)
        result = evaluate(policy.evaluator, policy.params, records=file, report=_progress(say))
        say(f"{policy.name}: {result.describe(_ACCURACY[split])}", flush=True)
        for line in _pass_rates(result.records, file) if split == "train" else ():
            say(line, flush=True)
        measured.append((policy.name, result))
    if len(measured) > 1:
        say("\n".join(["", *_table(measured)]), flush=True)
    for (one, before), (other, after) in combinations(measured, 2):
        say("\n".join(["", *_comparison(one, before.records, other, after.records)]), flush=True)
    return 0


def _silent(*_: Any, **__: Any) -> None:
    """Every process but the first."""


def _open(settings: Settings, task: Task, name: str, split: Split, *, is_run: bool) -> _Policy:
    path = Path(name).expanduser()
    if (found := locate_run(path)) is not None or is_run:
        return _open_run(settings, task, split, *(found or (path, None)))
    model = settings.model.model_copy(update={"path": name})
    evaluator = assemble_evaluator(settings.model_copy(update={"model": model}), task, split=split)
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.")[-80:] or "policy"
    return _Policy(name, evaluator, evaluator.load(), Path("runs") / "evaluations", stem)


def _open_run(settings: Settings, task: Task, split: Split, run: Path, step: int | None) -> _Policy:
    if not (run / "checkpoints").is_dir():
        raise CheckpointError(f"{run} holds no checkpoint to evaluate")
    own = load_saved(run / "config.yaml") if (run / "config.yaml").is_file() else settings
    # The checkpoint is of the run's own model and optimizer; how it is asked is the same for all policies.
    model = settings.model.model_copy(update={"path": own.model.path, "dtype": own.model.dtype, "lora": own.model.lora})
    theirs = settings.model_copy(update={"model": model, "optimizer": own.optimizer})
    evaluator = assemble_evaluator(theirs, task, split=split)
    restored = Checkpoints.reader(run / "checkpoints").restore(evaluator.plan.state, None, at=step)
    if restored is None:
        raise CheckpointError(f"{run} holds no checkpoint to evaluate" + ("" if step is None else f" of step {step}"))
    return _Policy(
        f"{run} after step {restored.step}",
        evaluator,
        evaluator.network(restored.state.params),  # the optimizer's state was read for its checksum, and is freed here
        run / "evaluations",
        f"eval_step_{restored.step}",
    )


def _description(evaluator: Evaluator, split: Split) -> Iterator[str]:
    plan, problems = evaluator.plan, evaluator.held_out.problems
    data, count = plan.settings.data, plan.settings.eval.samples
    parameters = sum(leaf.size for leaf in jax.tree.leaves(plan.network(plan.state.params, *plan.frozen)))
    drawn = f" and in {count} samples at temperature {plan.sampled.temperature:g}" if plan.sampled else ""
    yield f"policy   {plan.model.family}, {parameters:,} parameters, {plan.settings.model.dtype}"
    source = data.source if split == "train" else data.test_source or data.source
    what = "to train on" if split == "train" else "held out"
    yield f"problems {source}: {len(problems):,} {what}, each greedily{drawn}"
    yield f"devices  {plan.device}"


def _pass_rates(records: Sequence[Record], file: Path) -> Iterator[str]:
    """How often the problems were solved, and how to train on those between never and always."""
    count = len(records[0].samples)
    if not count:
        yield "no pass rates without samples: set eval.samples"
        return
    solved = [sum(answer.judgement.strict for answer in record.samples) for record in records]
    never, always = solved.count(0), solved.count(count)
    between = len(solved) - never - always
    yield f"solved   in none of {count} samples {never:,} problems, in some {between:,}, in all {always:,}"
    where = shlex.quote(f"data.filter.pass_rate.records={file}")
    yield f"keep     --set {where} data.filter.pass_rate.min=0.1 data.filter.pass_rate.max=0.9"


def _progress(say: Callable[..., None]) -> Callable[[int, int, Evaluation], None]:
    """Says what was known, and after each chunk but the last, how far the evaluation is."""
    began = time.monotonic()

    def report(known: int, total: int, so_far: Evaluation) -> None:
        done = len(so_far.records)
        if done == known:
            same = "the same policy, prompts and settings; delete the file to decode them again"
            say(f"resumed  {done:,} of {total:,} problems are in the records, of {same}", flush=True)
        elif done < total:
            left = duration((time.monotonic() - began) / (done - known) * (total - done))
            say(f"decoded  {done:,} of {total:,} problems, strict {so_far.strict.share:.1%}, left {left}", flush=True)

    return report


def _table(measured: Sequence[tuple[str, Evaluation]]) -> Iterator[str]:
    """A row a policy, every figure with its 95 % interval."""
    rows = [["policy", "strict", "lenient", *measured[0][1].sampled()]]
    for name, result in measured:
        greedy = [
            f"{found.share:.1%} ({' to '.join(f'{bound:.1%}' for bound in found.interval)})"
            for found in (result.strict, result.lenient)
        ]
        rows.append([printable(name, newlines=False), *greedy, *map(str, result.sampled().values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def _comparison(one: str, before: Sequence[Record], other: str, after: Sequence[Record]) -> Iterator[str]:
    found = compare(before, after)
    title = f"{printable(other, newlines=False)} against {printable(one, newlines=False)}"
    if found is None:
        yield f"{title}: no question in common"
        return
    yield f"{title}, problem by problem (of {found.problems:,}):"
    yield from (f"  {line}" for line in found.lines())
    for word, pairs in (("won", found.won), ("lost", found.lost)):
        for old, new in pairs[:_LISTED]:
            reads = " -> ".join(record.greedy.judgement.read or "nothing" for record in (old, new))
            question = printable(old.question, newlines=False)[:60]
            yield f"  {word:4}  problem {old.problem}: {printable(reads, newlines=False)}  | {question}"
        if len(pairs) > _LISTED:
            yield f"  {word:4}  and {len(pairs) - _LISTED:,} more, in the records"
