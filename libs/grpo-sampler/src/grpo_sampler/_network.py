"""The policy network: one flax implementation of the Qwen2, Qwen3 and Llama 3 families."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from grpo_sampler._attention import causal_mask
from grpo_sampler._config import ModelConfig
from grpo_sampler._errors import SamplerError
from grpo_sampler._kernels import Attention, masked_attention, resolve_attention, self_attention
from grpo_sampler._layers import Layer, attention_out, mlp, qkv, rms_norm
from grpo_sampler._rope import rope_constants, rope_tables

Params = dict[str, Any]
_INITIAL_STD = 0.02
# Deeper models are scanned over their layers, which compiles in the time of one.
_MOST_UNROLLED = 8
# Queries of a block attend in up to four spans of at least so many: shorter products lose what fewer keys save.
_SHORTEST_SPAN = 64


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's parameters, by name, without the leading L axis.

    Args:
        config: the model.

    Returns:
        name -> shape; biases and head norms only where the family has them.
    """
    D, F, H, K, E = config.width, config.mlp_width, config.query_heads, config.kv_heads, config.head_size
    shapes: dict[str, tuple[int, ...]] = {"attn_norm": (D,), "q": (D, H, E), "k": (D, K, E), "v": (D, K, E)}
    if config.qkv_bias:
        shapes |= {"q_bias": (H, E), "k_bias": (K, E), "v_bias": (K, E)}
    if config.qk_norm:
        shapes |= {"q_norm": (E,), "k_norm": (E,)}
    return shapes | {"o": (H, E, D), "mlp_norm": (D,), "gate": (D, F), "up": (D, F), "down": (F, D)}


