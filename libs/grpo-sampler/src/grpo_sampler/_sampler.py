"""The sampler: prompts in, sequences with exact log-probabilities out."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from grpo_contracts import PolicyVersion, Prompts, Rollout, SamplingParams
from grpo_sampler._completions import Completions, FinishedSequence
from grpo_sampler._config import ModelConfig
from grpo_sampler._engine import Engine, Plan
from grpo_sampler._errors import SamplerError
from grpo_sampler._kernels import resolve_attention
from grpo_sampler._layout import check_params
from grpo_sampler._placement import Placement
from grpo_sampler._programs import Programs
from grpo_sampler._request import Limits, Request, make_request
from grpo_sampler._sampling import is_filtered, sampling_arrays
from grpo_sampler._slots import Shape, few_rows, shapes_for


class Sampler:
    """Draws groups of completions from a policy.

    Every prompt is computed once and shared by its group; sequences that end leave, waiting ones enter, and a draining
    batch shrinks. Shapes come from a small fixed set: per group size one program for each of a few batch sizes.

    A sequence's random numbers depend on (seed, step, prompt id, sample, position) alone. The same call gives the same
    bits. In another order, slot, company, batch shape or mesh logits may differ by float32 rounding, so
    log-probabilities agree to about 1e-6 and a token differs only where its uniform number falls into that gap.

    Args:
        config: the model.
        sampling: what to draw from, unless a call says otherwise.
        max_prompt_length: longest prompt, in tokens.
        max_new_tokens: longest completion, in tokens.
        slots: sequences that decode at once, over all devices.
        sizes: most batch sizes compiled, each half of the one before; a draining batch passes through them. For a tiny
            model on a CPU, a quarter is the last: there a step of 16 rows takes hardly longer than one of 8.
        pad_id: fills the padding of rollouts.
        min_new_tokens: stop ids are forbidden (and the law renormalised) before that many tokens.
        prompt_buckets: padded prompt lengths, the last one at least `max_prompt_length`; a batch takes the shortest
            that holds its longest prompt. None is one bucket.
        compute_dtype: type of weights, cache and activations while decoding; None is the parameters' own.
        unroll: write the layers out instead of looping over them: about twice as fast on a CPU, slower to compile.
            None: on CPU.
        attention: kernel for whole prompts, as for `Transformer`; with a `tp` axis `xla` takes the place of `cudnn`.
        mesh: devices to use; rows are split over all axes but `tp`. None is the device the parameters are on.
    Raises:
        SamplerError: sizes that make no sense, or a law that cannot be met.
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
        compute_dtype: Any = None,
        unroll: bool | None = None,
        attention: str = "auto",
        mesh: Mesh | None = None,
    ) -> None:
        if not isinstance(config, ModelConfig):
            raise SamplerError(
                f"config must be a ModelConfig: got a {type(config).__name__}. "
                "Take the one that `load_pretrained` returns, or use ModelConfig.from_hf or ModelConfig.from_file."
            )
        for name, value in (
            ("max_prompt_length", max_prompt_length),
            ("max_new_tokens", max_new_tokens),
            ("slots", slots),
            ("sizes", sizes),
        ):
            if value < 1:
                raise SamplerError(f"{name} must be at least 1: got {value}.")
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise SamplerError(
                f"min_new_tokens must lie in [0, max_new_tokens={max_new_tokens}]: got {min_new_tokens}. "
                "A longer minimum than maximum cannot be met."
            )
        if max_prompt_length + max_new_tokens > config.max_positions:
            raise SamplerError(
                f"max_prompt_length + max_new_tokens must be at most the model's max_positions="
                f"{config.max_positions}: got {max_prompt_length} + {max_new_tokens}."
            )
        buckets = tuple(sorted(prompt_buckets or (max_prompt_length,)))
        if buckets[0] < 1 or buckets[-1] < max_prompt_length:
            raise SamplerError(
                f"prompt_buckets must be positive and reach max_prompt_length={max_prompt_length}: got {buckets}."
            )
        self.config = config
        self.sampling = SamplingParams() if sampling is None else sampling
        self.max_prompt_length, self.max_new_tokens, self.min_new_tokens = (
            max_prompt_length,
            max_new_tokens,
            min_new_tokens,
        )
        self.slots, self.sizes, self.pad_id, self.mesh = slots, sizes, pad_id, mesh
        self._buckets = tuple(-(-bucket // 8) * 8 for bucket in buckets)
        self._columns = -(-max_new_tokens // 8) * 8
        self.compute_dtype = compute_dtype
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

    def warmup(
        self,
        params: Any,
        *,
        group_sizes: Sequence[int] = (1,),
        sampling: Sequence[SamplingParams] | None = None,
        streaming: bool = True,
    ) -> None:
        """Compiles all that later calls can need, and waits for it.

        Args:
            params: the policy, or `jax.ShapeDtypeStruct`s with shardings like it.
            group_sizes: group sizes that calls will use; each has its programs.
            sampling: sampling parameters that calls will use; only whether they filter matters. None is the sampler's own.
            streaming: whether batches may exceed the slots.
        """
        if isinstance(sampling, SamplingParams):
            raise SamplerError("sampling must be a sequence of SamplingParams: got one. Write sampling=[sampling].")
        check_params(params, self.config)
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
    ) -> dict[str, Callable[..., Compiled]]:
        """What a call that fills all slots runs, for planning memory and time on devices that may not be there.

        Args:
            params: the policy, or `jax.ShapeDtypeStruct`s with shardings like it.
            group_size: samples of one prompt.
            sampling: as for `generate`; only whether it filters matters.
            streaming: whether the batch exceeds the slots.
        Returns:
            Functions that compile (with `compiler_options`, as `jax.stages.Lowered.compile` takes them), by name, in
            the order of their first run: `weights` (parameters as decoding wants
            them), `cache` (an empty one), `prefill` (prompts into the cache), `decode` (a chunk of steps; its loop's
            end depends on the data), and `shrink` (the cache of a draining batch) where there is a smaller size. Each
            is the largest of its kind, for the longest prompt bucket.
        """
        check_params(params, self.config)
        engine = self._engine(params, self._buckets[-1])
        filtered = is_filtered(self.sampling if sampling is None else sampling, self.min_new_tokens)
        return engine.programs(self._shapes(engine, group_size, streaming), filtered=filtered)

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
            step: optimizer step; with the seed, the prompt's id and the sample's index it fixes the random numbers.
            policy: version of the parameters, recorded in the rollout; `PolicyVersion(step, "")` if None.
            sampling: replaces the sampler's own for this call.
            max_new_tokens: limits in tokens, one a prompt [P] or one a sequence [P, G]; None is the sampler's own.
        Returns:
            P * group_size rows of `max_prompt_length + max_new_tokens` tokens, groups adjacent.
        Raises:
            SamplerError: prompts or limits that do not fit, or a law that cannot be met.
            ContractError: `prompts` break the contract.
        """
        check_params(params, self.config)
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
        """The same draws as `generate`, each sequence as soon as it has ended.

        Args:
            params: the policy's parameters.
            prompts: right-padded token ids.
            group_size: samples of one prompt.
            seed: see `generate`.
            step: see `generate`.
            sampling: see `generate`.
            max_new_tokens: see `generate`.
        Yields:
            Sequences in the order in which they end.
        Raises:
            SamplerError: at the call, not at the first element: see `generate`.
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
        # A small batch starts in a small shape, but in one that still shares prompts.
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
                attention = "xla"  # nothing splits cuDNN's kernel over its heads
            plan = Plan(self.config, jnp.dtype(dtype), self._unroll, bucket, self._columns, attention)
            self._engines[key] = Engine(plan, placement, self._programs, params)
        return self._engines[key]

    def _shard_slots(self, engine: Engine) -> int:
        return -(-self.slots // engine.placement.shards)

    def _shapes(self, engine: Engine, group_size: int, streaming: bool) -> tuple[Shape, ...]:
        rows, few = self._shard_slots(engine), few_rows(self.config, unroll=self._unroll)
        return shapes_for(rows, group_size, self.sizes, streaming=streaming, few=few)
