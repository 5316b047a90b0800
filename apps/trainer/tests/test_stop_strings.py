"""Stop strings over tokens: the oracle decodes ever more tokens until the text contains a string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from toy import TASK, load

from grpo_contracts import FinishReason, PolicyVersion, Rollout, SamplingParams
from grpo_sampler import load_pretrained
from grpo_trainer.assemble.teach import measure
from grpo_trainer.data.stop_strings import cut_at_stop, stop_table, token_bytes
from grpo_trainer.data.tokenizer import TokenizerError, load_tokenizer
from grpo_trainer.rewards.scoring import transcribe
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.task import Judgement, Problem

MODELS = Path(__file__).parents[3] / "models"
STRINGS = ("\n\n", "</answer>", "é", "zwei", " the", "<|im_end|>", "aab", "…")


def published(name: str) -> Any:
    if not (MODELS / name).is_dir():
        pytest.skip(f"there is no {MODELS / name}: `hatch run models:fetch` writes it")
    return load_tokenizer(MODELS / name)


def with_byte_fallback() -> Any:
    """As SentencePiece makes them: ▁ for a space, <0x0A> for a byte, and no space before the first word."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "▁the",
        "the",
        "▁",
        "zwei",
        "wei",
        "z",
        "a",
        "aa",
        "ab",
        "b",
        "é",
        "answer>",
        "</",
        "…",
        "▁zw",
        "th",
        "e",
    ]
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(
    scope="module", params=["toy", "byte fallback", "smollm2-135m-instruct", "tokenizer-qwen3", "tokenizer-llama3_1"]
)
def tokenizer(request: pytest.FixtureRequest, toy_policy: Path) -> Any:
    if request.param == "toy":
        return load_tokenizer(toy_policy)
    return with_byte_fallback() if request.param == "byte fallback" else published(request.param)


@pytest.fixture(scope="module")
def table_AV(tokenizer: Any) -> np.ndarray:
    return stop_table(tokenizer, STRINGS, len(tokenizer) + 7)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def tokens_until_stop(table_AV: np.ndarray, ids: Sequence[int]) -> int:
    state = 0
    for count, token in enumerate(ids, 1):
        state = int(table_AV[state, token])
        if state < 0:
            return count
    return 0


def check(tokenizer: Any, table_AV: np.ndarray, ids: Sequence[int]) -> None:
    texts = (decode(tokenizer, ids[:count]) for count in range(1, len(ids) + 1))
    held = (count for count, text in enumerate(texts, 1) if any(string in text for string in STRINGS))
    assert tokens_until_stop(table_AV, ids) == next(held, 0)


TEXTS = st.lists(
    st.one_of(st.sampled_from([*STRINGS, " ", "\n", "<", "</", "ans", "wer>", "z", "we", "i", "aa", "ab"]), st.text())
).map("".join)


@settings(max_examples=300)
@given(text=TEXTS)
def test_written_texts_stop_where_they_hold_a_string(tokenizer: Any, table_AV: np.ndarray, text: str) -> None:
    check(tokenizer, table_AV, tokenizer(text, add_special_tokens=False)["input_ids"])


@settings(max_examples=300)
@given(data=st.data())
def test_drawn_tokens_stop_where_their_text_holds_a_string(tokenizer: Any, table_AV: np.ndarray, data: Any) -> None:
    """Whatever a policy samples: parts of letters, special tokens, words cut anywhere."""
    near = sorted({token for string in STRINGS for token in tokenizer(string, add_special_tokens=False)["input_ids"]})
    one = st.sampled_from(near) | st.integers(0, len(tokenizer) - 1)
    ids = data.draw(st.lists(one, max_size=12))
    if "�" in decode(tokenizer, ids) and len(tokenizer) < 1_000:
        return  # with byte fallback, one byte that is no letter makes its neighbours unreadable too
    check(tokenizer, table_AV, ids)