class Blocks(nnx.Module):
    """The parameters of all blocks, each stacked on a leading L axis."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        for name, shape in layer_shapes(config).items():
            setattr(self, name, nnx.Param(_initial(name, (config.layers, *shape), rngs, dtype)))


class Transformer(nnx.Module):
    """A decoder-only language model without its last product: tokens in, hidden states out.

    Args:
        config: what to build.
        rngs: keys of the initial weights (normal, standard deviation 0.02; norms 1, biases 0).
        param_dtype: type the parameters are kept in.
        compute_dtype: type of activations and products' inputs; None is `param_dtype`. Sums are float32 in any case.
        attention: `auto`, `xla`, `cudnn` (GPU) or `splash` (TPU); the attribute holds what `auto` came to.
        remat: recompute each block in the backward pass instead of keeping its activations.
        mesh: devices the model will run on; only splash attention on several devices needs it.

    Raises:
        SamplerError: an attention that cannot run this configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        compute_dtype: Any = None,
        attention: str = "auto",
        remat: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        dtype = jnp.dtype(param_dtype)
        self.config = config
        self.compute_dtype = dtype if compute_dtype is None else jnp.dtype(compute_dtype)
        self.attention: Attention = resolve_attention(attention, config, self.compute_dtype, mesh)
        self.remat = remat
        self.mesh = mesh
        self.embed = nnx.Param(_initial("embed", (config.vocab_size, config.width), rngs, dtype))
        if not config.tied:
            self.unembed = nnx.Param(_initial("unembed", (config.vocab_size, config.width), rngs, dtype))
        self.final_norm = nnx.Param(_initial("final_norm", (config.width,), rngs, dtype))
        self.layers = Blocks(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        segment_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm.

        Args:
            tokens_BT: token ids.
            positions_BT: absolute positions; None counts from 0 in every row.
            segment_BT: 0 is padding, tokens see earlier tokens of their own segment; None is one segment a row.

        Returns:
            hidden_BTD in the compute type; what stands at padding has no meaning.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        if segment_BT is None:
            segment_BT = jnp.ones_like(tokens_BT)
        cos, sin = rope_tables(positions_BT, self.config)

        def block(x: Array, layer: Layer) -> Array:
            q, k, v = qkv(layer, x, cos, sin, self.config)
            x = attention_out(layer, x, self_attention(self.attention, q, k, v, segment_BT, self.mesh))
            return mlp(layer, x, self.config)

        x = self._through_layers(block, self._embedded(tokens_BT))
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)

    def with_prompts(
        self,
        prompt_tokens_PT: Int[Array, "P Tp"],
        prompt_length_P: Int[Array, "P"],
        tokens_RT: Int[Array, "R T"],
        positions_RT: Int[Array, "R T"],
        segment_RT: Int[Array, "R T"],
        prompt_RC: Int[Array, "R C"],
        *,
        shards: int = 1,
    ) -> Float[Array, "R T D"]:
        """Hidden states of packed completions whose prompts are computed once, not once a completion.

        Args:
            prompt_tokens_PT: shared prompts, right-padded.
            prompt_length_P: their lengths in tokens, at least 0.
            tokens_RT: packed rows, of C equal blocks each; the tokens of a block continue the same prompt.
            positions_RT: absolute positions, as in the unpacked sequences: below Tp + T, or the result is NaN.
            segment_RT: 0 is padding; tokens see their block's prompt and earlier tokens of their own segment.
            prompt_RC: row of `prompt_tokens_PT` that each block continues.
            shards: equal parts of rows and prompts that lie on different devices, where a row only continues prompts
                of its own part: what a row reads of a prompt then never moves between devices.

        Returns:
            hidden_RTD in the compute type, equal to that of each whole sequence run by itself.

        Raises:
            SamplerError: rows or prompts do not divide by the shards, or a row's length by its blocks.
        """
        config, T, blocks = self.config, tokens_RT.shape[1], prompt_RC.shape[1]
        if T % blocks:
            raise SamplerError(f"the blocks of a row must divide its length {T}: got prompt_RC with {blocks}.")
        if prompt_tokens_PT.shape[0] % shards or tokens_RT.shape[0] % shards:
            raise SamplerError(
                f"prompts and rows must divide by shards={shards}: got {prompt_tokens_PT.shape[0]} prompts and "
                f"{tokens_RT.shape[0]} rows."
            )
        slots = prompt_tokens_PT.shape[0] // shards
        local_RC = prompt_RC.reshape(shards, -1, blocks) - slots * jnp.arange(shards, dtype=jnp.int32)[:, None, None]

        def of_prompt(x_P: Array, block: int) -> Array:
            # Indexed part by part: a batched gather is one that the partitioner keeps on each device.
            parts = x_P.reshape(shards, slots, *x_P.shape[1:])
            gathered = jax.vmap(lambda part, index: part[index])(parts, local_RC[..., block])
            return gathered.reshape(-1, *x_P.shape[1:])

        Tp = prompt_tokens_PT.shape[1]
        place_T = jnp.arange(Tp, dtype=jnp.int32)
        live_PT = place_T < prompt_length_P[:, None]
        prompt_segment = live_PT.astype(jnp.int32)
        cos, sin = map(jnp.asarray, rope_constants(Tp + T, config))
        prompt_cos, prompt_sin = cos[None, :Tp], sin[None, :Tp]
        # Padding may hold anything, and 0 times the NaN of a position too large would reach what attends around it.
        place_RT = jnp.where(segment_RT > 0, positions_RT, 0)
        row_cos, row_sin = cos[place_RT], sin[place_RT]
        # Span by span of queries: what a span may see ends with itself. Of a 7B model's update on TPUs spans would save
        # a hundredth of the arithmetic, and compile a quarter longer.
        block_length = T // blocks
        span_length = _span_length(block_length) if self.attention == "xla" else block_length
        spans = [(start // block_length, slice(start, start + span_length)) for start in range(0, T, span_length)]
        own_mask = causal_mask(segment_RT)
        masks = []
        for at, span in spans:
            prompt_mask = jnp.broadcast_to(of_prompt(live_PT, at)[:, None], (len(tokens_RT), span_length, Tp))
            masks.append(jnp.concatenate([prompt_mask, own_mask[:, span, : span.stop]], axis=2))

        def block(streams: tuple[Array, Array], layer: Layer) -> tuple[Array, Array]:
            prompts, rows = streams
            q, k, v = qkv(layer, prompts, prompt_cos, prompt_sin, config)
            attended = self_attention(self.attention, q, k, v, prompt_segment, self.mesh)
            prompts = attention_out(layer, prompts, attended)
            row_q, row_k, row_v = qkv(layer, rows, row_cos, row_sin, config)
            parts = []
            for (at, span), mask in zip(spans, masks):
                # One matrix product over prompt and row costs less than two, and the copy that it takes less than that.
                seen_k = jnp.concatenate([of_prompt(k, at), row_k[:, : span.stop]], axis=1)
                seen_v = jnp.concatenate([of_prompt(v, at), row_v[:, : span.stop]], axis=1)
                parts.append(masked_attention(self.attention, row_q[:, span], seen_k, seen_v, mask))
            attended = jnp.concatenate(parts, axis=1)
            rows = attention_out(layer, rows, attended)
            return mlp(layer, prompts, config), mlp(layer, rows, config)

        _, rows = self._through_layers(block, (self._embedded(prompt_tokens_PT), self._embedded(tokens_RT)))
        return rms_norm(rows, self.final_norm[...], config.norm_eps)

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits: `hidden @ unembedding.T`."""
        return self.embed[...] if self.config.tied else self.unembed[...]

    def _embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.embed[...][tokens].astype(self.compute_dtype)

    def _through_layers(self, block: Callable[[Any, Layer], Any], stream: Any) -> Any:
        layers = {name: getattr(self.layers, name)[...] for name in layer_shapes(self.config)}
        if self.remat or self.config.layers > _MOST_UNROLLED:
            body = jax.checkpoint(block) if self.remat else block
            stream, _ = jax.lax.scan(lambda x, layer: (body(x, layer), None), stream, layers)
            return stream
        # A scan copies what the backward pass needs into stacked arrays and out again: a fifth of a small update.
        for i in range(self.config.layers):
            stream = block(stream, {name: leaf[i] for name, leaf in layers.items()})
        return stream


def _span_length(block_length: int) -> int:
    """Queries that attend together: a block's, or a half or quarter of it where those are long enough to pay."""
    halved = (block_length // n for n in (4, 2) if block_length % n == 0)
    return next((length for length in halved if length >= _SHORTEST_SPAN), block_length)


def split(model: Transformer) -> tuple[nnx.GraphDef[Transformer], Params]:
    """Takes a model apart into what is static and its parameters.

    Args:
        model: the network.

    Returns:
        (graphdef, params): graphdef is hashable, params a plain nested dictionary of arrays.
    """
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef[Transformer], params: Params) -> Transformer:
    """Puts a model together again; inside jit this costs nothing.

    Args:
        graphdef: from `split`.
        params: parameters of the same names, of any floating type.

    Returns:
        The network.
    """
    return nnx.merge(graphdef, params)


def abstract(config: ModelConfig, **options: Any) -> tuple[nnx.GraphDef[Transformer], Params]:
    """`split` of a network that is never allocated: for loaded parameters, and for planning memory.

    Args:
        config: the model.
        options: `Transformer`'s keywords, without `rngs`.

    Returns:
        (graphdef, params) with `jax.ShapeDtypeStruct` leaves.
    """
    return split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options)))


def _initial(name: str, shape: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype) -> Array:
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    return (_INITIAL_STD * jax.random.normal(rngs.params(), shape)).astype(dtype)
