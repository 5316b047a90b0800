"""A completion ends with the first token that completes a stop string; the oracle searches the text."""

import functools
from typing import Any

import numpy as np
import pytest
from flax import nnx

from grpo_contracts import FinishReason, Prompts, SamplingParams, validate
from grpo_sampler import ModelConfig, Sampler, SamplerError, Transformer, split

CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=24,
    width=16,
    mlp_width=32,
    layers=1,
    query_heads=4,
    kv_heads=2,
    head_size=8,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-6,
    tied=True,
    qkv_bias=True,
    qk_norm=False,
    max_positions=128,
)
END = 23
# What each token stands for: stop strings begin and end within tokens, and span them.
PIECES = ["", "a", "b", "c", "ab", "ba", "ca", "xaby", "bc", "abca", *"defghijklmnopq"]
LIMITS: dict[str, Any] = {"max_prompt_length": 4, "max_new_tokens": 40, "slots": 48, "sizes": 1}
PROMPTS = Prompts(
    np.array([[3, 1, 2, 4], [5, 6, 0, 0]] * 6, np.int32),
    np.array([4, 2] * 6, np.int32),
    np.arange(12, dtype=np.int32),
    24,
    0,
)
STRINGS = ("abab", "cc", "bca")


@pytest.fixture(scope="module")
def params() -> Any:
    return split(Transformer(CONFIG, rngs=nnx.Rngs(0)))[1]


def table_of(strings: tuple[str, ...]) -> np.ndarray:
    """A state is what was read since the start, or its last three letters: longer ends can be no part of a match."""
    ends, number = [""], {"": 0}
    rows = []
    for end in ends:  # grows while it is walked
        row = []
        for piece in PIECES:
            read = end + piece
            if any(string in read for string in strings):
                row.append(-1)
                continue
            kept = read[-3:]
            if kept not in number:
                number[kept] = len(ends)
                ends.append(kept)
            row.append(number[kept])
        rows.append(row)
    return np.array(rows)


@functools.cache  # programs compile once for all tests
def sampler_of(*, stops: bool = False, **options: Any) -> Sampler:
    table_AV = table_of(STRINGS) if stops else None
    arguments: dict[str, Any] = LIMITS | {"stop_table_AV": table_AV} | options
    return Sampler(CONFIG, SamplingParams(stop_ids=(END,)), **arguments)


def generate(sampler: Sampler, params: Any) -> Any:
    rollout = sampler.generate(params, PROMPTS, group_size=4, seed=1, step=0)
    validate(rollout, level="values")
    return rollout


def expected_length(tokens: list[int]) -> tuple[int, FinishReason]:
    text = ""
    for count, token in enumerate(tokens, 1):
        text += PIECES[token]
        if token == END:
            return count, FinishReason.STOP
        if any(string in text for string in STRINGS):
            return count, FinishReason.STOP_STRING
    return len(tokens), FinishReason.LENGTH


@pytest.mark.parametrize("options", [{}, {"slots": 10, "sizes": 2}, {"unroll": False}], ids=["all", "few", "looped"])
def test_completions_end_where_the_text_first_holds_a_stop_string(params, options):
    free, stopped = (
        generate(sampler_of(**options), params),
        generate(sampler_of(**options, stops=True), params),
    )
    reasons = set()
    for b in range(48):
        span = slice(free.prompt_length_B[b], free.total_length_B[b])
        length, reason = expected_length(free.tokens_BT[b, span].tolist())
        reasons.add(reason)
        assert (stopped.completion_length_B[b], stopped.finish_B[b]) == (length, reason)
        kept = slice(span.start, span.start + length)
        # The tokens and their log-probabilities are those of the run without stop strings, and all of them count.
        np.testing.assert_array_equal(stopped.tokens_BT[b, kept], free.tokens_BT[b, kept])
        np.testing.assert_allclose(stopped.logp_BT[b, kept], free.logp_BT[b, kept], atol=1e-5)
        assert stopped.loss_mask_BT[b].sum() == stopped.loss_mask_BT[b, kept].sum() == length
    assert reasons == set(FinishReason)


def test_streamed_sequences_say_why_they_ended(params):
    sampler = sampler_of(stops=True)
    rollout = generate(sampler, params)
    for one in sampler.stream(params, PROMPTS, group_size=4, seed=1, step=0):
        assert one.finish == rollout.finish_B[4 * one.group + one.sample]


def test_a_string_completed_by_the_last_token_allowed_is_a_stop(params):
    table_AV: Any = np.full((1, 24), -1)  # every token completes a string
    table_AV[:, END] = 0
    one = Sampler(CONFIG, SamplingParams(stop_ids=(END,)), **LIMITS | {"max_new_tokens": 1, "stop_table_AV": table_AV})
    rollout = generate(one, params)
    ended = rollout.tokens_BT[np.arange(48), rollout.total_length_B - 1] == END
    np.testing.assert_array_equal(rollout.finish_B, np.where(ended, FinishReason.STOP, FinishReason.STOP_STRING))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_table_AV": np.zeros((2, 23), int)}, r"shape \(states, 24\)"),
        ({"stop_table_AV": np.zeros((2, 24))}, "must hold integers"),
        ({"stop_table_AV": np.zeros((0, 24), int)}, r"of shape \(0, 24\)"),
        ({"stop_table_AV": np.full((2, 24), 2)}, r"states in \[-1, 2\)"),
        ({"stop_table_AV": np.full((2, 24), -2)}, r"states in \[-1, 2\)"),
        ({"stop_table_AV": np.zeros((2, 24), int), "min_new_tokens": 1}, "min_new_tokens must be 0"),
    ],
)
def test_a_table_that_is_none_is_refused(options, message):
    with pytest.raises(SamplerError, match=message):
        Sampler(CONFIG, **LIMITS | options)


def test_without_stop_strings_the_program_takes_no_table(params):
    def text(*, stops: bool) -> str:
        return sampler_of(stops=stops).programs(params, group_size=4)["decode"]().compile().as_text() or ""

    assert f"s16[{len(table_of(STRINGS))},24]" in text(stops=True)
    assert "s16" not in text(stops=False)
