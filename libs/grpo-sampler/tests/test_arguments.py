"""What a function cannot mean is refused in the library's own words."""

# Arguments of wrong types are what these tests are about.
# pyright: reportArgumentType=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from grpo_contracts import Prompts, SamplingParams
from grpo_sampler import (
    ModelConfig,
    Sampler,
    SamplerBackend,
    SamplerError,
    Transformer,
    abstract,
    log_probabilities,
    merge,
    split,
)

CONFIG = ModelConfig("qwen2", 31, 8, 12, 2, 2, 1, 4, qkv_bias=True, tied=True)
LIMITS = {"max_prompt_length": 8, "max_new_tokens": 4}
PROMPTS = Prompts.from_ids([[1, 2], [3]], vocab_size=31)
GRAPHDEF, SHAPES = abstract(CONFIG)
PARAMS = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), SHAPES)
CALL = {"group_size": 1, "seed": 0, "step": 0}
TOKENS_BT = np.ones((1, 3), np.int32)


def sampler(**changed):
    return Sampler(CONFIG, SamplingParams(), **(LIMITS | changed))


def generate(params=PARAMS, prompts=PROMPTS, **changed):
    return sampler().generate(params, prompts, **(CALL | changed))


def network():
    return merge(GRAPHDEF, PARAMS)


REFUSED = {
    "config: a dict": lambda: Sampler({"a": 1}, **LIMITS),
    "sampling: a dict": lambda: Sampler(CONFIG, {"temperature": 1}, **LIMITS),
    "length: a float": lambda: sampler(max_prompt_length=8.5),
    "length: text": lambda: sampler(max_new_tokens="4"),
    "slots: 0": lambda: sampler(slots=0),
    "pad_id: outside": lambda: sampler(pad_id=31),
    "min_new_tokens: None": lambda: sampler(min_new_tokens=None),
    "prompt_buckets: a number": lambda: sampler(prompt_buckets=8),
    "compute_dtype: unknown": lambda: sampler(compute_dtype="nonsense"),
    "compute_dtype: int32": lambda: sampler(compute_dtype=jnp.int32),
    "mesh: text": lambda: sampler(mesh="cpu"),
    "params: another width": lambda: generate(jax.tree.map(lambda leaf: leaf[..., :1], PARAMS)),
    "params: a network": lambda: generate(network()),
    "params: integers": lambda: generate(jax.tree.map(lambda leaf: leaf.astype(int), PARAMS)),
    "prompts: another vocabulary": lambda: generate(prompts=Prompts.from_ids([[1]], vocab_size=99)),
    "group_size: a float": lambda: generate(group_size=1.5),
    "seed: text": lambda: generate(seed="0"),
    "step: negative": lambda: generate(step=-1),
    "policy: text": lambda: generate(policy="v1"),
    "max_new_tokens: floats": lambda: generate(max_new_tokens=[1.5, 2.0]),
    "group_sizes: a number": lambda: sampler().warmup(PARAMS, group_sizes=8),
    "backend: a config": lambda: SamplerBackend(CONFIG),
    "backend: policy text": lambda: SamplerBackend(sampler()).update_weights(PARAMS, "v1"),
    "logits: one axis": lambda: log_probabilities(jnp.zeros(5), SamplingParams()),
    "logits: integers": lambda: log_probabilities(jnp.zeros((1, 5), int), SamplingParams()),
    "logits: NaN": lambda: log_probabilities(jnp.full((1, 5), jnp.nan), SamplingParams()),
    "rngs: a number": lambda: Transformer(CONFIG, rngs=0),
    "config: of a network": lambda: Transformer({"a": 1}, rngs=nnx.Rngs(0)),
    "param_dtype: int32": lambda: abstract(CONFIG, param_dtype="int32"),
    "abstract: a dict": lambda: abstract({"a": 1}),
    "merge: no parameters": lambda: merge(GRAPHDEF, {"a": 1}),
    "merge: exchanged": lambda: merge(PARAMS, GRAPHDEF),
    "split: parameters": lambda: split(PARAMS),
    "tokens: floats": lambda: network()(TOKENS_BT * 1.0),
    "tokens: one axis": lambda: network()(TOKENS_BT[0]),
    "tokens: outside": lambda: network()(TOKENS_BT * 31),
    "tokens: negative": lambda: network()(-TOKENS_BT),
    "positions: another shape": lambda: network()(TOKENS_BT, np.ones((1, 2), np.int32)),
    "segments: another shape": lambda: network()(TOKENS_BT, None, np.ones(3, np.int32)),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_meant_is_refused(how):
    with pytest.raises(SamplerError) as caught:
        REFUSED[how]()
    assert len(str(caught.value)) < 500


def test_only_the_device_knows_tokens_inside_jit_and_without_jit_they_are_checked():
    forward = jax.jit(lambda tokens_BT: network()(tokens_BT))
    forward(TOKENS_BT * 31)
    with (
        jax.disable_jit(),
        pytest.raises(SamplerError, match=r"must be in \[0, 31\), the vocabulary: got 31 at \[0, 0\]"),
    ):
        forward(TOKENS_BT * 31)


def test_prompts_and_rows_are_checked_and_padding_is_not():
    ones = np.ones((1, 4), np.int32)
    row = {"positions_RT": ones, "segment_RT": ones * [1, 1, 1, 0], "prompt_RC": np.zeros((1, 1), np.int32)}
    rest = {"prompt_length_P": np.full(1, 3), **row}
    padded = ones * [1, 1, 1, 99]
    network().with_prompts(padded, tokens_RT=padded, **rest)
    for prompts, rows in ((ones * 99, ones), (ones, ones * 99)):
        with pytest.raises(SamplerError, match="the vocabulary: got 99"):
            network().with_prompts(prompts, tokens_RT=rows, **rest)
