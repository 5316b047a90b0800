"""The sampler: prompts in, completions with exact log-probabilities out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from grpo_contracts import PolicyVersion, Prompts, Rollout, SamplingParams
from grpo_sampler._arguments import brief, check_floating, check_int
from grpo_sampler._cache import PREFIX, prefix_shares
from grpo_sampler._completions import Completions, FinishedSequence
from grpo_sampler._config import ModelConfig, check_config
from grpo_sampler._engine import Engine, Plan
from grpo_sampler._errors import SamplerError
from grpo_sampler._kernels import resolve_attention
from grpo_sampler._layout import check_params
from grpo_sampler._partition import TENSOR_AXIS, decoding_kv_heads, decoding_sizes
from grpo_sampler._placement import Placement
from grpo_sampler._programs import Programs
from grpo_sampler._request import Limits, Request, make_request
from grpo_sampler._sampling import is_filtered, sampling_arrays
from grpo_sampler._slots import Shape, few_rows, shapes_for


class Sampler:
    """Draws groups of completions from a policy.

    Every prompt is computed once and shared by its group. Finished sequences free their slots for waiting ones, and a
    draining batch shrinks. Shapes come from a small fixed set: for each group size, one program per batch size.

    A sequence's random numbers depend only on (seed, step, prompt id, sample, position). The same call gives the same
    bits. In another order, slot, batch or mesh, logits may differ by float32 rounding, so log-probabilities agree to
    about 1e-6, and a token differs only if its uniform number falls into that gap.

    Args:
        config: the model.
        sampling: how to draw tokens, unless a call overrides it; `SamplingParams()` if None.
        max_prompt_length: longest prompt, in tokens.
        max_new_tokens: longest completion, in tokens.
        slots: sequences that decode at once, over all devices.
        sizes: maximum number of batch sizes, each half of the one before, that a draining batch passes through. For a
            tiny model on a CPU the last one is a quarter, because a step of 16 rows takes about as long as one of 8.
        pad_id: token id of the padding in rollouts.
        min_new_tokens: tokens before which stop ids are forbidden and the distribution is renormalized.
        prompt_buckets: padded prompt lengths, the longest at least `max_prompt_length`; a batch uses the shortest that
            its longest prompt fits in. None for one bucket. Each has programs of its own, for decoding too.
        prefill_sizes: lengths that prompts are padded to while they are computed, equal steps up to the bucket; a few
            prompts of about one length are computed together, at the shortest that holds them. Each is one program.
        compute_dtype: type of weights, cache and activations while decoding; None for the type of the parameters.
        unroll: unroll the layers instead of looping over them: about twice as fast on a CPU, slower to compile. None
            for True on a CPU.
        attention: kernel for prompts, as for `Transformer`; with a `tp` axis `xla` replaces `cudnn`.
        mesh: devices to use; rows are split over all axes but `tp`. It need not be the parameters' own mesh, as long as
            both list the same devices in the same order. None for the device that the parameters are on.
        stop_table_AV: stop strings, as an automaton over tokens that starts in state 0: the next state for each state
            and token, -1 where the token completes a stop string, which ends the completion. None for no stop strings.
    Raises:
        SamplerError: sizes or sampling parameters that are invalid.
    """

    def __init__(
        self,
        config: ModelConfig,
        sampling: SamplingParams | None = None,
        *,
        max_prompt_length: int,
        max_new_tokens: int,
        slots: int = 128,
        sizes: int = 4,
        pad_id: int = 0,
        min_new_tokens: int = 0,
        prompt_buckets: Sequence[int] | None = None,
        prefill_sizes: int = 1,
        compute_dtype: Any = None,
        unroll: bool | None = None,
        attention: str = "auto",
        mesh: Mesh | None = None,
        stop_table_AV: np.ndarray | None = None,
    ) -> None:
        check_config(config)
        for name, value in (
            ("max_prompt_length", max_prompt_length),
            ("max_new_tokens", max_new_tokens),
            ("slots", slots),
            ("sizes", sizes),
            ("prefill_sizes", prefill_sizes),
        ):
            check_int(name, value, 1)
        check_int("pad_id", pad_id, 0, config.vocab_size - 1)
        if check_int("min_new_tokens", min_new_tokens, 0) > max_new_tokens:
            raise SamplerError(
                f"min_new_tokens must lie in [0, max_new_tokens={max_new_tokens}]: got {min_new_tokens}. "
                "Lower min_new_tokens or raise max_new_tokens."
            )
        if max_prompt_length + max_new_tokens > config.max_positions:
            raise SamplerError(
                f"max_prompt_length + max_new_tokens must be at most the model's max_positions="
                f"{config.max_positions}: got {max_prompt_length} + {max_new_tokens}."
            )
        if not isinstance(prompt_buckets, Sequence | None) or isinstance(prompt_buckets, str):
            raise SamplerError(f"prompt_buckets must be a list of lengths: got {brief(prompt_buckets)}.")
        buckets = tuple(
            sorted(check_int("prompt_buckets", bucket, 1) for bucket in prompt_buckets or (max_prompt_length,))
        )
        if buckets[-1] < max_prompt_length:
            raise SamplerError(f"prompt_buckets must reach max_prompt_length={max_prompt_length}: got {buckets}.")
        if not isinstance(mesh, Mesh | None):
            raise SamplerError(f"mesh must be a jax.sharding.Mesh or None: got {brief(mesh)}.")
        if mesh is not None:
            _check_tensor(config, mesh)
        self._stop_table_AV = None if stop_table_AV is None else _checked(stop_table_AV, config, min_new_tokens)
        self.config = config
        self.sampling = SamplingParams() if sampling is None else sampling
        self.max_prompt_length, self.max_new_tokens, self.min_new_tokens = (
            max_prompt_length,
            max_new_tokens,
            min_new_tokens,
        )
        self.slots, self.sizes, self.pad_id, self.mesh = slots, sizes, pad_id, mesh
        self._buckets = tuple(-(-bucket // 8) * 8 for bucket in buckets)
        self._prefill_sizes, self._columns = prefill_sizes, -(-max_new_tokens // 8) * 8
        self.compute_dtype = None if compute_dtype is None else check_floating("compute_dtype", compute_dtype)
        self._attention = attention
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self._unroll = platform == "cpu" if unroll is None else unroll
        self._programs = Programs()
        self._engines: dict[Any, Engine] = {}
        sampling_arrays(self.sampling, config.vocab_size, min_new_tokens)

    @property
    def compile_count(self) -> int:
        """Programs compiled so far."""
        return self._programs.count

    @property
    def prefill_positions(self) -> tuple[int, int]:
        """Token positions of prompts that all calls so far have computed, and how many of them hold a token."""
        computed, live = sum((engine.prefilled for engine in self._engines.values()), np.zeros(2, np.int64)).tolist()
        return computed, live

    def warmup(
        self,
        params: Any,
        *,
        group_sizes: Sequence[int] = (1,),
        sampling: Sequence[SamplingParams] | None = None,
        streaming: bool = True,
    ) -> None:
        """Compiles everything that later calls can need, and waits for it.

        Args:
            params: the policy's parameters, or `jax.ShapeDtypeStruct`s with their shapes and shardings.
            group_sizes: group sizes that calls will use; each has its own programs.
            sampling: sampling parameters that calls will use; only whether they filter matters. None for the sampler's.
            streaming: whether batches may exceed the slots.

        Raises:
            SamplerError: parameters of another model.
        """
        if isinstance(sampling, SamplingParams):
            raise SamplerError("sampling must be a sequence of SamplingParams: got one. Write sampling=[sampling].")
        check_params(params, self.config)
        if not isinstance(group_sizes, Sequence) or isinstance(group_sizes, str):
            raise SamplerError(f"group_sizes must be a list: got {brief(group_sizes)}. Write group_sizes=[8].")
        for group_size in group_sizes:
            check_int("group_sizes", group_size, 1)
        futures = []
        filters = sorted({is_filtered(one, self.min_new_tokens) for one in sampling or (self.sampling,)})
        for bucket in self._buckets:
            engine = self._engine(params, bucket)
            for group_size in group_sizes:
                for filtered in filters:
                    for waiting in (False, True) if streaming else (False,):
                        shapes = self._shapes(engine, group_size, waiting)
                        for first in range(len(shapes)):
                            if shapes[first].share == group_size:
                                futures += engine.start_compiling(shapes, filtered=filtered, first=first)
                        futures += engine.start_shrinking(shapes, filtered=filtered)
        for future in futures:
            future.result()

    def programs(
        self, params: Any, *, group_size: int, sampling: SamplingParams | None = None, streaming: bool = False
    ) -> dict[str, Callable[[], Lowered]]:
        """The programs of a call that fills all slots, to plan memory and time, also for devices that are not present.

        Args:
            params: the policy's parameters, or `jax.ShapeDtypeStruct`s with their shapes and shardings.
            group_size: samples of one prompt.
            sampling: as for `generate`; only whether they filter matters.
            streaming: whether the batch exceeds the slots.
        Returns:
            Functions that trace and lower, by name, in the order in which the programs first run: `weights` (lays the
            parameters out for decoding), `cache` (allocates it), `prefill` (prompts into the cache), `decode` (a chunk
            of steps, in a loop whose end depends on the data) and, if there is a smaller size, `shrink` (the cache of
            a draining batch). Each is the largest of its kind, for the longest prompts.

        Raises:
            SamplerError: parameters of another model.
        """
        check_params(params, self.config)
        engine = self._engine(params, self._buckets[-1])
        filtered = is_filtered(self.sampling if sampling is None else sampling, self.min_new_tokens)
        return engine.programs(self._shapes(engine, group_size, streaming), filtered=filtered)

    @property
    def branch_shares(self) -> dict[str, tuple[float, ...]]:
        """How often a decode program takes each branch of a conditional, by the conditional's `jax.named_scope`.

        Fractions of the steps of rows that start together and run to their limit, for `grpo_mesh.compile_report`, which
        otherwise counts a read of the whole cache in every step.
        """
        return {PREFIX: prefix_shares(self._columns, fine=not self._unroll)}

    def allocation(self, params: Any, *, group_size: int, streaming: bool = False) -> tuple[Any, Any]:
        """What a call that fills all slots allocates for its whole length, to plan memory before anything is compiled.

        Args:
            params: as for `programs`.
            group_size: samples of one prompt.
            streaming: whether the batch exceeds the slots.
        Returns:
            (weights laid out for decoding, cache): trees of `jax.ShapeDtypeStruct`s with shardings.

        Raises:
            SamplerError: parameters of another model.
        """
        check_params(params, self.config)
        engine = self._engine(params, self._buckets[-1])
        return engine.allocation(self._shapes(engine, group_size, streaming)[0])

    def generate(
        self,
        params: Any,
        prompts: Prompts,
        *,
        group_size: int,
        seed: int,
        step: int,
        policy: PolicyVersion | None = None,
        sampling: SamplingParams | None = None,
        max_new_tokens: np.ndarray | None = None,
    ) -> Rollout:
        """Draws `group_size` completions of every prompt.

        Args:
            params: the policy's parameters, a plain nested dictionary.
            prompts: right-padded token ids.
            group_size: samples of one prompt.
            seed: 0 to 2**64 - 1.
            step: optimizer step; with seed, prompt id and sample index it determines the random numbers.
            policy: version of the parameters, recorded in the rollout; `PolicyVersion(step, "")` if None.
            sampling: replaces the sampler's own for this call.
            max_new_tokens: limits in tokens, per prompt [P] or per sequence [P, G]; None for the sampler's own.
        Returns:
            P * group_size rows of `max_prompt_length + max_new_tokens` tokens, those of a group adjacent.
        Raises:
            SamplerError: parameters of another model, or prompts, limits or sampling parameters that do not fit.
            ContractError: `prompts` break the contract.
        """
        check_params(params, self.config)
        if not isinstance(policy, PolicyVersion | None):
            raise SamplerError(f"policy must be a grpo_contracts.PolicyVersion or None: got {brief(policy)}.")
        request = self._request(prompts, max_new_tokens, group_size=group_size, sampling=sampling, seed=seed, step=step)
        completions = Completions(request, self.max_new_tokens)
        for chunk in self._chunks(params, request):
            completions.add(chunk)
        length, policy = self.max_prompt_length + self.max_new_tokens, policy or PolicyVersion(step, "")
        return completions.rollout(policy, length=length, vocab_size=self.config.vocab_size, pad_id=self.pad_id)

    def stream(
        self,
        params: Any,
        prompts: Prompts,
        *,
        group_size: int,
        seed: int,
        step: int,
        sampling: SamplingParams | None = None,
        max_new_tokens: np.ndarray | None = None,
    ) -> Iterator[FinishedSequence]:
        """Yields the sequences that `generate` would draw, each as soon as it has ended.

        Args:
            params: the policy's parameters.
            prompts: right-padded token ids.
            group_size: samples of one prompt.
            seed: see `generate`.
            step: see `generate`.
            sampling: see `generate`.
            max_new_tokens: see `generate`.
        Yields:
            Sequences, in the order in which they end.
        Raises:
            SamplerError: see `generate`; raised by the call, not by the first element.
        """
        check_params(params, self.config)
        request = self._request(prompts, max_new_tokens, group_size=group_size, sampling=sampling, seed=seed, step=step)
        return self._finished(params, request)

    def _finished(self, params: Any, request: Request) -> Iterator[FinishedSequence]:
        completions = Completions(request, self.max_new_tokens)
        for chunk in self._chunks(params, request):
            completions.add(chunk)
            for b in chunk.finished.request_F.tolist():
                yield completions.finished(b)

    def _request(
        self, prompts: Prompts, max_new_tokens: Any, *, sampling: SamplingParams | None, **identity: int
    ) -> Request:
        limits = Limits(self.config.vocab_size, self.max_prompt_length, self.min_new_tokens, self.max_new_tokens)
        return make_request(
            prompts, max_new_tokens, sampling=self.sampling if sampling is None else sampling, limits=limits, **identity
        )

    def _chunks(self, params: Any, request: Request) -> Iterator[Any]:
        bucket = next(size for size in self._buckets if size >= request.length_P.max())
        engine = self._engine(params, bucket)
        need = -(-len(request.length_P) * request.group_size // engine.placement.shards)
        shapes = self._shapes(engine, request.group_size, streaming=need > self._shard_slots(engine))
        # A small batch starts in a small shape that still shares prompts.
        first = max(
            i for i, shape in enumerate(shapes) if i == 0 or (need <= shape.rows and shape.share == shapes[0].share)
        )
        return engine.run(params, request, shapes, first)

    def _engine(self, params: Any, bucket: int) -> Engine:
        leaves, tree = jax.tree.flatten(params)
        key = bucket, tree, tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
        if key not in self._engines:
            dtype = self.compute_dtype or params["embed"].dtype
            placement = Placement(self.mesh, params)
            attention = resolve_attention(self._attention, self.config, jnp.dtype(dtype), self.mesh)
            if attention == "cudnn" and placement.tensor > 1:
                attention = "xla"  # cuDNN's kernel cannot be split over heads
            repeated = replace(self.config, kv_heads=decoding_kv_heads(self.config, placement.tensor))
            parts = (-(-bucket * part // self._prefill_sizes) for part in range(1, self._prefill_sizes + 1))
            prefills = tuple(sorted({-(-part // 8) * 8 for part in parts}))
            plan = Plan(repeated, jnp.dtype(dtype), self._unroll, bucket, prefills, self._columns, attention)
            self._engines[key] = Engine(plan, placement, self._programs, params, self._stop_table_AV)
        return self._engines[key]

    def _shard_slots(self, engine: Engine) -> int:
        return -(-self.slots // engine.placement.shards)

    def _shapes(self, engine: Engine, group_size: int, streaming: bool) -> tuple[Shape, ...]:
        rows, few = self._shard_slots(engine), few_rows(self.config, unroll=self._unroll)
        return shapes_for(rows, group_size, self.sizes, streaming=streaming, few=few)


def _check_tensor(config: ModelConfig, mesh: Mesh) -> None:
    tensor, sizes = mesh.shape.get(TENSOR_AXIS, 1), decoding_sizes(config, mesh.size)
    if tensor not in sizes:
        raise SamplerError(
            f"mesh must have a {TENSOR_AXIS} axis of one of the sizes {', '.join(map(str, sizes))}, which divide the "
            f"model's {config.query_heads} query heads, {config.mlp_width} MLP columns and {config.vocab_size} tokens: "
            f"got {tensor}."
        )


def _checked(stop_table_AV: np.ndarray, config: ModelConfig, min_new_tokens: int) -> np.ndarray:
    table_AV = np.asarray(stop_table_AV)
    if table_AV.ndim != 2 or table_AV.shape[1] != config.vocab_size or table_AV.dtype.kind != "i" or not len(table_AV):
        raise SamplerError(
            f"stop_table_AV must hold integers of shape (states, {config.vocab_size}), a column for each token of the "
            f"model: got {table_AV.dtype} of shape {table_AV.shape}."
        )
    states = len(table_AV)
    if table_AV.min() < -1 or table_AV.max() >= states or states > np.iinfo(np.int16).max:
        raise SamplerError(
            f"stop_table_AV must hold states in [-1, {states}), at most {np.iinfo(np.int16).max} of them: "
            f"got {table_AV.min()} to {table_AV.max()}."
        )
    if min_new_tokens:
        raise SamplerError(
            f"min_new_tokens must be 0 with stop strings, which no token alone could be kept from completing: "
            f"got {min_new_tokens}."
        )
    return table_AV.astype(np.int16)
