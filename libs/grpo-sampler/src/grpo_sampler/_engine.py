"""Runs one batch on the device: fill units, decode a chunk, record finished sequences, shrink, repeat."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from grpo_sampler._cache import Cache, empty_cache
from grpo_sampler._config import ModelConfig
from grpo_sampler._decode import Emitted, Weights, decode, keep, prefill, weights_from
from grpo_sampler._kernels import Attention
from grpo_sampler._lora import split_adapters
from grpo_sampler._placement import Placement
from grpo_sampler._programs import Programs, Recipe
from grpo_sampler._request import Request
from grpo_sampler._sampling import is_filtered
from grpo_sampler._slots import Fill, Finished, Shape, Slots
from grpo_sampler._table import CALL_SIZE, table_size, write_call, write_table

CHUNK = 32  # steps before the host reads the results
PREFILL = 4  # prompts per shard computed at once; half of them where they may have several lengths, to pad less


@dataclass(frozen=True)
class Plan:
    """What an engine's compiled programs depend on, besides the shapes and shardings of the parameters."""

    config: ModelConfig
    dtype: Any
    unroll: bool
    prompt: int  # padded prompt length, in the cache
    prefills: tuple[int, ...]  # padded prompt lengths of prefill, ascending; the last is `prompt`
    columns: int
    attention: (
        Attention  # of whole prompts; decoding uses plain XLA, because it is bound by memory and not by arithmetic
    )


class Chunk(NamedTuple):
    """What one chunk emitted for each request, and which sequences ended in it."""

    request_S: np.ndarray
    had_S: np.ndarray
    emitted: Emitted
    finished: Finished


