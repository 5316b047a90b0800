"""A policy small enough to train in a test: the embedded tokenizer, one layer, random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from flax import nnx

from grpo_gsm8k.embedded.tokenizer import make_tokenizer
from grpo_sampler import ModelConfig, Transformer, save_pretrained, split

# `reward.functions=[graders:digits]` is found as a user's module is: reward processes get this process's path.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def toy_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("toy-policy")
    vocabulary = make_tokenizer(folder, problems=500)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "vocab_size": vocabulary,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                "tie_word_embeddings": True,
                "hidden_act": "silu",
            }
        )
    )
    model = ModelConfig.from_file(folder)
    _, params = split(Transformer(model, rngs=nnx.Rngs(0)))
    save_pretrained(folder, model, params)
    return folder
