"""Held-out accuracy: every problem once greedily, and in several samples where they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from grpo_contracts import FinishReason, PolicyVersion, SamplingParams
from grpo_mesh import digest
from grpo_trainer.assemble import Evaluator, Run
from grpo_trainer.data.stream import ProblemBatch
from grpo_trainer.evaluate.records import Answer, Evaluation, Record, read_records
from grpo_trainer.rewards.scoring import transcribe
from grpo_trainer.run.files import replace as write_whole
from grpo_trainer.run.files import writing

__all__ = ["evaluate", "evaluation_key"]


def evaluate(
    run: Run | Evaluator,
    params: Any,
    *,
    records: Path | None = None,
    report: Callable[[int, int, Evaluation], None] | None = None,
) -> Evaluation:
    """Decode every held-out problem, greedily and in `eval.samples` samples, and have the task judge it.

    Problems are decoded in chunks. Each chunk is appended to the records file as soon as it is done, and what the file
    holds already of the same policy, prompts and settings is not decoded again, but judged again.

    Args:
        run: assembled, or its evaluator.
        params: of the policy.
        records: file of JSON lines, one a problem; another evaluation's is replaced. None: nothing is kept.
        report: called first and after each chunk, with how many problems were known from the file, how many there are,
            and the evaluation of those that are done; not called while none is.

    Returns:
        The evaluation; the same parameters give the same one.
    """
    plan, batch = run.plan, run.held_out
    policy = PolicyVersion(0, digest(params))
    key, total = evaluation_key(run, policy.digest), len(batch.problems)
    done = _known(run, records, key)
    known = len(done)
    if records is not None and jax.process_index() == 0:
        with writing(records.parent):
            records.parent.mkdir(parents=True, exist_ok=True)
            write_whole(records, "".join(record.line(key) for record in done))
    samples = plan.settings.eval.samples
    size = max(1, 2 * plan.evaluator.slots // max(1, samples))
    if done and report is not None:
        report(known, total, Evaluation(done))
    for start in range(known, total, size):
        chunk = _part(batch, start, start + size)
        greedy = _decode(run, params, chunk, policy, plan.greedy, group_size=1)
        drawn = [()] * len(greedy)
        if plan.sampled:
            drawn = _decode(run, params, chunk, policy, plan.sampled, group_size=samples)
        fresh = [
            Record(start + n, problem.place, problem.question, problem.answer, int(length), answers[0], tuple(more))
            for n, (problem, length, answers, more) in enumerate(
                zip(chunk.problems, chunk.prompts.length_P, greedy, drawn)
            )
        ]
        done += fresh
        if records is not None and jax.process_index() == 0:
            with writing(records.parent), records.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(record.line(key) for record in fresh)
        if report is not None:
            report(known, total, Evaluation(done))
    return Evaluation(done)


def evaluation_key(run: Run | Evaluator, policy: str) -> str:
    """Identify an evaluation: its policy, prompts, and the settings that decide what is sampled.

    Args:
        run: assembled, or its evaluator.
        policy: digest of the parameters.
    """
    settings, prompts = run.plan.settings, run.held_out.prompts
    facts = {
        "policy": policy,
        "prompts": hashlib.sha256(prompts.tokens_PT.tobytes() + prompts.length_P.tobytes()).hexdigest(),
        "answers": [problem.answer for problem in run.held_out.problems],
        "greedy": asdict(run.plan.greedy),
        "sampled": run.plan.sampled and asdict(run.plan.sampled),
        "samples": settings.eval.samples,
        "max_new_tokens": run.plan.evaluator.max_new_tokens,
        "rollout": settings.rollout.model_dump(mode="json", exclude=_FREE),
        "model": settings.model.model_dump(mode="json", exclude={"path"}),
        "seed": settings.seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# What of rollouts has no influence on an evaluation, or is in its own settings already.
_FREE = {
    "prompts",
    "group_size",
    "slots",
    "refills",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
}


def _known(run: Run | Evaluator, file: Path | None, key: str) -> list[Record]:
    """Records of the file that every process of the job sees, with what the task says of them now."""
    records = read_records(file, key) if file is not None else []
    problems = run.held_out.problems
    count = min(len(records), len(problems))
    if file is not None and jax.process_count() > 1:
        count = int(np.min(multihost_utils.process_allgather(np.asarray([count], np.int32))))

    def judge_again(answer: Answer, problem: int) -> Answer:
        judgement = run.task.judge(answer.completion, problems[problem], finished=answer.finish != "length")
        return replace(answer, judgement=judgement)

    return [
        replace(
            record,
            greedy=judge_again(record.greedy, record.problem),
            samples=tuple(judge_again(answer, record.problem) for answer in record.samples),
        )
        for record in records[:count]
    ]


def _part(batch: ProblemBatch, start: int, stop: int) -> ProblemBatch:
    prompts, some = batch.prompts, slice(start, stop)
    chosen = replace(
        prompts,
        tokens_PT=prompts.tokens_PT[some],
        length_P=prompts.length_P[some],
        prompt_id_P=prompts.prompt_id_P[some],
    )
    return ProblemBatch(chosen, batch.problems[some])


def _decode(
    run: Run | Evaluator,
    params: Any,
    batch: ProblemBatch,
    policy: PolicyVersion,
    sampling: SamplingParams,
    *,
    group_size: int,
) -> Sequence[Sequence[Answer]]:
    """The answers to each problem. Random numbers depend on the problem alone, not on its chunk."""
    rollout = run.plan.evaluator.generate(
        params,
        batch.prompts,
        group_size=group_size,
        seed=run.plan.settings.seed,
        step=0,
        policy=policy,
        sampling=sampling,
    )
    transcript = transcribe(rollout, batch.problems, run.tokenizer, run.plan.settings.rollout.stop)
    rows = zip(transcript.completions, transcript.judgements(run.task), rollout.finish_B, transcript.lengths)
    answers = [
        Answer(text, judgement, FinishReason(int(finish)).name.lower(), length)
        for text, judgement, finish, length in rows
    ]
    return [answers[first : first + group_size] for first in range(0, len(answers), group_size)]
