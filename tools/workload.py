"""What every side of a benchmark is given: the same networks, prompts and lengths. Needs only numpy."""

from typing import Any

import numpy as np

AXES = ("layers", "width", "mlp_width", "query_heads", "kv_heads", "head_size", "vocab_size")
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(AXES, (4, 128, 512, 4, 2, 32, 512))),
    "small": dict(zip(AXES, (8, 512, 1536, 8, 2, 64, 32_000))),
}
GROUP_SIZE, LONGEST_PROMPT, PAD, EOS = 8, 96, 0, 1


def workload(model: str, sequences: int, new_tokens: int, lengths: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts [P, T] right-padded, their lengths [P], and the length limit of each sequence [B], in tokens."""
    rng = np.random.default_rng(0)
    P = sequences // GROUP_SIZE
    length_P = rng.integers(64, LONGEST_PROMPT + 1, P).astype(np.int32)
    tokens_PT = rng.integers(2, MODELS[model]["vocab_size"], (P, LONGEST_PROMPT)).astype(np.int32)
    tokens_PT[np.arange(LONGEST_PROMPT) >= length_P[:, None]] = PAD
    limit_B = rng.geometric(1 / 40, sequences) if lengths == "geometric" else np.full(sequences, new_tokens)
    return tokens_PT, length_P, np.minimum(limit_B, new_tokens)


def network(model: str) -> tuple[Any, Any]:
    """This stack's Qwen3 of these sizes: its configuration, and random weights."""
    from flax import nnx

    from grpo_sampler import ModelConfig, Transformer, split

    config = ModelConfig(family="qwen3", tied=True, qk_norm=True, **MODELS[model])
    return config, split(Transformer(config, rngs=nnx.Rngs(0)))[1]


def force_devices(model: str, count: int | None) -> int:
    """Divide the CPU into `count` devices, or into what suits the model: two for `tiny`, one for `small`."""
    from grpo_mesh import force_cpu_devices

    devices = count or {"tiny": 2, "small": 1}[model]
    force_cpu_devices(devices, setting="--devices")
    return devices
