"""Every setting of a run: its name, type, unit, default, and which combinations make sense.

The defaults suit a laptop. `grpo_trainer.settings.layers` puts the task's defaults, YAML and `--set` on top of them.
Nothing here imports jax, flax, transformers or numpy: `--print-config` answers at once.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from grpo_trainer.settings.contradictions import contradictions

__all__ = [
    "CheckpointSettings",
    "DataSettings",
    "EvalSettings",
    "FilterSettings",
    "HealthSettings",
    "LogSettings",
    "LoraSettings",
    "LossSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PassRateSettings",
    "PromptSettings",
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
Values = Annotated[tuple[str | int | float | bool, ...], Field(strict=False)]
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


class PassRateSettings(_Section):
    """Training problems by how often a policy solved them."""

    records: str = Field(
        default="",
        description="file of `eval --split train --set eval.samples=N`, which measures the rates; empty: no filter",
    )
    min: Share = Field(default=0.0, description="keep problems of which at least this share of the samples is right")
    max: Share = Field(default=1.0, description="and at most this one; others, and problems not measured, are left out")


class FilterSettings(_Section):
    """Which of the training problems; held-out ones are never filtered."""

    column: str = Field(
        default="", description="column of the data set that decides, by min and max or by values; empty: none"
    )
    min: float | None = Field(default=None, description="keep problems with at least this number in it; null: any")
    max: float | None = Field(default=None, description="keep problems with at most this number in it; null: any")
    values: Values = Field(default=(), description="keep problems with one of these in it, instead of min and max")
    pass_rate: PassRateSettings = Field(
        default=PassRateSettings(), description="training problems by how often a policy solved them"
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
    train_size: Count = Field(default=0, description="training problems to use, before data.filter; 0: all of them")
    filter: FilterSettings = Field(default=FilterSettings(), description="which of the training problems")
    max_prompt_length: Positive = Field(default=48, description="tokens of the longest prompt")
    overlong: Literal["refuse", "drop"] = Field(
        default="refuse", description="longer prompts: refuse the data set, naming the first; or drop and count them"
    )


class PromptSettings(_Section):
    """How a question is put to the policy."""

    system: str = Field(default="", description="text of the system turn; empty: none")
    instruction: str | None = Field(
        default=None,
        description="what to ask for: after the question, or around it with {question} inside; null: what the task "
        "asks for, and nothing for a policy that ships with it",
    )
    examples: Count = Field(
        default=0, description="solved problems to show first: the first of the training split, which then leave it"
    )
    examples_file: str = Field(default="", description="JSONL file of solved problems to show first, all of them")
    template: str = Field(
        default="", description="text with {prompt} in place of the model's chat template; empty: the chat template"
    )
    prefill: str = Field(default="", description="text that the completion continues, such as <think>")
    arguments: dict[str, str | int | float | bool | None] = Field(
        default={}, description="arguments of the chat template, such as {enable_thinking: false}"
    )
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = Field(
        default="2024-07-26", description="the day that templates with a date are given, so that no prompt changes"
    )


class LoraSettings(_Section):
    """Low-rank adapters: train them and leave the policy's own parameters as they are."""

    rank: Count = Field(default=0, description="rank of the adapters; 0: none, all parameters are trained")
    alpha: float = Field(default=0.0, ge=0.0, description="adapters are scaled by alpha / rank; 0: as large as rank")
    targets: Annotated[tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...], Field(strict=False)] = Field(
        default=("q", "k", "v", "o", "gate", "up", "down"), description="matrices of each layer that get an adapter"
    )
    rank_stabilized: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    adapter: str = Field(default="", description="folder of adapters in peft's layout to go on from; empty: new ones")


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
    lora: LoraSettings = Field(default=LoraSettings(), description="low-rank adapters in place of all parameters")


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
    stop: Names = Field(
        default=(),
        description="texts that end a completion, besides its end tokens; rewards see the text before them",
    )
    slots: Count = Field(default=0, description="sequences decoded at once; 0: all of a step")
    prefill_sizes: Positive = Field(
        default=1,
        description="lengths that prompts are padded to while they are computed, up to data.max_prompt_length; each is "
        "a program of its own",
    )
    mesh: str = Field(
        default="",
        description="axis sizes while completions are sampled, spelled as mesh: weights move there once a rollout, "
        "sequences are spread over dp·fsdp, and key/value heads are repeated if tp exceeds them; empty: as mesh",
    )
    refills: Count = Field(
        default=0,
        description="times a step may draw further prompts to replace groups whose rewards are all equal (DAPO's "
        "dynamic sampling); 0: never",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(self.stop):
            raise ValueError("rollout.stop must hold texts that are not empty: an empty one would end every completion")
        return self


class LossSettings(_Section):
    """What is optimised, and in which pieces."""

    kind: Literal["ppo", "gspo", "gspo-token", "cispo", "sapo", "reinforce"] = Field(
        default="ppo", description="policy loss; `ppo` is the clipped ratio of PPO and GRPO"
    )
    advantage: Literal["grpo", "dr-grpo", "rloo", "batch-std", "gdpo", "reinforce++", "reinforce++-baseline"] = Field(
        default="grpo",
        description="advantage estimator; `dr-grpo` does not divide by the group's std, `gdpo` normalises each reward "
        "function apart",
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
    sapo_positive: float | None = Field(
        default=None, gt=0.0, description="for `sapo`: temperature where the advantage is positive; null: 1"
    )
    sapo_negative: float | None = Field(
        default=None, gt=0.0, description="for `sapo`: temperature where the advantage is negative; null: 1.05"
    )
    horizon: Count = Field(
        default=0, description="for aggregation `fixed`: divisor of each sequence, in tokens; 0: rollout.max_new_tokens"
    )
    clip_advantage: float | None = Field(
        default=None, gt=0.0, description="advantages are clipped to this size; null: never"
    )
    top_entropy: float | None = Field(
        default=None, gt=0.0, lt=1.0, description="share of tokens, those of highest entropy, that learn; null: all"
    )
    drop_truncated: bool = Field(
        default=False, description="leave completions that reached the token limit out of the loss (overlong filtering)"
    )
    kl_coefficient: float = Field(default=0.0, ge=0.0, description="weight of the KL to loss.reference; 0: no KL")
    kl: Literal["k1", "k2", "k3", "k1-straight-through", "k3-straight-through"] = Field(
        default="k3", description="estimator of the KL; plain `k1` only with kl_in=reward"
    )
    kl_in: Literal["loss", "reward"] = Field(
        default="loss", description="a term of the loss, or subtracted from each completion's reward"
    )
    kl_ratio: bool = Field(
        default=False, description="multiply the KL in the loss by the importance ratio (DeepSeek-V3.2)"
    )
    reference: Annotated[str, Field(min_length=1)] = Field(
        default="none",
        description="reference policy of the KL: `none`, `initial` (a frozen copy of the first weights) or PATH",
    )
    correction: Literal["none", "truncate", "drop"] = Field(
        default="none",
        description="importance weights for the gap between sampler and trainer: clipped to the range, or 0 outside it",
    )
    correction_level: Literal["token", "sequence"] | None = Field(
        default=None, description="weights of tokens, or of whole sequences; null: token"
    )
    correction_low: float | None = Field(default=None, ge=0.0, le=1.0, description="smallest weight; null: 0")
    correction_high: float | None = Field(default=None, ge=1.0, description="largest weight; null: 2")
    entropy_coefficient: float = Field(default=0.0, ge=0.0, description="weight of the entropy bonus; 0: none")
    epochs: Positive = Field(default=1, description="passes over each rollout")
    minibatches: Positive = Field(default=1, description="optimizer updates a pass; must divide rollout.prompts")
    row_length: Count = Field(
        default=0, description="tokens of a packed training row; 0: room for two of the longest completions"
    )
    rows: Positive = Field(default=8, description="packed rows of one micro-batch")
    prompts: Count = Field(
        default=0, description="prompts of one micro-batch; 0: half its rows, and no more than a step's"
    )
    prompt_sizes: Positive = Field(
        default=1,
        description="sizes of a prompt slot, up to data.max_prompt_length: a batch uses the smallest that holds its "
        "prompts. Each one is a program of its own, compiled when it is first used",
    )
    sizes: Annotated[int, Field(ge=1, le=7)] = Field(
        default=1,
        description="sizes that a micro-batch may have, up to that above, chosen so that little padding is left. Each "
        "is a branch of one program, which takes longer to compile with each",
    )
    chunk: Count = Field(
        default=0,
        description="tokens whose logits a device has at once; 0: 512, or as many as have 256 MiB. With more of them "
        "the gradient of a large unembedding is read and written less often",
    )
    blocks: Positive = Field(
        default=4,
        description="parts of a row that may each continue another prompt: fuller rows, each part a copy of its prompt",
    )


class OptimizerSettings(_Section):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "adam", "lion", "muon", "adafactor", "rmsprop", "sgd"] = Field(
        default="adamw", description="optimizer, as optax calls it"
    )
    arguments: dict[str, float | int | bool | None] = Field(
        default={}, description="further arguments of the optimizer in optax, such as {eps: 1e-6}"
    )
    learning_rate: float = Field(default=3e-4, gt=0.0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="after the warm-up; linear and cosine end at end_learning_rate"
    )
    warmup_steps: Count = Field(default=0, description="linear warm-up, in optimizer updates")
    decay_steps: Count = Field(
        default=0,
        description="optimizer updates after which linear and cosine have ended; 0: those of the steps first asked for",
    )
    end_learning_rate: float = Field(default=0.0, ge=0.0, description="last learning rate of linear and cosine")
    weight_decay: float = Field(default=0.0, ge=0.0, description="decoupled weight decay")
    decay: Literal["all", "matrices"] = Field(
        default="all", description="what weight_decay acts on: all parameters, or neither norms nor biases"
    )
    b1: float = Field(default=0.9, ge=0.0, lt=1.0, description="decay of the first moment, where the optimizer has one")
    b2: float = Field(default=0.99, ge=0.0, lt=1.0, description="decay of the second moment, where there is one")
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
    memory: float = Field(
        default=16.0,
        ge=0.0,
        description="GiB of data that each process of your own functions may hold (on Linux); 0: no limit",
    )
    skip_none: bool = Field(
        default=False,
        description="None from a function means that it does not apply: the others alone make the reward; "
        "false: the completion has no reward",
    )
    overlong_buffer: Count = Field(
        default=0,
        description="tokens before rollout.max_new_tokens over which a penalty grows from 0 to overlong_penalty "
        "(DAPO's soft overlong punishment); 0: none",
    )
    overlong_penalty: float = Field(default=1.0, gt=0.0, description="penalty at the token limit")
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
    """Held-out accuracy: greedy, and of samples where they are asked for."""

    every: Count = Field(default=20, description="steps between evaluations; 0: only eval.before and eval.after")
    problems: Positive = Field(default=500, description="held-out problems of each evaluation")
    before: bool = Field(default=True, description="evaluate before the first step")
    after: bool = Field(default=True, description="evaluate after the last step")
    max_new_tokens: Count = Field(default=0, description="tokens of a completion; 0: as rollout.max_new_tokens")
    slots: Count = Field(default=0, description="sequences decoded at once; 0: as in rollouts")
    samples: Count = Field(
        default=0,
        description="completions sampled of each problem besides the greedy one, for mean@n, pass@k and maj@k; 0: none",
    )
    temperature: float | None = Field(
        default=None, gt=0.0, description="of the samples; null: as rollout.temperature (top_k and min_p always are)"
    )
    top_p: float | None = Field(default=None, gt=0.0, le=1.0, description="of the samples; null: as rollout.top_p")


class CheckpointSettings(_Section):
    """What survives a kill."""

    every: Count = Field(
        default=20, description="steps between checkpoints; the last step is always saved; 0: no checkpoints"
    )
    keep: Positive = Field(default=2, description="newest checkpoints kept, besides the best one")
    export: str = Field(
        default="",
        description="folder for the policy after the last step, as of the export command; `auto`: export/ in the run's "
        "folder; empty: none",
    )
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
    prompt: PromptSettings = PromptSettings()
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
        found = list(contradictions(self))
        if found:
            raise ValueError("\n".join(found))
        return self

    def on_any_devices(self) -> Self:
        """The same run laid out for whatever devices a machine has, as for looking into it elsewhere."""
        rollout = self.rollout.model_copy(update={"mesh": ""})
        return self.model_copy(update={"mesh": "auto", "rollout": rollout, "slices": (), "cpu_devices": 0})

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.steps * self.loss.epochs * self.loss.minibatches

    @property
    def row_length(self) -> int:
        """Tokens of a packed training row: as `loss.row_length` says, or room for two of the longest completions."""
        twice = 2 * self.rollout.max_new_tokens
        return self.loss.row_length or twice + -twice % self.loss.blocks
