"""The embedded tokenizer: exact round trips, loaded as any hub model's is."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_gsm8k.embedded.problems import generate
from grpo_gsm8k.embedded.tokenizer import main, texts
from grpo_gsm8k.task import TASK
from grpo_trainer.assemble.teach import make_tokenizer
from grpo_trainer.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    assert main(TASK, [str(path)]) == 0
    # What stands beside it in a policy's folder: transformers picks the tokenizer's class by it.
    (path / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def test_every_generated_text_comes_back(tokenizer: Any) -> None:
    for split in ("train", "test"):
        for problem in generate(split, 1_000, seed=5):
            for text in (problem.question, problem.answer, problem.mistaken or ""):
                assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="ascii", exclude_characters="<|>")))
def test_any_ascii_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_no_text_fails(tokenizer: Any, text: str) -> None:
    assert all(0 <= token < len(tokenizer) for token in tokenizer.encode(text))


def test_digits_are_single_and_words_whole(tokenizer: Any) -> None:
    assert tokenizer.tokenize("<<48/2=24>>24") == ["<<", "4", "8", "/", "2", "=", "2", "4", ">>", "2", "4"]
    for problem in generate("test", 300):
        words = re.findall(" [A-Za-z]+", f" {problem.question}")
        assert all(len(tokenizer.tokenize(word)) == 1 for word in words)


def test_lengths_fit_the_laptop(tokenizer: Any) -> None:
    for problem in generate("test", 1_000):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], tokenize=False, add_generation_prompt=True
        )
        assert len(tokenizer.encode(asked, add_special_tokens=False)) <= 48
        assert len(tokenizer.encode(problem.answer)) + 1 <= 64


def test_special_tokens_and_chat_template(tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    asked = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.eos_token_id) == 2


def test_making_it_again_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    assert make_tokenizer(tmp_path, texts()) % 64 == 0
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