def test_bytes_of_tokens_are_those_of_the_text(tokenizer: Any) -> None:
    pieces = token_bytes(tokenizer)
    for text in ("Zwölf Äpfel: 12 - 7 = 5\n\n#### 5", "中文 and  🙂\t<|im_end|>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(pieces[token] for token in ids).decode() == decode(tokenizer, ids)
    assert len(pieces) == len(tokenizer)


def test_ids_beyond_the_tokenizer_change_nothing(tokenizer: Any, table_AV: np.ndarray) -> None:
    beyond = len(tokenizer)
    assert table_AV.shape[1] == beyond + 7
    first, second = "zw", "ei"
    ids = [*tokenizer(first, add_special_tokens=False)["input_ids"], beyond + 3]
    ids += tokenizer(second, add_special_tokens=False)["input_ids"]
    assert tokens_until_stop(table_AV, ids) == len(ids)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>"))
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(
        TokenizerError, match=r"rollout.stop needs a tokenizer that is byte-level .* decodes by nothing"
    ):
        stop_table(words, ("a",), 2)


def test_an_empty_string_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout.stop must hold texts that are not empty"):
        load([], ["rollout.stop=['']"])


def test_rewards_see_the_text_before_the_string(toy_policy: Path) -> None:
    tokenizer = load_tokenizer(toy_policy)
    row = tokenizer("=7\n\nQ", add_special_tokens=False)["input_ids"]
    tokens = np.array([[1, *row], [1, *row]], np.int32)
    total = np.full(2, tokens.shape[1], np.int32)
    rollout = Rollout(
        tokens_BT=tokens,
        prompt_length_B=np.ones(2, np.int32),
        total_length_B=total,
        loss_mask_BT=np.arange(tokens.shape[1]) >= np.ones((2, 1)),
        logp_BT=np.zeros(tokens.shape, np.float32),
        policy_logp_BT=np.zeros(tokens.shape, np.float32),
        finish_B=np.array([FinishReason.STOP_STRING, FinishReason.LENGTH], np.int8),
        prompt_id_B=np.zeros(2, np.int32),
        sample_B=np.arange(2, dtype=np.int32),
        group_B=np.zeros(2, np.int32),
        group_size=2,
        sampling=SamplingParams(),
        policy=PolicyVersion(0, ""),
        vocab_size=len(tokenizer),
        pad_id=0,
    )
    transcript = transcribe(rollout, [Problem("3 + 4?", "=7", "x:1")], tokenizer, ("Q", "\n\n"))
    assert transcript.completions == ("=7", "=7\n\nQ")
    assert transcript.finished == (True, False)


def test_the_first_of_several_strings_cuts() -> None:
    assert cut_at_stop("a</b>c\n\n", ("\n\n", "</b>")) == "a"
    assert cut_at_stop("abc", ("\n\n",)) == "abc"


def test_a_new_policy_is_measured_with_its_task_s_stop_strings(toy_policy: Path, tmp_path: Path) -> None:
    read: list[str] = []

    class Stopping(type(TASK)):
        """The toy task, whose defaults may have stop strings."""

        folder = tmp_path

        def judge(self, completion: str, problem: Problem, *, finished: bool) -> Judgement:
            read.append(completion)
            return super().judge(completion, problem, finished=finished)

    config, params = load_pretrained(toy_policy)
    held = []
    for stop in ("[]", "['7', 'x']"):
        (tmp_path / "presets").mkdir(exist_ok=True)
        laptop = "data: {max_prompt_length: 40}\nrollout: {max_new_tokens: 16, stop: " + stop + "}\n"
        (tmp_path / "presets" / "laptop.yaml").write_text(laptop)
        measure(config, params, load_tokenizer(toy_policy), Stopping(), problems=4)
        held.append([text for text in read if "7" in text or "x" in text])
        assert len(read) == 4 * (1 + 8)
        read.clear()
    assert held[0]
    assert not held[1]