class Engine:
    """The compiled programs for one plan and one set of parameter shapes and shardings."""

    def __init__(
        self, plan: Plan, placement: Placement, programs: Programs, params: Any, stop_table_AV: np.ndarray | None
    ) -> None:
        self.plan, self.placement, self._programs = plan, placement, programs
        self._stop_table_AV = stop_table_AV
        self._params = jax.tree.map(lambda leaf: _abstract(leaf, placement.given(leaf)), params)
        shapes = jax.eval_shape(self._weights_function, self._params)
        self._weights = jax.tree.map(_abstract, shapes, self._weight_shardings())
        leaves, tree = jax.tree.flatten(self._params)
        self.prefilled = np.zeros(2, np.int64)  # token positions of prompts: computed, and stored
        self._floors: dict[int, jax.Array] = {}
        self._key = (plan, placement.mesh, tree, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))

    def start_compiling(self, shapes: tuple[Shape, ...], *, filtered: bool, first: int = 0) -> list[Any]:
        """Starts compiling what a batch that begins in `shapes[first]` needs until it first shrinks.

        Returns:
            Futures of the compiled programs.
        """
        shape = shapes[first]
        recipes = [
            self._weights_program(),
            self._decode_program(shape, filtered),
            *(self._prefill_program(shape, length) for length in self.plan.prefills),
            self._empty_program(shape),
        ]
        return [self._programs.start(recipe) for recipe in recipes]

    def start_shrinking(self, shapes: tuple[Shape, ...], *, filtered: bool, level: int = 0) -> list[Any]:
        """Starts compiling what a batch needs to drain from `shapes[level]` to the smallest shape.

        Returns:
            Futures of the compiled programs.
        """
        steps = zip(shapes[level:], shapes[level + 1 :])
        pairs = [(self._keep_program(old, new), self._decode_program(new, filtered)) for old, new in steps]
        return [self._programs.start(recipe) for pair in pairs for recipe in pair]

    def programs(self, shapes: tuple[Shape, ...], *, filtered: bool) -> dict[str, Callable[[], Lowered]]:
        """What traces and lowers the largest program of each kind, by name."""
        largest = shapes[0]
        recipes = {
            "weights": self._weights_program(),
            "cache": self._empty_program(largest),
            "prefill": self._prefill_program(largest, self.plan.prompt),
            "decode": self._decode_program(largest, filtered),
        }
        if len(shapes) > 1:
            recipes["shrink"] = self._keep_program(largest, shapes[1])
        return {name: recipe.lower for name, recipe in recipes.items()}

    def allocation(self, shape: Shape) -> tuple[Weights, Cache]:
        """The weights and the cache of all shards, as shapes with shardings."""
        return self._weights, self._cache(shape)

    def run(self, params: Any, request: Request, shapes: tuple[Shape, ...], first: int) -> Iterator[Chunk]:
        """Decodes a batch and yields after every chunk.

        Args:
            params: parameters with the shapes and shardings given to the constructor.
            request: what to decode.
            shapes: from `shapes_for`.
            first: index of the shape to start in.
        Yields:
            Chunks, until all sequences have ended.
        """
        filtered = is_filtered(request.sampling, request.min_new)
        self.start_compiling(shapes, filtered=filtered, first=first)
        slots = Slots(
            shapes[first],
            self.placement.shards,
            request.group_size,
            request.tokens_PT,
            request.length_P,
            request.prompt_id_P,
            request.limit_B,
            self._stop_table_AV,
        )
        if self.placement.mesh is not None:
            params = jax.device_put(params, _shardings(self._params))  # nothing moves if they are already there
        weights = self._compiled(self._weights_program())(params)
        cache = self._compiled(self._empty_program(shapes[first]))()
        vocabulary = self.plan.config.vocab_size
        call = self._send(
            write_call(request.sampling, vocabulary, seed=request.seed, step=request.step, min_new=request.min_new)
        )
        stops = () if self._stop_table_AV is None else (self._send(self._stop_table_AV),)
        table, column_N = None, np.zeros(self.placement.shards, np.int32)
        level = first
        while slots.waiting or slots.live.any():
            if slots.waiting and (slots.live.sum(1) < slots.shape.rows).any():
                cache, table = self._fill(weights, cache, slots.seat(), slots.shape, request), None
            while not slots.waiting and level + 1 < len(shapes) and slots.live.sum(1).max() <= shapes[level + 1].rows:
                program = self._compiled(self._keep_program(shapes[level], shapes[level + 1]))
                level += 1
                cache, table = program(cache, self._send(slots.shrink(shapes[level]), split=True)), None
            if table is None:
                table = self._send(write_table(slots.rows(column_N)).reshape(-1), split=True)
            cache, table, record = self._compiled(self._decode_program(slots.shape, filtered))(
                weights, cache, table, call, self._until(slots, shapes, level), *stops
            )
            if slots.live.sum() < slots.live.size:  # sequences have ended: smaller shapes will be needed
                self.start_shrinking(shapes, filtered=filtered, level=level)
            emitted, taken_N = self._read(record)
            column_N = (column_N + taken_N) % self.plan.columns
            request_S, had_S, finished = slots.absorb(emitted.token_IS, request.sampling.stop_ids)
            yield Chunk(request_S, had_S, emitted, finished)

    def _send(self, array: np.ndarray, *, split: bool = False) -> jax.Array:
        """Sends an array to the device: each shard gets its part of the first axis, or all of it."""
        sharding = self.placement.rows() if split else self.placement.replicated
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    def _read(self, record: jax.Array) -> tuple[Emitted, np.ndarray]:
        """A chunk's record, and how many steps each shard took: entries that it did not write are -1."""
        token_IS, *bits_IS = np.asarray(record)
        taken_IN = (bits_IS[0] != -1).reshape(len(token_IS), self.placement.shards, -1)[..., 0]
        return Emitted(token_IS, *(bits.view(np.float32) for bits in bits_IS)), taken_IN.sum(0, dtype=np.int32)

    def _until(self, slots: Slots, shapes: tuple[Shape, ...], level: int) -> jax.Array:
        """How many steps the next chunk may take, and the number of live rows at which it returns early."""
        if slots.waiting:
            floor = int(slots.live.sum(1).max()) - max(1, slots.shape.rows // 8)
        else:
            floor = shapes[level + 1].rows if level + 1 < len(shapes) else 0
        if floor not in self._floors:
            self._floors[floor] = self._send(np.array([CHUNK, floor], np.int32))
        return self._floors[floor]

    def _fill(self, weights: Weights, cache: Cache, fills: list[Fill], shape: Shape, request: Request) -> Cache:
        count_P, lengths = request.length_P - 1, self.plan.prefills
        if len(lengths) > 1:  # prompts of about one length together
            fills = sorted(fills, key=lambda fill: int(count_P[fill.prompt]))
        by_shard = [[fill for fill in fills if fill.shard == shard] for shard in range(self.placement.shards)]
        width = self._prefill_width(shape)
        for begin in range(0, max(map(len, by_shard)), width):
            longest = max(count_P[fill.prompt] for mine in by_shard for fill in mine[begin : begin + width])
            length = next(length for length in lengths if length >= longest)
            prompts = np.zeros((self.placement.shards, width, length + 2), np.int32)
            prompts[..., -1] = shape.units
            for shard, mine in enumerate(by_shard):
                for i, fill in enumerate(mine[begin : begin + width]):
                    count = count_P[fill.prompt]
                    self.prefilled[1] += count
                    prompts[shard, i, :count] = request.tokens_PT[fill.prompt, :count]
                    prompts[shard, i, -2:] = count, fill.unit
            self.prefilled[0] += prompts[..., :-2].size
            sent = self._send(prompts.reshape(-1, length + 2), split=True)
            cache = self._compiled(self._prefill_program(shape, length))(weights, cache, sent)
        return cache

    def _compiled(self, recipe: Recipe) -> Any:
        return self._programs.start(recipe).result()

    # Programs: each is a pure function of `_decode`, split over the shards, with fixed shapes and shardings.

    def _weights_function(self, params: Any) -> Weights:
        plan, given = self.plan, None
        if self.placement.moves(self._params):
            given = _shardings(split_adapters(self._params)[0])
        # Not if heads are split over devices: parts of a fused product would move between devices in every step.
        fused = plan.unroll and self.placement.tensor == 1
        return weights_from(params, plan.config, plan.dtype, unroll=plan.unroll, fused=fused, given=given)

    def _weight_shardings(self) -> Weights:
        if self.placement.tensor == 1:
            shapes = jax.eval_shape(self._weights_function, self._params)
            return jax.tree.map(lambda _: self.placement.replicated, shapes)
        place, config = self.placement.weight, self.plan.config
        names = split_adapters(self._params)[0]["layers"]
        single = {name: place(f"layers/{name}", drop=int(self.plan.unroll)) for name in names}
        layers: Any = (single,) * config.layers if self.plan.unroll else single
        unembed = None if config.tied else place("unembed")
        return Weights(place("embed"), unembed, place("final_norm"), layers)

    def _weights_program(self) -> Recipe:
        def lower() -> Any:
            jitted = jax.jit(self._weights_function, out_shardings=self._weight_shardings())
            return jitted.lower(self._params)

        return Recipe(("weights", self._key), lower)

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

    def _empty_program(self, shape: Shape) -> Recipe:
        def lower() -> Any:
            cache = self._cache(shape)
            zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)  # noqa: E731
            return jax.jit(zeros, out_shardings=_shardings(cache)).lower()

        return Recipe(("empty", self._key, shape), lower)

    def _prefill_width(self, shape: Shape) -> int:
        return min(PREFILL if len(self.plan.prefills) == 1 else PREFILL // 2, shape.units)

    def _prefill_program(self, shape: Shape, length: int) -> Recipe:
        def lower() -> Any:
            cache, count = self._cache(shape), self.placement.shards * self._prefill_width(shape)
            axes = self._cache_axes(cache)
            function = self.placement.split(
                partial(
                    prefill,
                    config=self.plan.config,
                    attention=self.plan.attention,
                    mesh=self.placement.mesh if self.placement.tensor > 1 else None,
                ),
                (jax.tree.map(lambda _: None, self._weights), axes, 0),
                axes,
            )
            jitted = jax.jit(function, donate_argnums=1, out_shardings=_shardings(cache))
            return jitted.lower(self._weights, cache, self._ints((count, length + 2), split=True))

        return Recipe(("prefill", self._key, shape, length), lower)

    def _keep_program(self, old: Shape, new: Shape) -> Recipe:
        def lower() -> Any:
            before, after, N = self._cache(old), self._cache(new), self.placement.shards
            axes = self._cache_axes(before)
            function = self.placement.split(partial(keep, units=new.units), (axes, 0), axes)
            jitted = jax.jit(function, out_shardings=_shardings(after))
            return jitted.lower(before, self._ints((N * (new.units + new.rows),), split=True))

        return Recipe(("keep", self._key, old, new), lower)

    def _decode_program(self, shape: Shape, filtered: bool) -> Recipe:
        def lower() -> Any:
            cache, placement = self._cache(shape), self.placement
            axes = self._cache_axes(cache)
            stops = () if self._stop_table_AV is None else (_abstract(self._stop_table_AV, placement.replicated),)
            function = placement.split(
                partial(
                    decode,
                    config=self.plan.config,
                    sizes=(shape.rows, shape.units, shape.share),
                    capacity=CHUNK,
                    filtered=filtered,
                    shard_axes=placement.row_axes if placement.shards > 1 else (),
                    tensor=placement.tensor,
                ),
                (jax.tree.map(lambda _: None, self._weights), axes, 0, None, None, *[None for _ in stops]),
                (axes, 0, 2),
            )
            table = self._ints((placement.shards * table_size(*shape),), split=True)
            # With several processes, each has to read the whole record.
            record = placement.replicated if jax.process_count() > 1 else placement.rows(2)
            jitted = jax.jit(function, donate_argnums=(1, 2), out_shardings=(_shardings(cache), table.sharding, record))
            return jitted.lower(self._weights, cache, table, self._ints((CALL_SIZE,)), self._ints((2,)), *stops)

        return Recipe(("decode", self._key, shape, filtered), lower)

    def _ints(self, shape: tuple[int, ...], *, split: bool = False) -> jax.ShapeDtypeStruct:
        sharding = self.placement.rows() if split else self.placement.replicated
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def _abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
