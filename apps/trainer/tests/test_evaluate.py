"""Evaluations: what is recorded, how they resume, and policies side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from toy import TASK, load, make_policy

from grpo_trainer import cli
from grpo_trainer.assemble import Evaluator, assemble_evaluator
from grpo_trainer.evaluate.decode import evaluate, evaluation_key
from grpo_trainer.evaluate.records import Answer, Evaluation, Record, compare, read_records
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.task import Judgement

SMALL = ("rollout.prompts=2", "rollout.group_size=2", "loss.rows=2", "eval.problems=20", "cpu_devices=0")


def evaluator(policy: Path, *sets: str) -> Evaluator:
    return assemble_evaluator(load([], [f"model.path={policy}", *SMALL, *sets]), TASK)


def loaded(policy: Path, *sets: str) -> tuple[Evaluator, Any]:
    made = evaluator(policy, *sets)
    return made, made.load()


def test_the_token_limit_of_an_evaluation_is_its_own(toy_policy: Path) -> None:
    lengths = {}
    for limit in (0, 3, 12):
        run, params = loaded(toy_policy, "rollout.max_new_tokens=6", f"eval.max_new_tokens={limit}", "eval.problems=8")
        lengths[limit] = [record.greedy.tokens for record in evaluate(run, params).records]
        # Shorter limits cut the same answers: greedy decoding does not look ahead.
        assert lengths[limit] == [min(limit or 6, length) for length in lengths.get(0, lengths[limit])] or limit == 12
    assert max(lengths[3]) <= 3
    assert max(lengths[0]) == 6
    assert 6 < max(lengths[12]) <= 12


def test_records_hold_every_answer_and_do_not_depend_on_chunks(toy_policy: Path, tmp_path: Path) -> None:
    sets = ("eval.samples=3", "eval.temperature=0.7", "eval.top_p=0.9", "rollout.max_new_tokens=8")
    (chunks, params), (whole, _) = loaded(toy_policy, *sets, "eval.slots=4"), loaded(toy_policy, *sets, "eval.slots=64")
    assert chunks.plan.sampled is not None
    assert (chunks.plan.sampled.temperature, chunks.plan.sampled.top_p) == (0.7, 0.9)
    calls: list[tuple[int, int]] = []
    result = evaluate(
        chunks,
        params,
        records=tmp_path / "new" / "some.jsonl",
        report=lambda known, total, so_far: calls.append((len(so_far.records), total)),
    )
    assert calls == [(done, 20) for done in range(2, 21, 2)]
    assert read_records(tmp_path / "new" / "some.jsonl") == result.records
    assert evaluate(whole, params).records == result.records
    first = json.loads((tmp_path / "new" / "some.jsonl").read_text().splitlines()[0])
    assert (first["question"], first["gold"], first["problem"]) == ("0 + 0?", "=0", 0)
    assert first["prompt_tokens"] == chunks.held_out.prompts.length_P[0]
    assert len(first["samples"]) == 3
    assert first["greedy"].keys() == {"completion", "judgement", "finish", "tokens"}
    assert len({answer["completion"] for answer in first["samples"]}) > 1


def test_an_interrupted_evaluation_goes_on_from_its_records(toy_policy: Path, tmp_path: Path) -> None:
    run, params = loaded(toy_policy, "rollout.max_new_tokens=4")
    whole = evaluate(run, params, records=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "torn.jsonl"
    file.write_text("".join(lines[:13]) + lines[13][:40])
    asked: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(run.plan.evaluator, name)

        def generate(self, params: Any, prompts: Any, **more: Any) -> Any:
            asked.extend(prompts.prompt_id_P.tolist())
            return run.plan.evaluator.generate(params, prompts, **more)

    counting = replace(run, plan=replace(run.plan, evaluator=Counting()))
    assert evaluate(counting, params, records=file) == whole
    assert asked == list(range(13, 20))
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()
    asked.clear()
    assert evaluate(counting, params, records=file) == whole
    assert asked == []
    # Another policy's answers are not these.
    other = jax.tree.map(lambda leaf: leaf + 1.0, params)
    evaluate(counting, other, records=file)
    assert asked == list(range(20))
    assert len(file.read_text().splitlines()) == 20


def test_what_was_recorded_is_judged_by_the_task_of_today(toy_policy: Path, tmp_path: Path) -> None:
    run, params = loaded(toy_policy, "rollout.max_new_tokens=4")
    evaluate(run, params, records=tmp_path / "some.jsonl")

    class Kind(type(TASK)):
        def judge(self, *_: Any, **__: Any) -> Judgement:
            return Judgement(strict=True, lenient=True, formed=True)

    assert evaluate(replace(run, task=Kind()), params, records=tmp_path / "some.jsonl").strict.share == 1.0


@pytest.mark.parametrize(
    "sets",
    [
        ("eval.samples=2",),
        ("rollout.max_new_tokens=5",),
        ("prompt.system=Add.",),
        ("model.compute_dtype=bfloat16",),
        ("seed=1",),
    ],
)
def test_other_prompts_and_settings_are_another_evaluation(toy_policy: Path, sets: tuple[str, ...]) -> None:
    plain = ("data.max_prompt_length=80", "rollout.max_new_tokens=4")
    here = evaluation_key(evaluator(toy_policy, *plain), "0")
    assert evaluation_key(evaluator(toy_policy, *plain, "steps=7", "eval.slots=8", "rollout.prompts=4"), "0") == here
    assert evaluation_key(evaluator(toy_policy, *plain), "1") != here
    assert evaluation_key(evaluator(toy_policy, *plain, *sets), "0") != here


def test_training_problems_are_not_read(toy_policy: Path, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"={n + 1}"}) + "\n" for n in range(9)))
    for source in (f"data.source={tmp_path}", f"data.source={file}"):
        assert len(evaluator(toy_policy, source).held_out.problems) == 9


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_how_samples_are_drawn_needs_samples(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.{name} does nothing .* set eval\.samples"):
        load([], [f"eval.{name}=0.5"])
    assert load([], [f"eval.{name}=0.5", "eval.samples=4"]).eval.samples == 4


# -- figures, on records made by hand ------------------------------------------------------------------------------


def answer(read: str, gold: str, *, form: bool = True) -> Answer:
    judgement = Judgement(strict=read == gold and form, lenient=read == gold, formed=form, read=read)
    return Answer(read, judgement, "stop", 3)


def record(number: int, greedy: str, samples: str = "", *, form: bool = True) -> Record:
    """Gold answers are `a`; a dot is an answer that could not be read."""
    drawn = tuple(answer(letter.replace(".", ""), "a", form=form) for letter in samples)
    return Record(number, f"file:{number}", f"question {number}", "a", 5, answer(greedy, "a", form=form), drawn)


def test_figures_of_samples() -> None:
    result = Evaluation([record(0, "a", "aabb"), record(1, "b", "bbbb"), record(2, "a", "a...", form=False)])
    found = {name: estimate.mean for name, estimate in result.sampled().items()}
    assert found == pytest.approx(
        {
            "mean@4": 2 / 12,
            "pass@1": 2 / 12,
            "pass@2": (1 - 1 / 6) / 3,
            "pass@4": 1 / 3,
            "mean@4_flexible": 3 / 12,
            "pass@1_flexible": 3 / 12,
            "pass@2_flexible": (1 - 1 / 6 + 3 / 6) / 3,
            "pass@4_flexible": 2 / 3,
            "maj@1": 3 / 12,
            # Of aabb, a pair is aa once in six, and ab, a tie, four times; of a..., it holds the a three times.
            "maj@2": (1 / 6 + 4 / 6 / 2 + 3 / 6) / 3,
            "maj@4": (1 / 2 + 1) / 3,
        }
    )
    assert (result.strict.correct, result.lenient.correct, result.formed.correct) == (1, 2, 2)
    assert "mean@4 16.7% (" in str(result)
    assert result.record()["eval/pass@4_interval"] == pytest.approx([0.0615, 0.7923], abs=1e-4)  # Wilson's of 1 of 3
    assert Evaluation([record(0, "a")]).sampled() == {}


def test_answers_are_voted_on_as_the_task_writes_them_alike() -> None:
    samples = [("#### 18", "18"), ("last number 18", "18"), ("boxed 7", "7"), ("boxed 9", "9")]
    drawn = tuple(
        Answer(read, Judgement(value == "7", value == "7", True, read, value), "stop", 1) for read, value in samples
    )
    one = replace(record(0, "a"), samples=drawn)
    assert Evaluation([one]).sampled()["maj@4"].mean == 0.0


def test_two_policies_are_compared_by_the_questions_they_share() -> None:
    before = [record(n, letter, "aaaa" if n else "bbbb") for n, letter in enumerate("aabbbb")]
    after = [record(n, letter, "aaab") for n, letter in enumerate("abaaa")][::-1]
    found = compare(before, after)
    assert found is not None
    assert found.problems == 5
    assert (found.strict.won, found.strict.lost) == (3, 1)
    assert found.strict.mean == pytest.approx((4 - 2) / 5)
    assert found.strict.p == pytest.approx(2 * (1 + 4) / 16)
    assert [old.problem for old, _ in found.won] == [2, 3, 4]
    assert [old.problem for old, _ in found.lost] == [1]
    assert found.mean is not None
    assert found.mean.mean == pytest.approx((0.75 - 4 * 0.25) / 5)
    assert found.record()["won_problems"] == [2, 3, 4]
    json.dumps(found.record(), allow_nan=False)
    assert compare(before, [replace(one, question="other") for one in after]) is None


# -- the command ---------------------------------------------------------------------------------------------------


def test_several_policies_are_put_side_by_side(
    toy_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = make_policy(tmp_path / "other", tie_word_embeddings=False)
    command = ["eval", str(toy_policy), str(other), "--set", *SMALL, "rollout.max_new_tokens=4", "eval.samples=2"]
    assert cli.main(TASK, command) == 0
    shown = capsys.readouterr().out
    files = sorted((tmp_path / "runs" / "evaluations").iterdir())
    assert len(files) == 2
    answers = [[record.greedy.completion for record in read_records(file)] for file in files]
    assert list(map(len, answers)) == [20, 20]
    assert answers[0] != answers[1]
    assert f"{other} against {toy_policy}, problem by problem (of 20):" in shown
    heading = next(line for line in shown.splitlines() if line.startswith("policy  ") and "strict" in line)
    assert heading.split()[1:6] == ["strict", "lenient", "mean@2", "pass@1", "pass@2"]
    assert "decoded  4 of 20 problems" in shown  # two slots for each of two samples
    assert cli.main(TASK, command) == 0
    again = capsys.readouterr().out
    assert again.count("resumed  20 of 20 problems are in the records") == 2
    assert "decoded" not in again
    assert [line for line in again.splitlines() if "strict " in line] == [
        line for line in shown.splitlines() if "strict " in line and "decoded" not in line
    ]


def test_a_typo_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(TASK, ["eval", "--checkpoint", "runs/typo"]) == 2
    assert "--checkpoint must be the folder of a run, with its config.yaml: got runs/typo" in capsys.readouterr().err
    assert cli.main(TASK, ["eval", "typo"]) == 2
    assert not list(tmp_path.iterdir())
