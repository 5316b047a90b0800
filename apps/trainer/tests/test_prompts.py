"""How a question is put: each setting changes the prompt as it says, and what would spoil every prompt is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy import TASK, load

from grpo_trainer.data.prompts import PromptError, PromptStyle, encode_prompts, prompt_digest
from grpo_trainer.data.stream import Reader
from grpo_trainer.data.tokenizer import load_tokenizer
from grpo_trainer.task import Problem

ASSISTANT = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(toy_policy: Path) -> Any:
    return load_tokenizer(toy_policy)


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def prompt(tokenizer: Any, *sets: str) -> str:
    """The first training prompt of a run with these settings."""
    given = load([], ["data.max_prompt_length=400", *sets])
    batch = Reader(given, TASK, tokenizer, len(tokenizer)).training().questions.take([0])
    return tokenizer.decode(batch.prompts.tokens_PT[0, : batch.prompts.length_P[0]])


# The first sums whose total four does not divide.
FIRST, SECOND, THIRD = "0 + 1?", "0 + 2?", "0 + 3?"


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ((), turn("user", FIRST) + ASSISTANT),
        (("prompt.system=Be brief.",), turn("system", "Be brief.") + turn("user", FIRST) + ASSISTANT),
        (("prompt.instruction=Add.",), turn("user", f"{FIRST}\n\nAdd.") + ASSISTANT),
        (("prompt.instruction=What is {question} Add.",), turn("user", f"What is {FIRST} Add.") + ASSISTANT),
        (("prompt.prefill==",), turn("user", FIRST) + ASSISTANT + "="),
        (
            ("prompt.examples=1", "prompt.instruction=Add."),
            turn("user", f"{FIRST}\n\nAdd.") + turn("assistant", "=1") + turn("user", f"{SECOND}\n\nAdd.") + ASSISTANT,
        ),
        (('prompt.template="Q: {prompt}\\nA: "',), f"Q: {FIRST}\nA: "),
        (
            (
                'prompt.template="Q: {prompt}\\nA: "',
                "prompt.examples=2",
                "prompt.system=Sums.",
                "prompt.prefill=It is ",
            ),
            f"Sums.\n\nQ: {FIRST}\nA: =1\n\nQ: {SECOND}\nA: =2\n\nQ: {THIRD}\nA: It is ",
        ),
    ],
)
def test_prompts(tokenizer: Any, sets: tuple[str, ...], expected: str) -> None:
    assert prompt(tokenizer, *sets) == expected


def test_examples_of_a_file(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "shots.jsonl").write_text(json.dumps({"question": "8 + 8?", "answer": "=16"}) + "\n")
    shown = turn("user", "8 + 8?") + turn("assistant", "=16")
    assert (
        prompt(tokenizer, f"prompt.examples_file={tmp_path / 'shots.jsonl'}") == shown + turn("user", FIRST) + ASSISTANT
    )


def test_what_is_shown_is_not_asked(tokenizer: Any) -> None:
    given = load([], ["prompt.examples=2", "data.train_size=10", "data.max_prompt_length=400"])
    questions = Reader(given, TASK, tokenizer, len(tokenizer)).training().questions
    kept = [problem.question for problem in questions.problems]
    assert kept == [problem.question for problem in TASK.problems("embedded", "train", 12)][2:]


@pytest.mark.parametrize(
    ("template", "style", "message"),
    [
        ("{{ 'nothing' }}", PromptStyle(), "x:1: the chat template must keep the question: it wrote 'nothing'"),
        (
            "{{ raise_exception('no system turn') }}",
            PromptStyle(system="Be"),
            "fails on a conversation of system, user",
        ),
        ("{{ '\\ud800' + messages[0]['content'] }}", PromptStyle(), "must write text: half a surrogate pair"),
        (None, PromptStyle(), "has no chat template, as that of a base model: set prompt.template"),
    ],
)
def test_templates_that_spoil_every_prompt(
    toy_policy: Path, template: str | None, style: PromptStyle, message: str
) -> None:
    tokenizer = load_tokenizer(toy_policy)
    tokenizer.chat_template = template
    with pytest.raises(PromptError, match=message):
        encode_prompts([Problem("1 + 1?", "=2", "x:1")], tokenizer, style)


@pytest.mark.parametrize(
    ("call", "date"),
    [
        ("strftime_now('%d %b %Y')", "09 Mar 2025"),
        ('strftime_now( "%Y-%m-%d" )', "2025-03-09"),
        ("date_string", "09 Mar 2025"),
    ],
)
def test_a_prompt_does_not_change_with_the_day(toy_policy: Path, call: str, date: str) -> None:
    """As the templates of Llama 3.2, gpt-oss and Llama 3.1 ask for today."""
    tokenizer = load_tokenizer(toy_policy)
    tokenizer.chat_template = (
        f"{{% if strftime_now is defined %}}{{{{ {call} }}}}{{% endif %}} {{{{ messages[0]['content'] }}}}"
    )
    (ids,) = encode_prompts([Problem("1 + 1?", "=2", "x:1")], tokenizer, PromptStyle(date="2025-03-09"))
    assert tokenizer.decode(ids) == f"{date} 1 + 1?"


def test_a_date_that_cannot_be_pinned_is_refused(toy_policy: Path) -> None:
    tokenizer = load_tokenizer(toy_policy)
    tokenizer.chat_template = "{{ strftime_now(form) }} {{ messages[0]['content'] }}"
    with pytest.raises(PromptError, match=r"must call strftime_now with a text.*got .strftime_now\(form\)"):
        encode_prompts([Problem("1 + 1?", "=2", "x:1")], tokenizer, PromptStyle())


def test_arguments_reach_the_template(toy_policy: Path) -> None:
    tokenizer = load_tokenizer(toy_policy)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking %}<think>{% endif %}"
    for thinking, text in ((True, "1?<think>"), (False, "1?")):
        style = PromptStyle(arguments={"enable_thinking": thinking})
        (ids,) = encode_prompts([Problem("1?", "=1", "x:1")], tokenizer, style)
        assert tokenizer.decode(ids) == text


def test_a_digest_tells_how_questions_are_put(tokenizer: Any) -> None:
    styles = [
        PromptStyle(),
        PromptStyle(system="Be brief."),
        PromptStyle(instruction="Add."),
        PromptStyle(prefill="="),
        PromptStyle(template="{prompt}"),
        PromptStyle(examples=(Problem("1?", "=1", "x:1"),)),
    ]
    assert len({prompt_digest(tokenizer, style) for style in styles}) == len(styles)
    assert prompt_digest(tokenizer, PromptStyle()) == prompt_digest(tokenizer, PromptStyle())
