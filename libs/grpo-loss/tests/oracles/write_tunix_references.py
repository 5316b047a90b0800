"""Run tunix's grpo_loss_fn and advantage functions on the shared batch and store values and gradients.

    uv pip install --no-deps --target tunix google-tunix==0.1.7    (and what `import tunix.rl.algo_core` asks for)
    PYTHONPATH=tunix python write_tunix_references.py

The functions are the package's own; only its scorer, which runs a model, is replaced by the batch's log-probabilities.
"""

from importlib.metadata import version
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from cases import GROUP_SIZE, Store, batch
from flax import nnx
from tunix.rl import algo_core

ARRAYS = {name: jnp.asarray(array, None if array.dtype == bool else jnp.float32) for name, array in batch().items()}
MASK = ARRAYS["mask"].astype(jnp.float32)
NAMES = {
    "token-mean": {"aggregation": "token-mean"},
    "sequence-mean-token-mean": {"aggregation": "sequence-mean-token-mean"},
    "seq-mean-token-sum": {"aggregation": "sequence-mean-token-sum"},
    "sequence-mean-token-scale": {"aggregation": "fixed", "horizon": MASK.shape[1]},
}


def write(store):
    def policy(name, ours, algorithm="grpo", mode="token-mean", high=0.2, dual=None, beta=0.0, kl="kl", weights=None):
        config = SimpleNamespace(
            beta=beta,
            epsilon=0.2 if algorithm == "grpo" else 0.05,
            epsilon_high=high,
            epsilon_c=dual,
            loss_algo=algorithm,
            loss_agg_mode=mode,
            kl_loss_mode=kl,
            kl_clamp_value=None,
            temperature=1.0,
        )
        example = SimpleNamespace(
            prompt_ids=None,
            completion_ids=None,
            completion_mask=MASK,
            advantages=ARRAYS["advantage"],
            old_per_token_logps=ARRAYS["old"],
            ref_per_token_logps=ARRAYS["reference"],
            sampler_is_weights=weights,
        )

        def value(logp):
            algo_core.common.compute_per_token_logps = lambda *a, **k: (logp, jnp.zeros((*logp.shape, 2)))
            return algo_core.grpo_loss_fn(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), example, config, 0, 1)[0]

        loss, gradient = jax.value_and_grad(value)(ARRAYS["logp"])
        store.loss(f"tunix/{name}", loss, gradient, **NAMES[mode], **ours)

    clip = {"clip_low": 0.2, "clip_high": 0.2}
    for mode in NAMES:
        policy(f"grpo, {mode}", clip, mode=mode)
    policy("grpo, clip higher, dual 1.5", {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5}, high=0.28, dual=1.5)
    policy("grpo, k2", {**clip, "kl": "k2", "kl_coefficient": 0.5}, beta=0.5, kl="mse_kl")
    policy("grpo, k3", {**clip, "kl": "k3", "kl_coefficient": 0.5}, beta=0.5, kl="low_var_kl")
    policy("grpo, sampler weights", {**clip, "weight": True}, weights=ARRAYS["weights"])
    policy(
        "gspo-token",
        {"kind": "gspo-token", "clip_low": 0.05, "clip_high": 0.05},
        algorithm="gspo-token",
        mode="sequence-mean-token-mean",
        high=0.05,
    )
    reward = batch()["reward"]
    group = {"group_size": GROUP_SIZE}
    store.advantage("tunix/grpo", algo_core.compute_advantages(reward, GROUP_SIZE), "group_advantage", **group)
    store.advantage("tunix/rloo", algo_core.compute_rloo_advantages(reward, GROUP_SIZE), "rloo_advantage", **group)
    drgrpo = algo_core.compute_drgrpo_advantages(reward, GROUP_SIZE)
    store.advantage("tunix/drgrpo", drgrpo, "group_advantage", scale="none", **group)
    _, returns = algo_core.compute_gae_advantages(ARRAYS["token_reward"], ARRAYS["value"], MASK, 0.9, 0.8)
    store.advantage("tunix/gae returns", returns * MASK, "gae returns", discount=0.9, trace=0.8)


if __name__ == "__main__":
    store = Store({name: version(name) for name in ("google-tunix", "jax")})
    write(store)
    store.write("tunix_references.npz")
