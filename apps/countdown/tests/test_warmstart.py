"""The impatient teacher, its lessons, and the policy that ships."""

import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_countdown.expression import calculate
from grpo_countdown.problems import calculations, generate, stream
from grpo_countdown.task import TASK
from grpo_countdown.warmstart import Teacher, lessons, main, teach, texts
from grpo_trainer.assemble.teach import chat_examples, make_tokenizer, measure
from grpo_trainer.data.tokenizer import load_tokenizer
from grpo_trainer.settings.layers import load

POLICY = TASK.policies["embedded"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(POLICY)


def test_the_teacher_is_as_impatient_as_it_says() -> None:
    teacher, rng = Teacher(), random.Random(0)
    missed = {True: 0, False: 0}
    problems = list(islice(stream("train", seed=3), 3_000))
    for problem in problems:
        *tries, answer = teach(problem, teacher, rng).split("\n")
        result = calculate(answer.removeprefix("answer: "))
        assert result is not None
        if result[0] != problem.target:
            missed[len(tries) == 1] += 1
    # It errs with its first try or not at all.
    assert missed[False] == 0
    assert teacher.impatience - 0.2 < missed[True] / len(problems) < teacher.impatience


def test_the_teacher_calculates_correctly_and_tries_nothing_twice() -> None:
    rng = random.Random(0)
    for problem in generate("train", 300):
        *tries, answer = teach(problem, Teacher(), rng).split("\n")
        assert 1 <= len(set(tries)) == len(tries) <= 6
        for line in tries:
            text, value, target, verdict = line.replace("=", " ").replace("?", " ").split()
            assert int(target) == problem.target
            assert calculations(problem.numbers)[text] == int(value)
            assert verdict == ("yes" if int(value) == problem.target else "no")
            assert verdict == "no" or line == tries[-1]
        assert tries[-1].startswith(f"{answer.removeprefix('answer: ')}=")


def test_lessons_teach_completions_alone(tokenizer: Any) -> None:
    batch = next(lessons(tokenizer, Teacher(rows=2)))
    for row in range(2):
        for segment in range(1, batch.segment_RT[row].max() + 1):
            here = batch.segment_RT[row] == segment
            whole = tokenizer.decode([*batch.tokens_RT[row, here][:1], *batch.target_RT[row, here]])
            learned = tokenizer.decode(batch.target_RT[row, here & batch.mask_RT[row]])
            prompt, completion = whole.split("<|im_start|>assistant\n")
            assert prompt.startswith("<|im_start|>user\nReach ")
            assert learned == completion
            assert re.fullmatch(r"(\d+[-+*/]\d+=\d+ \d+\? (yes|no)\n)+answer: \d+[-+*/]\d+<\|im_end\|>", completion)


def test_prompts_and_solutions_fit_the_preset(tokenizer: Any) -> None:
    settings = load(TASK)
    problems = TASK.problems("embedded", "train", 1_000)
    examples = chat_examples(
        tokenizer, [problem.question for problem in problems], [problem.answer for problem in problems]
    )
    assert max(example.prompt_length for example in examples) <= settings.data.max_prompt_length
    longest = max(len(example.tokens) - example.prompt_length for example in examples)
    assert longest <= settings.rollout.max_new_tokens


def test_the_embedded_policy_is_small_and_whole(tmp_path: Path) -> None:
    files = {path.name: path.stat().st_size for path in POLICY.iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(files.values()) <= 5_000_000
    make_tokenizer(tmp_path, texts())
    assert (tmp_path / "tokenizer.json").read_bytes() == (POLICY / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_the_embedded_policy_has_something_to_learn_and_to_learn_from(tokenizer: Any) -> None:
    from grpo_sampler import load_pretrained

    config, params = load_pretrained(POLICY, dtype=np.float32)
    figures = measure(config, params, tokenizer, TASK, problems=256)
    assert 0.1 <= figures.greedy <= 0.5
    assert figures.form > 0.95
    assert figures.pass_at_8 > figures.greedy + 0.2
    assert figures.mixed > 0.4


@pytest.mark.slow
def test_the_command_writes_a_policy_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from grpo_countdown import cli

    policy, run = tmp_path / "policy", tmp_path / "run"
    tiny = [
        "--steps",
        "3",
        "--layers",
        "1",
        "--width",
        "32",
        "--mlp-width",
        "64",
        "--query-heads",
        "2",
        "--kv-heads",
        "1",
    ]
    assert main(TASK, ["--out", str(policy), *tiny]) == 0
    assert "held-out problems: greedy" in capsys.readouterr().out
    small = [
        f"model.path={policy}", "prompt.instruction=''", f"run.dir={run}", "steps=2", "rollout.prompts=4",
        "rollout.group_size=4", "data.train_size=16", "eval.problems=8", "log.tensorboard=false",
        "cpu_devices=0", "mesh=dp:1",
    ]  # fmt: skip
    assert cli.main(["train", "--set", *small]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert "held-out" in capsys.readouterr().out
