"""Writes tests/data/parity.npz: what transformers computes for small models, for the tests that have no torch.

    python libs/grpo-sampler/tests/oracles/make_reference.py

Only configurations, inputs and logits are kept. The weights come from numpy's frozen legacy generator, seeded with the
case's number, tensor by tensor in the order of names, so that the fast test makes the same ones.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _heads(query: int, kv: int, size: int | None = None) -> dict[str, Any]:
    heads: dict[str, Any] = {"num_attention_heads": query, "num_key_value_heads": kv}
    return heads if size is None else heads | {"head_dim": size}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied-gqa2": ("qwen2", _heads(4, 2) | {"tie_word_embeddings": True}),
    "qwen2-untied-gqa1": ("qwen2", _heads(4, 4) | {"tie_word_embeddings": False}),
    "qwen2-tied-gqa7": ("qwen2", _heads(14, 2) | {"tie_word_embeddings": True, "hidden_size": 56}),
    "qwen3-untied-gqa2": ("qwen3", _heads(4, 2, 16) | {"tie_word_embeddings": False}),
    "qwen3-tied-gqa7": ("qwen3", _heads(7, 1, 8) | {"tie_word_embeddings": True}),
    "llama3-tied-gqa2-scaled": ("llama", _heads(4, 2, 12) | {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "llama3-untied-gqa1": ("llama", _heads(4, 4) | {"tie_word_embeddings": False}),
}


def make_model(case: str) -> transformers.PreTrainedModel:
    """transformers' model of a case, float32, with the case's reproducible weights."""
    family, options = CASES[case]
    config = transformers.AutoConfig.for_model(family, **_SMALL | options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    random = np.random.RandomState(list(CASES).index(case))
    state = model.state_dict()
    for name in sorted(state):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = random.standard_normal(tuple(state[name].shape))
        # Scales at which every part of the block matters: attention is far from uniform, norms far from one.
        value = 1 + 0.2 * value if "norm" in name else value * (0.5 if name.endswith("bias") else 0.15)
        state[name].copy_(torch.from_numpy(value.astype(np.float32)))
    return model.eval()


def inputs(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A right-padded batch: tokens_BT and lengths."""
    random = np.random.RandomState(7)
    lengths = np.asarray([40, 17, 1, 29])
    tokens_BT = random.randint(0, vocab_size, (4, 40))
    return np.where(np.arange(40) < lengths[:, None], tokens_BT, 0).astype(np.int32), lengths


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, tokens_BT: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """transformers' logits of a right-padded batch, float32, zero at padding."""
    live = np.arange(tokens_BT.shape[1]) < lengths[:, None]
    out = model(
        input_ids=torch.from_numpy(tokens_BT).long(), attention_mask=torch.from_numpy(live).long(), use_cache=False
    )
    return out.logits.float().numpy() * live[..., None]


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for case in CASES:
        model = make_model(case)
        tokens_BT, lengths = inputs(model.config.vocab_size)
        arrays[f"{case}/config"] = np.asarray(json.dumps(model.config.to_dict()))
        # Every token by its normaliser, the last of each row by all its logits: small, and nothing escapes.
        full = logits(model, tokens_BT, lengths)
        arrays[f"{case}/last_logits"] = np.stack([full[b, n - 1] for b, n in enumerate(lengths)])
        arrays[f"{case}/logsumexp"] = np.log(np.exp(full.astype(np.float64)).sum(-1)).astype(np.float32)
    target = Path(__file__).parents[1] / "data" / "parity.npz"
    target.parent.mkdir(exist_ok=True)
    np.savez_compressed(target, **arrays)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB, {len(CASES)} cases")


if __name__ == "__main__":
    main()
