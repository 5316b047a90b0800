"""Run verl's core_algos and TRL's GRPOTrainer._compute_loss on the shared batch and store values and gradients.

    python3 -m venv env && env/bin/pip install torch==2.13.0
    uv pip install --python env/bin/python trl==1.16.0 omegaconf tensordict codetiming ray orjson
    env/bin/pip install --no-deps verl==0.9.1
    env/bin/python write_torch_references.py

The functions called are the packages' own, unchanged; TRL's method gets a stand-in for `self` that hands it the
log-probabilities of the batch in place of a model's.
"""

from collections import defaultdict
from importlib.metadata import version
from types import SimpleNamespace

import torch
from cases import GROUP_SIZE, Store, batch
from trl import GRPOTrainer
from verl.trainer.ppo import core_algos as verl
from verl.workers.config import ActorConfig

ARRAYS = {
    name: torch.tensor(array, dtype=torch.bool if name == "mask" else torch.float64) for name, array in batch().items()
}
MASK = ARRAYS["mask"].double()
INDEX = [row // GROUP_SIZE for row in range(len(MASK))]
HORIZON = 20


def gradient_of(function):
    logp = ARRAYS["logp"].clone().requires_grad_()
    entropy = ARRAYS["entropy"].clone().requires_grad_()
    value = function(logp, entropy)
    value.backward()
    return value.detach(), logp.grad, None if entropy.grad is None else entropy.grad


AGGREGATIONS = {
    "token-mean": ("token-mean", {}),
    "seq-mean-token-mean": ("sequence-mean-token-mean", {}),
    "seq-mean-token-sum": ("sequence-mean-token-sum", {}),
    "seq-mean-token-sum-norm": ("fixed", {"horizon": HORIZON}),
}


def verl_losses(store):
    def policy(name, kind, aggregation, ours, weights=None, **settings):
        config = ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_scale_factor=HORIZON, **settings
        )
        config.global_batch_info["loss_scale_factor"] = HORIZON
        loss = verl.get_policy_loss_fn(kind)
        advantage = ARRAYS["advantage"][:, None].expand(MASK.shape)

        def value(logp, entropy):
            return loss(ARRAYS["old"], logp, advantage, MASK, aggregation, config, weights)[0]

        named, extra = AGGREGATIONS[aggregation]
        store.loss(f"verl/{name}", *gradient_of(value), aggregation=named, **extra, **ours)

    for aggregation in AGGREGATIONS:
        policy(
            f"vanilla, {aggregation}",
            "vanilla",
            aggregation,
            {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0},
            clip_ratio_low=0.2,
            clip_ratio_high=0.28,
        )
    policy(
        "vanilla, dual clip 1.5",
        "vanilla",
        "token-mean",
        {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.5},
        clip_ratio_c=1.5,
    )
    policy(
        "vanilla, rollout weights",
        "vanilla",
        "token-mean",
        {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "weight": True},
        weights=ARRAYS["weights"],
    )
    policy(
        "gspo",
        "gspo",
        "seq-mean-token-mean",
        {"kind": "gspo-token", "clip_low": 0.05, "clip_high": 0.05},
        clip_ratio_low=0.05,
        clip_ratio_high=0.05,
    )
    policy(
        "cispo",
        "cispo",
        "token-mean",
        {"kind": "cispo", "clip_low": 0.2, "clip_high": 0.3},
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
    )
    policy("sapo", "sapo", "seq-mean-token-mean", {"kind": "sapo", "sapo_temperatures": [1.0, 1.05]})
    for theirs, ours in (("k2", "k2"), ("k3", "k3"), ("k1+", "k1-straight-through"), ("k3+", "k3-straight-through")):

        def value(logp, entropy, theirs=theirs):
            kl = verl.kl_penalty(logp, ARRAYS["reference"], theirs)
            return 0.7 * verl.agg_loss(kl, MASK, "token-mean")

        store.loss(f"verl/KL {theirs}", *gradient_of(value), advantage=False, kl=ours, kl_coefficient=0.7)


