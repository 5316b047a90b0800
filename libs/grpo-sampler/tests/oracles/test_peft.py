"""Adapters against the package peft: each reads what the other wrote, and computes the same logits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from make_reference import inputs, logits, make_model

from grpo_sampler import (
    LoRA,
    abstract,
    init_adapters,
    join_adapters,
    load_adapters,
    load_pretrained,
    merge,
    merge_adapters,
    save_adapters,
)

F32_BOUND = 1e-4
PROJECTIONS = {"q": "q_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj", "down": "down_proj"}


def our_logits(config, params, tokens_BT, lengths):
    live = np.arange(tokens_BT.shape[1]) < lengths[:, None]
    model = merge(abstract(config)[0], params)
    hidden = model(jnp.asarray(tokens_BT), None, jnp.asarray(live, jnp.int32))
    return np.asarray(hidden @ model.unembedding.T) * live[..., None]


@pytest.mark.parametrize("case", ["qwen2-tied-gqa2", "qwen3-untied-gqa2", "llama3-tied-gqa2-scaled"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_adapters_of_peft_compute_the_same_here(case, rank_stabilized, tmp_path):
    model = make_model(case)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=list(PROJECTIONS.values()),
            use_rslora=rank_stabilized,
            task_type="CAUSAL_LM",
        ),
    )
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens_BT, lengths = inputs(model.config.vocab_size)
    theirs = logits(adapted.eval(), tokens_BT, lengths)
    base, params = load_pretrained(tmp_path / "base", dtype=jnp.float32)
    lora, adapters = load_adapters(tmp_path / "adapter", base)
    assert lora == LoRA(4, 6.0, tuple(PROJECTIONS), rank_stabilized)
    config, joined = replace(base, lora=lora), join_adapters(params, adapters)
    assert np.abs(our_logits(config, joined, tokens_BT, lengths) - theirs).max() <= F32_BOUND
    merged = our_logits(base, merge_adapters(joined, config), tokens_BT, lengths)
    assert np.abs(merged - theirs).max() <= F32_BOUND
    assert np.abs(our_logits(base, params, tokens_BT, lengths) - theirs).max() > 100 * F32_BOUND


@pytest.mark.parametrize("case", ["qwen2-tied-gqa2", "llama3-tied-gqa2-scaled"])
def test_our_adapters_compute_the_same_in_peft(case, tmp_path):
    model = make_model(case)
    model.save_pretrained(tmp_path / "base")
    base, params = load_pretrained(tmp_path / "base", dtype=jnp.float32)
    config = replace(base, lora=LoRA(3, 12.0))
    adapters = jax.tree.map(lambda leaf: leaf + 0.02, init_adapters(config, seed=0))
    save_adapters(tmp_path / "adapter", config, adapters, base=str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    tokens_BT, lengths = inputs(model.config.vocab_size)
    ours = our_logits(config, join_adapters(params, adapters), tokens_BT, lengths)
    assert np.abs(ours - logits(adapted, tokens_BT, lengths)).max() <= F32_BOUND
    assert np.abs(ours - our_logits(base, params, tokens_BT, lengths)).max() > 100 * F32_BOUND
