"""A published checkpoint, SmolLM2-135M-Instruct, against transformers: logits, and greedy text token by token."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from grpo_contracts import Prompts, SamplingParams
from grpo_sampler import Sampler, abstract, load_pretrained, merge

FOLDER = Path(__file__).parents[4] / "models/smollm2-135m-instruct"
QUESTIONS = (
    "Anna has 9 apples and gives 3 to Ben. How many apples does Anna have left?",
    "Write a short poem about the sea.",
    "Wie heißt die Hauptstadt von Frankreich?",
)
NEW = 64
# Of the largest logit: float32 has 24 bits, and errors add up over 30 layers.
RELATIVE_BOUND = 2e-5

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"there is no {FOLDER}: `hatch run models:fetch smollm2-135m-instruct` writes it"
)


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours():
    return load_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def greedy(theirs, prompts):
    """transformers' continuation of each prompt, the end token included."""
    texts = []
    for ids in prompts:
        with torch.inference_mode():
            out = theirs.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        texts.append(out[0, len(ids) :].tolist())
    return texts


def test_logits(ours, theirs, prompts, greedy, record_property):
    config, params = ours
    graphdef, _ = abstract(config)
    rows = [ids + text for ids, text in zip(prompts, greedy)]
    width = max(map(len, rows))
    tokens_BT = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    live_BT = np.arange(width) < np.array([len(row) for row in rows])[:, None]

    @jax.jit
    def run(params, tokens_BT, segment_BT):
        model = merge(graphdef, params)
        hidden_BTD = model(tokens_BT, segment_BT=segment_BT)
        return jnp.einsum("BTD,VD->BTV", hidden_BTD, model.unembedding, preferred_element_type=jnp.float32)

    got = np.asarray(run(params, tokens_BT, live_BT.astype(np.int32)))
    for b, row in enumerate(rows):
        with torch.inference_mode():
            expected = theirs(torch.tensor([row])).logits[0].numpy()
        error, scale = np.abs(got[b, : len(row)] - expected).max(), np.abs(expected).max()
        record_property(f"logits {b}", float(error))
        print(f"largest difference {error:.1e} at a scale of {scale:.1f}")
        assert error <= RELATIVE_BOUND * scale


def test_greedy_text(ours, prompts, greedy, tokenizer):
    config, params = ours
    length = -(-max(map(len, prompts)) // 8) * 8
    greedily = SamplingParams(temperature=0.0, stop_ids=(tokenizer.eos_token_id,))
    sampler = Sampler(config, greedily, max_prompt_length=length, max_new_tokens=NEW, slots=len(prompts), sizes=1)
    given = Prompts.from_ids(prompts, vocab_size=config.vocab_size, pad_id=0)
    rollout = sampler.generate(params, given, group_size=1, seed=0, step=0)
    for b, expected in enumerate(greedy):
        got = rollout.tokens_BT[b, rollout.prompt_length_B[b] : rollout.total_length_B[b]].tolist()
        print(repr(tokenizer.decode(got)))
        assert got == expected
