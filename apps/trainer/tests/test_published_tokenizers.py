"""Tokenizers as their makers published them: prompts, padding, ends. `hatch run models:fetch` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import TASK

from grpo_trainer.data.prompts import PromptError, PromptStyle, encode_prompts
from grpo_trainer.data.stream import tokenize
from grpo_trainer.data.tokenizer import end_ids, load_tokenizer
from grpo_trainer.task import Problem

MODELS = Path(__file__).parents[3] / "models"
QWEN3, LLAMA3, SMOLLM2 = "tokenizer-qwen3", "tokenizer-llama3_1", "smollm2-135m-instruct"
ASK = PromptStyle(instruction="End with ####.")
PROBLEM = Problem("How many are 7 and 5?", "12", "x:1")
# As the models' cards show them.
SEEN = {
    QWEN3: "<|im_start|>user\nHow many are 7 and 5?\n\nEnd with ####.<|im_end|>\n<|im_start|>assistant\n",
    LLAMA3: "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow many are 7 and 5?\n\nEnd with ####."
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    SMOLLM2: "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHow many are 7 and 5?\n\nEnd with ####.<|im_end|>\n<|im_start|>assistant\n",
}


def load(name: str) -> Any:
    if not (MODELS / name).is_dir():
        pytest.skip(f"there is no {MODELS / name}: `hatch run models:fetch` writes it")
    return load_tokenizer(MODELS / name)


@pytest.fixture(scope="module", params=[QWEN3, LLAMA3, SMOLLM2])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name: str) -> Any:
    return load(name)


def test_the_prompt_as_the_model_sees_it(name: str, tokenizer: Any) -> None:
    (ids,) = encode_prompts([PROBLEM], tokenizer, ASK)
    assert tokenizer.decode(ids) == SEEN[name]
    bos = tokenizer.bos_token_id
    assert (bos is None) == (name == QWEN3)
    if bos is not None:
        assert (ids[0], ids[1] == bos) == (bos, False)


def test_a_text_template_begins_with_one_bos(name: str, tokenizer: Any) -> None:
    (ids,) = encode_prompts([PROBLEM], tokenizer, PromptStyle(template="Q: {prompt}\nA:"))
    # Of the three only Llama's tokenizer begins a plain text with BOS.
    begin = "<|begin_of_text|>" if name == LLAMA3 else ""
    assert tokenizer.decode(ids) == f"{begin}Q: How many are 7 and 5?\nA:"
    (again,) = encode_prompts([PROBLEM], tokenizer, PromptStyle(template=begin + "Q: {prompt}\nA:"))
    assert again == ids


def test_two_bos_are_refused() -> None:
    with pytest.raises(
        PromptError, match=r"must begin with one BOS \('<\|begin_of_text\|>'\): this one begins with two"
    ):
        encode_prompts([PROBLEM], load(LLAMA3), PromptStyle(template="<|begin_of_text|>" * 2 + "{prompt}"))


def test_added_tokens_stay_whole_in_prompts() -> None:
    tokenizer = load(QWEN3)
    (ids,) = encode_prompts([PROBLEM], tokenizer, PromptStyle(prefill="<think>"))
    assert ids[-1] == 151_667
    (closed,) = encode_prompts([PROBLEM], tokenizer, PromptStyle(arguments={"enable_thinking": False}))
    assert tokenizer.decode(closed).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_padding_needs_no_pad_token(name: str, tokenizer: Any) -> None:
    """Llama has no pad token and SmolLM2's is its end token: neither changes a prompt."""
    filler = {QWEN3: 151_643, LLAMA3: 128_009, SMOLLM2: 2}[name]
    problems = [PROBLEM, *TASK.problems("embedded", "train", 3)]
    questions = tokenize(problems, tokenizer, style=ASK, max_length=80)
    for row, length, alone in zip(
        questions.tokens_NT, questions.length_N, encode_prompts(problems, tokenizer, ASK), strict=True
    ):
        assert row[:length].tolist() == alone
        assert set(row[length:].tolist()) == {filler}


# What config.json and generation_config.json of the published instruct models say.
@pytest.mark.parametrize(
    ("name", "config", "generation", "together"),
    [
        (QWEN3, [151_645], [151_645, 151_643], (151_643, 151_645)),
        (LLAMA3, [128_001, 128_008, 128_009], [128_001, 128_008, 128_009], (128_001, 128_008, 128_009)),
        (LLAMA3, [128_001], 128_008, (128_001, 128_008, 128_009)),
        (SMOLLM2, [0], 2, (0, 2)),
    ],
)
def test_every_end_token_ends_a_completion(
    name: str, config: list[int], generation: Any, together: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_ids(load(name), tmp_path, config) == together


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    """Qwen3's unembedding has 151,936 rows and its tokenizer 151,669 tokens: a policy can draw the others."""
    tokenizer = load(QWEN3)
    ids = tokenizer("#### 12", add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode([[*ids[:1], 151_800, *ids[1:], 151_935]]) == ["#### 12"]
    questions = tokenize([PROBLEM], tokenizer, max_length=80, vocab_size=151_936)
    assert questions.take(np.array([0])).prompts.vocab_size == 151_936