def verl_advantages(store):
    outcome = torch.zeros_like(MASK)
    last = MASK.sum(1).long() - 1
    outcome[torch.arange(len(MASK)), last] = ARRAYS["reward"]
    grpo, _ = verl.compute_grpo_outcome_advantage(outcome.clone(), MASK, INDEX)
    store.advantage("verl/grpo", grpo[:, 0], "group_advantage", group_size=GROUP_SIZE, epsilon=1e-6)
    plain, _ = verl.compute_grpo_outcome_advantage(outcome.clone(), MASK, INDEX, norm_adv_by_std_in_grpo=False)
    store.advantage("verl/grpo without std", plain[:, 0], "group_advantage", group_size=GROUP_SIZE, scale="none")
    rloo, _ = verl.compute_rloo_outcome_advantage(outcome.clone(), MASK, INDEX)
    store.advantage("verl/rloo", rloo[:, 0], "rloo_advantage", group_size=GROUP_SIZE)
    _, returns = verl.compute_gae_advantage_return(ARRAYS["token_reward"], ARRAYS["value"], MASK, 0.9, 0.8)
    store.advantage("verl/gae returns", returns * MASK, "gae returns", discount=0.9, trace=0.8)
    _, returns = verl.compute_reinforce_plus_plus_outcome_advantage(
        ARRAYS["token_reward"], MASK, config=SimpleNamespace(gamma=0.9)
    )
    store.advantage("verl/reinforce++ returns", returns * MASK, "reinforce_plus_plus_advantage", discount=0.9)


def trl_losses(store):
    def policy(name, ours, loss_type, level="token", beta=0.0, bias_correction=True, high=0.2, **settings):
        def value(logp, entropy):
            accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
            args = SimpleNamespace(
                use_bias_correction_kl=bias_correction,
                delta=settings.get("delta"),
                sapo_temperature_pos=1.0,
                sapo_temperature_neg=1.05,
                steps_per_generation=1,
            )
            trainer = SimpleNamespace(
                model=SimpleNamespace(training=True),
                args=args,
                accelerator=accelerator,
                aux_loss_enabled=False,
                top_entropy_quantile=1.0,
                off_policy_mask_threshold=None,
                importance_sampling_level=level,
                beta=beta,
                loss_type=loss_type,
                epsilon_low=0.2 if level == "token" else 0.05,
                epsilon_high=high,
                use_vllm="weights" in settings,
                vllm_importance_sampling_correction=True,
                max_completion_length=HORIZON,
                current_gradient_accumulation_steps=1,
                use_adaptive_entropy=False,
                entropy_coef=settings.get("entropy_coef", 0.0),
                _entropy_bonus_enabled="entropy_coef" in settings,
                _metrics={"train": defaultdict(list)},
                _get_per_token_logps_and_entropies=lambda *a, **k: (logp, entropy, None),
            )
            trainer.accelerator.sync_gradients = False
            ids = torch.zeros(MASK.shape, dtype=torch.long)
            inputs = {
                "prompt_ids": ids[:, :1],
                "prompt_mask": ids[:, :1] + 1,
                "completion_ids": ids,
                "completion_mask": MASK,
                "advantages": ARRAYS["advantage"],
                "old_per_token_logps": ARRAYS["old"],
                "ref_per_token_logps": ARRAYS["reference"],
                "num_items_in_batch": MASK.sum(),
                "importance_sampling_ratio": settings.get("weights"),
            }
            return GRPOTrainer._compute_loss(trainer, None, inputs)

        store.loss(f"trl/{name}", *gradient_of(value), **ours)

    clip = {"clip_low": 0.2, "clip_high": 0.2}
    sequence = {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.05}
    policy("dapo", clip, "dapo")
    policy("bnpo", clip, "bnpo")
    policy("grpo", {**clip, "aggregation": "sequence-mean-token-mean"}, "grpo")
    policy("dr_grpo", {**clip, "aggregation": "fixed", "horizon": HORIZON}, "dr_grpo")
    policy("dapo, delta 1.5", {**clip, "dual_clip": 1.5}, "dapo", delta=1.5)
    policy("dapo, clip higher", {"clip_low": 0.2, "clip_high": 0.28}, "dapo", high=0.28)
    policy("dapo, KL with ratio", {**clip, "kl_coefficient": 0.5, "kl_ratio": True}, "dapo", beta=0.5)
    policy("dapo, KL without ratio", {**clip, "kl_coefficient": 0.5}, "dapo", beta=0.5, bias_correction=False)
    policy("dapo, entropy", {**clip, "entropy_coefficient": 0.3}, "dapo", entropy_coef=0.3)
    policy("dapo, sampler weights", {**clip, "weight": True}, "dapo", weights=ARRAYS["weights"])
    policy("gspo", {**sequence, "aggregation": "sequence-mean-token-mean"}, "grpo", level="sequence", high=0.05)
    policy("gspo, token-mean", sequence, "dapo", level="sequence", high=0.05)
    policy("sapo", {"kind": "sapo", "aggregation": "sequence-mean-token-mean"}, "sapo")
    policy("cispo, cap 1.4", {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.4}, "cispo", high=1.4)


if __name__ == "__main__":
    store = Store({name: version(name) for name in ("verl", "trl", "torch")})
    verl_losses(store)
    verl_advantages(store)
    trl_losses(store)
    store.write("torch_references.npz")
