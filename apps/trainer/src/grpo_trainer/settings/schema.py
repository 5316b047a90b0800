"""Every setting of a run: its name, type, unit, default, and which combinations make sense.

The defaults suit a laptop. `grpo_trainer.settings.layers` puts the task's defaults, YAML and `--set` on top of them.
Nothing here imports jax, flax, transformers or numpy: `--print-config` answers at once.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "CheckpointSettings",
    "DataSettings",
    "EvalSettings",
    "HealthSettings",
    "LogSettings",
    "LossSettings",
    "ModelSettings",
    "OptimizerSettings",
    "RewardSettings",
    "RolloutSettings",
    "RunSettings",
    "Settings",
]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["float32", "bfloat16"]
# A list in YAML, a tuple here: hashable, and nobody appends to it by accident.
Names = Annotated[tuple[str, ...], Field(strict=False)]
Weights = Annotated[tuple[float, ...], Field(strict=False)]
SliceName = Annotated[str, Field(pattern=r"^(v4|v5e|v5p|v6e)-[1-9][0-9]*$")]
Slices = Annotated[tuple[SliceName, ...], Field(strict=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class RunSettings(_Section):
    """Where the run lives."""

    dir: Annotated[str, Field(min_length=1)] = Field(
        default="auto",
        description="folder of the run; `auto`: resume the unfinished run of this config in runs/, or start one",
    )


class DataSettings(_Section):
    """Which problems."""

    source: Annotated[str, Field(min_length=1)] = Field(
        default="embedded",
        description="`embedded`, a JSONL or Parquet file, a folder with train.jsonl and test.jsonl, or a Hub id",
    )
    test_source: str = Field(
        default="", description="held-out problems, as data.source; empty: the test split of data.source"
    )
    train_size: Count = Field(default=0, description="training problems to use; 0: all of them")
    max_prompt_length: Positive = Field(default=48, description="tokens of the longest prompt")
    overlong: Literal["refuse", "drop"] = Field(
        default="refuse", description="longer prompts: refuse the data set, naming the first; or drop and count them"
    )


class ModelSettings(_Section):
    """Which policy, in which precision."""

    path: Annotated[str, Field(min_length=1)] = Field(
        default="embedded", description="`embedded`, a folder in Hugging Face layout, or a Hub id"
    )
    dtype: Dtype = Field(default="float32", description="dtype of the trained parameters")
    compute_dtype: Dtype = Field(default="float32", description="dtype of matrix products (they accumulate in float32)")
    remat: bool = Field(
        default=False, description="recompute each layer's activations in the backward pass to save memory"
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = Field(default="auto", description="attention kernel")


class RolloutSettings(_Section):
    """How completions are sampled."""

    prompts: Positive = Field(default=32, description="prompts of one step")
    group_size: Positive = Field(default=8, description="samples of one prompt (the group)")
    max_new_tokens: Positive = Field(default=64, description="tokens; a completion that reaches it is cut and counted")
    temperature: float = Field(default=1.0, ge=0.0, description="softmax temperature")
    top_k: Count = Field(default=0, description="keep the k likeliest tokens; 0: all")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="keep the likeliest tokens up to this mass; 1: all")
    min_p: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="drop tokens below this share of the likeliest; 0: none"
    )
    slots: Count = Field(default=0, description="sequences decoded at once; 0: all of a step")


class LossSettings(_Section):
    """What is optimised, and in which pieces."""

    kind: Literal["ppo", "gspo", "gspo-token", "cispo", "sapo", "reinforce"] = Field(
        default="ppo", description="policy loss; `ppo` is the clipped ratio of PPO and GRPO"
    )
    advantage: Literal["grpo", "dr-grpo", "rloo", "batch-std", "reinforce++", "reinforce++-baseline"] = Field(
        default="grpo", description="advantage estimator; `dr-grpo` does not divide by the group's std"
    )
    aggregation: Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "fixed"] = Field(
        default="token-mean",
        description="mean over all tokens; mean over sequences of token means, or of token sums; or a fixed divisor",
    )
    clip_low: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="ratios are clipped below 1 - clip_low; null: the range of the kind's paper",
    )
    clip_high: float | None = Field(
        default=None, gt=0.0, description="ratios are clipped above 1 + clip_high; null: the range of the kind's paper"
    )
    dual_clip: float | None = Field(
        default=None, gt=1.0, description="for `ppo`: cap on the ratio where the advantage is negative; null: none"
    )
    kl_coefficient: float = Field(default=0.0, ge=0.0, description="weight of the k3 KL to loss.reference; 0: no KL")
    reference: Annotated[str, Field(min_length=1)] = Field(
        default="none",
        description="reference policy of the KL: `none`, `initial` (a frozen copy of the first weights) or PATH",
    )
    entropy_coefficient: float = Field(default=0.0, ge=0.0, description="weight of the entropy bonus; 0: none")
    epochs: Positive = Field(default=1, description="passes over each rollout")
    minibatches: Positive = Field(default=1, description="optimizer updates a pass; must divide rollout.prompts")
    row_length: Count = Field(
        default=0, description="tokens of a packed training row; 0: room for two of the longest completions"
    )
    rows: Positive = Field(default=8, description="packed rows of one micro-batch")
    prompts: Count = Field(default=0, description="prompts of one micro-batch; 0: half its rows")
    blocks: Positive = Field(
        default=4,
        description="parts of a row that may each continue another prompt: fuller rows, each part a copy of its prompt",
    )


class OptimizerSettings(_Section):
    """AdamW and its learning rate."""

    learning_rate: float = Field(default=3e-4, gt=0.0, description="peak learning rate")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="after the warm-up; cosine ends at 0"
    )
    warmup_steps: Count = Field(default=0, description="linear warm-up, in optimizer updates")
    weight_decay: float = Field(default=0.0, ge=0.0, description="decoupled weight decay")
    b1: float = Field(default=0.9, ge=0.0, lt=1.0, description="decay of the first moment")
    b2: float = Field(default=0.99, ge=0.0, lt=1.0, description="decay of the second moment")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="gradients are scaled down to this global norm")


class RewardSettings(_Section):
    """What a completion is worth."""

    functions: Names = Field(default=(), description="the task's own by name, or yours as module:function")
    weights: Weights = Field(default=(), description="one for each function; empty: the task's defaults")
    timeout: float = Field(
        default=10.0,
        gt=0.0,
        description="seconds a step's completions may take your own function before it is killed; "
        "after a failure, as much again to judge them one by one",
    )
    max_unscored: Share = Field(
        default=0.1, description="the run stops when more than this share of a step has no reward"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward.weights must have one number for each of reward.functions: got {len(self.weights)} for "
                f"{len(self.functions)} functions ({', '.join(self.functions)})"
            )
        if len(set(self.functions)) != len(self.functions):
            raise ValueError(f"reward.functions must not repeat a function: got {', '.join(self.functions)}")
        if self.functions and not any(self.weights):
            raise ValueError(
                "reward.weights must not all be 0: every advantage would be 0 and nothing would be learned"
            )
        return self


class EvalSettings(_Section):
    """Held-out accuracy, decoded greedily."""

    every: Count = Field(default=20, description="steps between evaluations; 0: only eval.before and eval.after")
    problems: Positive = Field(default=500, description="held-out problems of each evaluation")
    before: bool = Field(default=True, description="evaluate before the first step")
    after: bool = Field(default=True, description="evaluate after the last step")
    max_new_tokens: Count = Field(default=0, description="tokens; 0: as rollout.max_new_tokens")


class CheckpointSettings(_Section):
    """What survives a kill."""

    every: Count = Field(
        default=20, description="steps between checkpoints; the last step is always saved; 0: no checkpoints"
    )
    keep: Positive = Field(default=2, description="newest checkpoints kept, besides the best one")
    any_version: bool = Field(
        default=False, description="go on from a checkpoint even if it was written by incompatible library versions"
    )
    any_data: bool = Field(
        default=False, description="go on from a checkpoint even if the problems are other ones, such as corrected ones"
    )


class HealthSettings(_Section):
    """When a run that goes wrong says so, or stops."""

    max_skipped: Positive = Field(
        default=3, description="updates in a row that were not finite, after which the run stops with a capsule"
    )
    max_logp_gap: float | None = Field(
        default=None,
        gt=0.0,
        description="mean |sampler - trainer| log-probability of a token, in nats, above which the run warns; "
        "null: 1e-4 for model.compute_dtype=float32, 0.05 for bfloat16",
    )
    silent_steps: Positive = Field(
        default=5, description="steps in a row without a group whose rewards differ, after which the run warns"
    )


class LogSettings(_Section):
    """Where metrics go, besides metrics.jsonl."""

    tensorboard: bool = Field(default=True, description="write TensorBoard events")
    wandb: bool = Field(default=False, description="log to Weights & Biases (needs the `wandb` extra)")
    completions: Count = Field(default=4, description="completions of each step written to completions.jsonl")


class Settings(_Section):
    """One run, resolved."""

    seed: Count = Field(default=0, description="of data order, sampling and everything else random")
    steps: Positive = Field(default=60, description="GRPO steps: one rollout and its updates each")
    cpu_devices: Count = Field(default=2, description="devices forced out of a CPU host; 0: leave as it is")
    mesh: Annotated[str, Field(min_length=1)] = Field(
        default="dp:-1", description="axis sizes such as dp:1,fsdp:-1,tp:1 (one -1), or `auto`"
    )
    slices: Slices = Field(
        default=(),
        examples=["v4-8", "v5e-16", "v5p-8", "v6e-8"],
        description="TPU slices the run is meant for (preflight compiles for each, the first is the usual one); empty: "
        "this machine",
    )
    compilation_cache: str = Field(
        default="~/.cache/grpo-trainer/jax", description="folder of compiled programs kept between runs; empty: none"
    )
    huge_pages: bool = Field(
        default=False,
        description="start again under GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (faster small updates on Linux CPUs)",
    )
    phase_timeout: float = Field(
        default=1800.0, gt=0.0, description="seconds a phase may take on many hosts before the missing ranks are named"
    )
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    rollout: RolloutSettings = RolloutSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    reward: RewardSettings = RewardSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    health: HealthSettings = HealthSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        contradictions = list(self._contradictions())
        if contradictions:
            raise ValueError("\n".join(contradictions))
        return self

    @property
    def row_length(self) -> int:
        """Tokens of a packed training row: as `loss.row_length` says, or room for two of the longest completions."""
        twice = 2 * self.rollout.max_new_tokens
        return self.loss.row_length or twice + -twice % self.loss.blocks

    def _contradictions(self) -> Iterator[str]:
        rollout, loss, optimizer = self.rollout, self.loss, self.optimizer
        if loss.kl_coefficient > 0 and loss.reference == "none":
            yield (
                f"loss.kl_coefficient is {loss.kl_coefficient:g} but loss.reference is `none`, so there is nothing to "
                "measure the KL against: set loss.reference=initial, or loss.kl_coefficient=0"
            )
        if loss.kl_coefficient == 0 and loss.reference != "none":
            yield (
                f"loss.reference is {loss.reference!r} but loss.kl_coefficient is 0, so it would do nothing: "
                "set loss.kl_coefficient (0.001 to 0.1 are usual), or loss.reference=none"
            )
        if loss.advantage in ("grpo", "dr-grpo", "rloo", "reinforce++-baseline") and rollout.group_size < 2:
            yield (
                f"rollout.group_size must be at least 2 for loss.advantage={loss.advantage}: a group of one has no "
                "other sample to be compared with, so every advantage would be 0"
            )
        if (loss.clip_low is None) != (loss.clip_high is None):
            yield (
                f"loss.clip_low and loss.clip_high must both be set or both be null: got {loss.clip_low} and "
                f"{loss.clip_high}"
            )
        if loss.clip_low is not None and loss.kind in ("sapo", "reinforce"):
            yield f"loss.clip_low and loss.clip_high do nothing for loss.kind={loss.kind}: set them to null"
        if loss.dual_clip is not None and loss.kind != "ppo":
            yield f"loss.dual_clip does nothing for loss.kind={loss.kind}: set it to null, or loss.kind=ppo"
        if rollout.temperature == 0:
            yield (
                "rollout.temperature must be above 0: greedy samples of a group are all the same, so every advantage "
                "would be 0 (evaluation is greedy anyway)"
            )
        if rollout.top_k == 1:
            yield "rollout.top_k must not be 1: samples of a group would all be the same; use 0 for all tokens"
        if rollout.prompts % loss.minibatches:
            yield (
                f"loss.minibatches must divide rollout.prompts (groups are kept whole): got {loss.minibatches} for "
                f"{rollout.prompts} prompts"
            )
        if 0 < loss.row_length < rollout.max_new_tokens:
            yield (
                f"loss.row_length must be 0 or at least rollout.max_new_tokens={rollout.max_new_tokens}, so that the "
                f"longest completion fits a row: got {loss.row_length}"
            )
        if self.row_length % loss.blocks:
            yield (
                f"loss.blocks must divide loss.row_length={loss.row_length}: got {loss.blocks}. "
                f"Use rows of {self.row_length + -self.row_length % loss.blocks} tokens"
            )
        updates = self.steps * loss.epochs * loss.minibatches
        if optimizer.warmup_steps >= updates:
            yield (
                f"optimizer.warmup_steps must be below the run's {updates} optimizer updates (steps x loss.epochs x "
                f"loss.minibatches): got {optimizer.warmup_steps}; the learning rate would never reach its peak"
            )
        if self.cpu_devices > 0 and self.slices:
            yield (
                f"cpu_devices={self.cpu_devices} forces CPU devices but slices=[{', '.join(self.slices)}] names TPU "
                "slices: set cpu_devices=0, or slices=[]"
            )
