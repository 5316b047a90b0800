"""The unreliable teacher, the packed lessons, and the embedded policy as it is shipped."""

import json
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_gsm8k.embedded.lessons import Teacher, lessons, teach
from grpo_gsm8k.embedded.problems import generate
from grpo_gsm8k.embedded.tokenizer import texts
from grpo_gsm8k.embedded.warmstart import main
from grpo_gsm8k.task import TASK
from grpo_sampler import ModelConfig, load_pretrained
from grpo_trainer.assemble.teach import Recipe, make_tokenizer, measure, train_policy
from grpo_trainer.data.tokenizer import load_tokenizer

POLICY = TASK.policies["embedded"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(POLICY)


def test_the_teacher_errs_as_often_as_it_says() -> None:
    teacher, rng = Teacher(form_slips=0.0), random.Random(0)
    problems = [problem for problem in generate("train", 6_000) if problem.mistaken is not None]
    for hard, share in ((True, teacher.hard_mistakes), (False, teacher.easy_mistakes)):
        taught = [teach(p, teacher, rng) == p.mistaken for p in problems if p.template.hard == hard]
        assert np.mean(taught) == pytest.approx(share, abs=0.04)


def test_form_slips_leave_out_the_mark() -> None:
    problem, rng = generate("train", 1)[0], random.Random(0)
    texts = {teach(problem, Teacher(hard_mistakes=0.0, easy_mistakes=0.0, form_slips=1.0), rng) for _ in range(20)}
    assert len(texts) == 2
    assert all("####" not in text for text in texts)


def test_lessons_hold_whole_solutions_and_teach_completions_alone(tokenizer: Any) -> None:
    teacher = Teacher(rows=4, drill_rows=2)
    batch = next(lessons(tokenizer, teacher))
    assert batch.tokens_RT.shape == (6, teacher.row_length)
    for row in range(6):
        for segment in range(1, batch.segment_RT[row].max() + 1):
            here = batch.segment_RT[row] == segment
            learned = tokenizer.decode(batch.target_RT[row, here & batch.mask_RT[row]])
            whole = tokenizer.decode([*batch.tokens_RT[row, here][:1], *batch.target_RT[row, here]])
            np.testing.assert_array_equal(batch.positions_RT[row, here], np.arange(here.sum()))
            if row < 4:
                prompt, answer = whole.split("<|im_start|>assistant\n")
                assert prompt.startswith("<|im_start|>user\n")
                assert learned == answer
                assert answer.endswith("<|im_end|>")
            else:
                assert re.fullmatch(r" <<\d+[-+*/]\d+=(\d+)>>\1", whole)
                assert whole.endswith("=" + learned)


def test_lessons_are_a_function_of_the_seed(tokenizer: Any) -> None:
    first, again, other = (
        [batch.tokens_RT for batch in islice(lessons(tokenizer, Teacher(seed=seed), block=64), 3)] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_lessons_and_the_embedded_data_share_no_question(tokenizer: Any) -> None:
    held_out = {tuple(sorted(problem.numbers)) for problem in generate("test", 500)}
    taught = {tuple(sorted(problem.numbers)) for problem in generate("train", 2_000, seed=1)}
    assert not held_out & taught


def test_training_lowers_the_loss(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(steps=12, width=32, mlp_width=64, layers=2, query_heads=2, kv_heads=1, head_size=16)
    teacher = Teacher(rows=2, drill_rows=1)
    train_policy(recipe.model(len(tokenizer), 2), lessons(tokenizer, teacher, block=128), recipe, every=6)
    early, late = (float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out))
    assert late < early


def test_the_embedded_policy_is_small_and_whole(tokenizer: Any) -> None:
    files = {path.name: path.stat().st_size for path in POLICY.iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(files.values()) < 8_000_000
    config, params = load_pretrained(POLICY, dtype=np.float32)
    expected = Recipe().model(len(tokenizer), tokenizer.eos_token_id)
    assert isinstance(config, ModelConfig)
    assert config == expected
    assert (
        1_000_000
        <= sum(leaf.size for part in (params, params["layers"]) for leaf in part.values() if hasattr(leaf, "size"))
        <= 3_000_000
    )
    generation = json.loads((POLICY / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id


def test_the_embedded_tokenizer_is_the_one_the_problems_make(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, texts())
    assert (tmp_path / "tokenizer.json").read_bytes() == (POLICY / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_the_embedded_policy_has_something_to_learn_and_to_learn_from(tokenizer: Any) -> None:
    config, params = load_pretrained(POLICY, dtype=np.float32)
    figures = measure(config, params, tokenizer, TASK, problems=256)
    assert 0.2 <= figures.greedy <= 0.55
    assert figures.form > 0.95
    assert figures.pass_at_8 > figures.greedy + 0.25
    assert figures.mixed > 0.5


@pytest.mark.slow
def test_the_command_writes_a_policy_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(TASK, ["--out", str(tmp_path), "--steps", "3", "--layers", "1", "--width", "32", "--mlp-width", "64"]) == 0
    )
    assert "held-out problems: greedy" in capsys.readouterr().out
    config, _ = load_pretrained(tmp_path, dtype=np.float32)
    assert (config.layers, config.width) == (1, 32)
