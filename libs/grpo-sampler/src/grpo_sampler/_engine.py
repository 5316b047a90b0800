"""One batch on its way through the device: fill units, decode a chunk, book what ended, shrink, again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_contracts import SamplingLaw
from grpo_sampler._config import ModelConfig
from grpo_sampler._decode import Cache, Emitted, Rows, Weights, decode, empty_cache, keep, prefill, weights_from
from grpo_sampler._kernels import Attention
from grpo_sampler._law import is_filtered, law_arrays
from grpo_sampler._placement import Placement
from grpo_sampler._programs import Programs
from grpo_sampler._slots import Fill, Finished, Shape, Slots

CHUNK = 32  # steps between two looks from the host
SHARDED_CHUNK = 8  # shards that decode without talking cannot come back early together: they look more often
PREFILL = 4  # prompts of a shard computed at once


@dataclass(frozen=True)
class Plan:
    """What the compiled programs of an engine depend on, besides the parameters' shapes and shardings."""

    config: ModelConfig
    dtype: Any
    unroll: bool
    prompt: int  # padded prompt length
    columns: int
    attention: Attention  # of whole prompts; decoding is plain XLA, bound by memory and not by arithmetic


class Request(NamedTuple):
    """A batch: prompts, limits, and the identity of its randomness."""

    tokens_PT: np.ndarray
    length_P: np.ndarray
    prompt_id_P: np.ndarray
    limit_B: np.ndarray
    group_size: int
    law: SamplingLaw
    min_new: int
    seed: int
    step: int


class Chunk(NamedTuple):
    """What one chunk emitted, by request, and which sequences ended in it."""

    request_S: np.ndarray
    had_S: np.ndarray
    token_iS: np.ndarray
    logp_iS: np.ndarray
    policy_logp_iS: np.ndarray
    finished: Finished


