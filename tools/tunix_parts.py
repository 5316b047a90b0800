"""The parts of google-tunix that benchmarks compare with: its network, sampler and update. Needs tunix alone."""

from collections.abc import Callable
from typing import Any

import numpy as np

from workload import EOS, GROUP_SIZE, MODELS, PAD


def tunix_network(model: str) -> Any:
    """tunix's Qwen3 of these sizes, with random weights."""
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3  # pyright: ignore[reportMissingImports]

    m = MODELS[model]
    config = qwen3.ModelConfig(
        num_layers=m["layers"],
        vocab_size=m["vocab_size"],
        embed_dim=m["width"],
        hidden_dim=m["mlp_width"],
        num_heads=m["query_heads"],
        head_dim=m["head_size"],
        num_kv_heads=m["kv_heads"],
        norm_eps=1e-6,
        rope_theta=10_000,
        use_tied_embedding=True,
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


def tunix_sampler(
    model: str, network: Any, tokens_PT: np.ndarray, length_P: np.ndarray, new_tokens: int
) -> tuple[Any, Callable[[Any, int, int], Any]]:
    """tunix's sampler, and a call that draws a group of every prompt: (sampler, seed, steps) -> its output."""
    from tunix.generate import sampler as tunix_sampler  # pyright: ignore[reportMissingImports]

    m = MODELS[model]

    class Numbers:
        """Token ids written as words, for a sampler that takes text only."""

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, ids: list[int]) -> str:
            return ""

        def bos_id(self) -> int:
            return 0

        def eos_id(self) -> int:
            return m["vocab_size"]  # never drawn: all rows run to the limit

        def pad_id(self) -> int:
            return PAD

    # The prompts are left-padded to a power of two, as tunix does by itself.
    cache = tunix_sampler.CacheConfig(128 + new_tokens, m["layers"], m["kv_heads"], m["head_size"])
    sampler = tunix_sampler.Sampler(network, Numbers(), cache)
    texts = [" ".join(map(str, tokens[:n])) for tokens, n in zip(tokens_PT, length_P) for _ in range(GROUP_SIZE)]

    def sample(sampler: Any, seed: int, steps: int) -> Any:
        return sampler(
            texts,
            max_generation_steps=steps,
            max_prompt_length=128,
            temperature=1.0,
            top_p=1.0,
            return_logprobs=True,
            seed=seed,
        )

    return sampler, sample


def tunix_update(network: Any) -> tuple[Any, Any]:
    """tunix's optimizer, and the body of its trainer's step: (network, optimizer, example) -> (loss, norm)."""
    import optax
    from flax import nnx
    from tunix.rl import algo_core  # pyright: ignore[reportMissingImports]
    from tunix.rl.grpo.grpo_learner import GRPOConfig  # pyright: ignore[reportMissingImports]

    optimizer = nnx.Optimizer(network, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6)), wrt=nnx.Param)
    algorithm = GRPOConfig(num_generations=GROUP_SIZE, beta=0.0)
    algorithm.temperature = 1.0  # its learner copies this from the rollout's settings

    def loss_fn(network, example):
        return algo_core.grpo_loss_fn(network, example, algo_config=algorithm, pad_id=PAD, eos_id=EOS)

    def train_step(network, optimizer, example):
        (loss, _), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(network, example)
        norm = optax.global_norm(gradients)
        optimizer.update(network, gradients)
        return loss, norm

    return optimizer, train_step


def tunix_example(
    prompts_BT: np.ndarray, length_B: np.ndarray, completions_BT: np.ndarray, advantage_B: np.ndarray
) -> Any:
    """What tunix's step consumes: prompts padded on the left, completions on the right."""
    import jax.numpy as jnp
    from tunix.rl.grpo.grpo_learner import TrainExample  # pyright: ignore[reportMissingImports]

    left_BT = np.full_like(prompts_BT, PAD)
    for row, (tokens, length) in enumerate(zip(prompts_BT, length_B, strict=True)):
        left_BT[row, left_BT.shape[1] - length :] = tokens[:length]
    return TrainExample(
        prompt_ids=jnp.asarray(left_BT),
        prompt_mask=jnp.asarray(left_BT != PAD),
        completion_ids=jnp.asarray(completions_BT),
        completion_mask=jnp.asarray(completions_BT != PAD),
        advantages=jnp.asarray(advantage_B),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
