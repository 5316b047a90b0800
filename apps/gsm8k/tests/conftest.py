"""A policy small enough to compile in a test: the embedded tokenizer, one layer, random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hypothesis
import pytest
from flax import nnx

# `reward.functions=[own_rewards:digits]` is found as a user's module is: reward processes get this process's path.
sys.path.append(str(Path(__file__).parent))

from grpo_gsm8k.embedded.tokenizer import texts
from grpo_mesh import use_compilation_cache
from grpo_sampler import ModelConfig, Transformer, save_pretrained, split
from grpo_trainer.assemble.teach import make_tokenizer
from grpo_trainer.settings.schema import Settings

use_compilation_cache(Settings().compilation_cache)

# No test times anything: a busy machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def toy_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("toy-policy")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": make_tokenizer(folder, texts()[:1000]),
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
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig.from_file(folder)
    save_pretrained(folder, model, split(Transformer(model, rngs=nnx.Rngs(0)))[1])
    return folder