class Engine:
    """Compiled programs for one plan and one set of parameter shapes and shardings."""

    def __init__(self, plan: Plan, placement: Placement, programs: Programs, params: Any) -> None:
        self.plan, self.placement, self._programs = plan, placement, programs
        self._params = jax.tree.map(lambda leaf: _abstract(leaf, placement.given(leaf)), params)
        shapes = jax.eval_shape(self._weights_function, self._params)
        self._weights = jax.tree.map(_abstract, shapes, self._weight_shardings())
        leaves, tree = jax.tree.flatten(self._params)
        self._key = (plan, placement.mesh, tree, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))

    def start_compiling(self, shapes: tuple[Shape, ...], *, filtered: bool, first: int = 0) -> list[Any]:
        """Compiles what a batch that starts in `shapes[first]` may need, in the order of need.

        Returns:
            Futures of the compiled programs.
        """
        futures = [self._weights_program(), self._empty_program(shapes[first]), self._prefill_program(shapes[first])]
        for i, shape in enumerate(shapes[first:], first):
            futures.append(self._decode_program(shape, filtered))
            if i + 1 < len(shapes):
                futures.append(self._keep_program(shape, shapes[i + 1]))
        return futures

    def programs(self, shapes: tuple[Shape, ...], *, filtered: bool) -> dict[str, Callable[[], Any]]:
        """The largest program of each kind, by name, each compiled when called (at once if it is there already)."""
        largest = shapes[0]
        begin: dict[str, Callable[[], Any]] = {
            "weights": self._weights_program,
            "cache": partial(self._empty_program, largest),
            "prefill": partial(self._prefill_program, largest),
            "decode": partial(self._decode_program, largest, filtered),
        }
        if len(shapes) > 1:
            begin["shrink"] = partial(self._keep_program, largest, shapes[1])
        return {name: lambda start=start: start().result() for name, start in begin.items()}

    def run(self, params: Any, request: Request, shapes: tuple[Shape, ...], first: int) -> Iterator[Chunk]:
        """Decodes a batch; yields after every chunk.

        Args:
            params: the policy, as given to the constructor.
            request: what to decode.
            shapes: from `shapes_for`.
            first: index of the shape to start in.
        Yields:
            Chunks, until every sequence has ended.
        """
        law = law_arrays(request.law, self.plan.config.vocab_size, request.min_new)
        filtered = is_filtered(request.law, request.min_new)
        self.start_compiling(shapes, filtered=filtered, first=first)
        slots = Slots(
            shapes[first],
            self.placement.shards,
            request.group_size,
            request.tokens_PT,
            request.length_P,
            request.prompt_id_P,
            request.limit_B,
        )
        if self.placement.mesh is not None:
            params = jax.device_put(params, _shardings(self._params))  # nothing moves if it is there already
        weights = self._weights_program().result()(params)
        cache = self._empty_program(shapes[first]).result()()
        column = np.zeros(self.placement.shards, np.int32)
        seed_N = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32)
        level = first
        while slots.waiting or slots.live.any():
            if slots.waiting:
                cache = self._fill(weights, cache, slots.seat(), slots.shape, request)
            while not slots.waiting and level + 1 < len(shapes) and slots.live.sum(1).max() <= shapes[level + 1].rows:
                program = self._keep_program(shapes[level], shapes[level + 1]).result()
                level += 1
                cache = program(cache, *slots.shrink(shapes[level]))
            cache, emitted = self._decode_program(slots.shape, filtered).result()(
                weights,
                cache,
                slots.rows(),
                law,
                seed_N,
                np.uint32(request.step),
                np.int32(request.min_new),
                column,
                *self._until(slots, shapes, level),
            )
            column = emitted.column_1
            token_iS, logp_iS, policy_logp_iS = jax.device_get(emitted[:3])
            request_S, had_S, finished = slots.absorb(token_iS, request.law.stop_ids)
            yield Chunk(request_S, had_S, token_iS, logp_iS, policy_logp_iS, finished)

    def _until(self, slots: Slots, shapes: tuple[Shape, ...], level: int) -> tuple[np.int32, np.int32]:
        """How many steps the next chunk may take, and the number of live rows at which it comes back early."""
        if self.placement.shards > 1 and not self.placement.in_step:
            last = not slots.waiting and level + 1 == len(shapes)
            return np.int32(CHUNK if last else SHARDED_CHUNK), np.int32(0)
        if slots.waiting:
            return np.int32(CHUNK), np.int32(slots.live.sum(1).max() - max(1, slots.shape.rows // 8))
        return np.int32(CHUNK), np.int32(shapes[level + 1].rows if level + 1 < len(shapes) else 0)

    def _fill(self, weights: Weights, cache: Cache, fills: list[Fill], shape: Shape, request: Request) -> Cache:
        by_shard = [[fill for fill in fills if fill.shard == shard] for shard in range(self.placement.shards)]
        width = self._prefill_width(shape)
        for begin in range(0, max(map(len, by_shard)), width):
            tokens = np.zeros((self.placement.shards, width, self.plan.prompt), np.int32)
            length = np.zeros((self.placement.shards, width), np.int32)
            unit = np.full((self.placement.shards, width), shape.units, np.int32)
            for shard, mine in enumerate(by_shard):
                for i, fill in enumerate(mine[begin : begin + width]):
                    count = request.length_P[fill.prompt] - 1
                    tokens[shard, i, :count] = request.tokens_PT[fill.prompt, :count]
                    length[shard, i], unit[shard, i] = count, fill.unit
            program = self._prefill_program(shape).result()
            cache = program(weights, cache, tokens.reshape(-1, self.plan.prompt), length.reshape(-1), unit.reshape(-1))
        return cache

    # Programs: each is a pure function of `_decode`, split over the shards, with shapes and shardings fixed.

    def _weights_function(self, params: Any) -> Weights:
        return weights_from(params, self.plan.config, self.plan.dtype, self.plan.unroll)

    def _weight_shardings(self) -> Weights:
        place, params, config = self.placement.weight, self._params, self.plan.config
        if self.plan.unroll:
            once = jax.tree.map(partial(place, drop=1), params["layers"])
            layers: Any = (once,) * config.layers
        else:
            layers = jax.tree.map(place, params["layers"])
        unembed = params["embed" if config.tied else "unembed"]
        return Weights(place(params["embed"]), place(unembed), place(params["final_norm"]), layers)

    def _weights_program(self) -> Any:
        def compile_now() -> Any:
            jitted = jax.jit(self._weights_function, out_shardings=self._weight_shardings())
            return jitted.lower(self._params).compile()

        return self._programs.start(("weights", self._key), compile_now)

    def _cache(self, shape: Shape) -> Cache:
        """The abstract cache of all shards."""
        N = self.placement.shards
        make = partial(
            empty_cache,
            self.plan.config,
            self.plan.dtype,
            self.plan.unroll,
            units=N * shape.units,
            prompt=self.plan.prompt,
            rows=N * shape.rows,
            columns=self.plan.columns,
        )
        sharding = self.placement.rows(self._rows_axis, self.plan.config.kv_heads)
        return jax.tree.map(lambda leaf: _abstract(leaf, sharding), jax.eval_shape(make))

    @property
    def _rows_axis(self) -> int:
        return 0 if self.plan.unroll else 1

    def _cache_axes(self, cache: Cache) -> Cache:
        return jax.tree.map(lambda _: self._rows_axis, cache)

    def _empty_program(self, shape: Shape) -> Any:
        def compile_now() -> Any:
            cache = self._cache(shape)
            zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)  # noqa: E731
            return jax.jit(zeros, out_shardings=_shardings(cache)).lower().compile()

        return self._programs.start(("empty", self._key, shape), compile_now)

    def _prefill_width(self, shape: Shape) -> int:
        return min(PREFILL, shape.units)

    def _prefill_program(self, shape: Shape) -> Any:
        def compile_now() -> Any:
            cache, count = self._cache(shape), self.placement.shards * self._prefill_width(shape)
            axes = self._cache_axes(cache)
            function = self.placement.split(
                partial(prefill, config=self.plan.config, attention=self.plan.attention),
                (jax.tree.map(lambda _: None, self._weights), axes, 0, 0, 0),
                axes,
            )
            ints = partial(self._shared, dtype=jnp.int32)
            jitted = jax.jit(function, donate_argnums=1, out_shardings=_shardings(cache))
            lowered = jitted.lower(
                self._weights, cache, ints((count, self.plan.prompt)), ints((count,)), ints((count,))
            )
            return lowered.compile()

        return self._programs.start(("prefill", self._key, shape), compile_now)

    def _keep_program(self, old: Shape, new: Shape) -> Any:
        def compile_now() -> Any:
            before, after, N = self._cache(old), self._cache(new), self.placement.shards
            axes = self._cache_axes(before)
            function = self.placement.split(keep, (axes, 0, 0), axes)
            ints = partial(self._shared, dtype=jnp.int32)
            jitted = jax.jit(function, out_shardings=_shardings(after))
            return jitted.lower(before, ints((N * new.units,)), ints((N * new.rows,))).compile()

        return self._programs.start(("keep", self._key, old, new), compile_now)

    def _decode_program(self, shape: Shape, filtered: bool) -> Any:
        def compile_now() -> Any:
            N, shared = self.placement.shards, self._shared
            cache = self._cache(shape)
            axes = self._cache_axes(cache)
            ints = partial(shared, dtype=jnp.int32)
            S = (N * shape.rows,)
            per_row = [ints(S)] * 4 + [shared(S, jnp.bool_)] + [ints(S)] * 3
            rows = Rows._make([*per_row, ints((N * shape.units, shape.share)), ints((N * shape.units,))])
            law = jax.tree.map(lambda leaf: shared(leaf.shape, leaf.dtype), law_arrays(SamplingLaw(), 1))
            none = partial(jax.tree.map, lambda _: None)
            function = self.placement.split(
                partial(
                    decode, config=self.plan.config, capacity=CHUNK, filtered=filtered, in_step=self.placement.in_step
                ),
                (none(self._weights), axes, Rows._make([0] * len(rows)), none(law), None, None, None, 0, None, None),
                (axes, Emitted(1, 1, 1, 0)),
            )
            column = _abstract(ints((N,)), self.placement.rows())
            emitted = Emitted._make([*(self.placement.replicated,) * 3, self.placement.rows()])
            jitted = jax.jit(function, donate_argnums=1, out_shardings=(_shardings(cache), emitted))
            scalars = (shared((2,), jnp.uint32), shared((), jnp.uint32), ints(()))
            return jitted.lower(self._weights, cache, rows, law, *scalars, column, ints(()), ints(())).compile()

        return self._programs.start(("decode", self._key, shape, filtered), compile_now)

    def _shared(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.placement.replicated)


def _abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
