"""The policy network: one flax implementation of the Qwen2, Qwen3 and Llama 3 families."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from grpo_sampler._arguments import brief, check_floating, check_ids
from grpo_sampler._config import ModelConfig, check_config
from grpo_sampler._errors import SamplerError
from grpo_sampler._kernels import Attention, resolve_attention, self_attention
from grpo_sampler._layers import Layer, attention_out, mlp, qkv, rms_norm
from grpo_sampler._lora import adapter_shapes, initial_adapter, is_adapter
from grpo_sampler._packed import check_packed, packed_angles, plan_attention
from grpo_sampler._rope import rope_tables

Params = dict[str, Any]
_INITIAL_STD = 0.02
# Deeper models scan over their layers, so that compiling takes the time of one layer.
_MOST_UNROLLED = 8


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of one block by name, without the leading L axis.

    Args:
        config: the model.

    Returns:
        Shapes by name; biases, head norms and adapters only if the model has them.
    """
    D, F, H, K, E = config.width, config.mlp_width, config.query_heads, config.kv_heads, config.head_size
    shapes: dict[str, tuple[int, ...]] = {"attn_norm": (D,), "q": (D, H, E), "k": (D, K, E), "v": (D, K, E)}
    if config.qkv_bias:
        shapes |= {"q_bias": (H, E), "k_bias": (K, E), "v_bias": (K, E)}
    if config.qk_norm:
        shapes |= {"q_norm": (E,), "k_norm": (E,)}
    shapes |= {"o": (H, E, D), "mlp_norm": (D,), "gate": (D, F), "up": (D, F), "down": (F, D)}
    return shapes | adapter_shapes(config)


class Transformer(nnx.Module):
    """A decoder-only language model without the unembedding: tokens in, hidden states out.

    Args:
        config: the model.
        rngs: random keys for the initial weights (normal, standard deviation 0.02; norms 1, biases 0).
        param_dtype: type of the parameters; adapters are float32.
        compute_dtype: type of activations and of the inputs of products; None for `param_dtype`. Products accumulate in
            float32.
        attention: `auto`, `xla`, `cudnn` (GPU) or `splash` (TPU); the attribute holds what `auto` resolved to.
        remat: recompute each block in the backward pass instead of storing its activations.
        mesh: devices that the model will run on; needed only by splash attention on several devices.

    Raises:
        SamplerError: arguments of another kind, or an attention kernel that cannot run this configuration.
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
        check_config(config)
        if not isinstance(rngs, nnx.Rngs):
            raise SamplerError(f"rngs must be flax.nnx.Rngs, such as nnx.Rngs(0): got {brief(rngs)}.")
        dtype = check_floating("param_dtype", param_dtype)
        self.config = config
        self.compute_dtype = dtype if compute_dtype is None else check_floating("compute_dtype", compute_dtype)
        self.attention: Attention = resolve_attention(attention, config, self.compute_dtype, mesh)
        self.remat = remat
        self.mesh = mesh
        self.embed = nnx.Param(_initial("embed", (config.vocab_size, config.width), rngs, dtype))
        if not config.tied:
            self.unembed = nnx.Param(_initial("unembed", (config.vocab_size, config.width), rngs, dtype))
        self.final_norm = nnx.Param(_initial("final_norm", (config.width,), rngs, dtype))
        self.layers = nnx.Dict(
            {
                name: nnx.Param(_initial(name, (config.layers, *shape), rngs, dtype))
                for name, shape in layer_shapes(config).items()
            }
        )

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        segment_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm.

        Args:
            tokens_BT: token ids. Inside `jit` only the device knows them, and one outside the vocabulary reads some row
                of the embedding; under `jax.disable_jit()` it is an error there, too.
            positions_BT: absolute positions; None to count from 0 in every row.
            segment_BT: 0 is padding; tokens see earlier tokens of their own segment. None for one segment per row.

        Returns:
            hidden_BTD in the compute type, undefined at padding.

        Raises:
            SamplerError: tokens that are no integers with two axes, positions or segments of another shape, or (outside
                `jit`) a token outside the vocabulary that is no padding.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise SamplerError(
                f"tokens_BT must be integers with two axes, rows and positions: got {tokens_BT.dtype} of shape "
                f"{tokens_BT.shape}."
            )
        for name, array_BT in (("positions_BT", positions_BT), ("segment_BT", segment_BT)):
            if array_BT is not None and jnp.shape(array_BT) != tokens_BT.shape:
                raise SamplerError(f"{name} must have shape {tokens_BT.shape}: got {jnp.shape(array_BT)}.")
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        if segment_BT is None:
            segment_BT = jnp.ones_like(tokens_BT)
        cos, sin = rope_tables(positions_BT, self.config)

        def block(x: Array, layer: Layer) -> Array:
            q, k, v = qkv(layer, x, cos, sin, self.config)
            x = attention_out(layer, x, self_attention(self.attention, q, k, v, segment_BT, self.mesh), self.config)
            return mlp(layer, x, self.config)

        x = self._through_layers(block, self._embedded(tokens_BT, segment_BT))
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
        """Hidden states of packed completions whose prompts are computed once, not once per completion.

        Args:
            prompt_tokens_PT: shared prompts, right-padded.
            prompt_length_P: their lengths in tokens, at least 0.
            tokens_RT: packed rows of C equal blocks; all tokens of a block continue the same prompt.
            positions_RT: absolute positions, as in the unpacked sequences; from Tp + T on the result is NaN.
            segment_RT: 0 is padding; tokens see their block's prompt and earlier tokens of their own segment.
            prompt_RC: the row of `prompt_tokens_PT` that each block continues.
            shards: equal parts of rows and prompts on different devices, where rows continue only prompts of their own
                part, so that prompts never move between devices.

        Returns:
            hidden_RTD in the compute type, equal to those of the unpacked sequences.

        Raises:
            SamplerError: rows or prompts are not divisible by the shards, or the length of rows by the blocks; or
                (outside `jit`) a token is outside the vocabulary.
        """
        config, (R, T), (P, Tp) = self.config, tokens_RT.shape, prompt_tokens_PT.shape
        check_packed(prompts=P, rows=R, length=T, blocks=prompt_RC.shape[1], shards=shards)
        live_PT = jnp.arange(Tp, dtype=jnp.int32) < prompt_length_P[:, None]
        prompt_segment_PT = live_PT.astype(jnp.int32)
        prompt_angles, row_angles = packed_angles(positions_RT, segment_RT, Tp, config)
        attend_packed = plan_attention(
            self.attention,
            segment_RT,
            prompt_RC,
            prompt_length_P,
            prompt_length=Tp,
            group=config.query_heads // config.kv_heads,
            shards=shards,
            mesh=self.mesh,
        )

        def block(streams: tuple[Array, Array], layer: Layer) -> tuple[Array, Array]:
            prompts, rows = streams
            q, k, v = qkv(layer, prompts, *prompt_angles, config)
            prompts = attention_out(
                layer, prompts, self_attention(self.attention, q, k, v, prompt_segment_PT, self.mesh), config
            )
            attended = attend_packed((k, v), qkv(layer, rows, *row_angles, config))
            rows = attention_out(layer, rows, attended, config)
            return mlp(layer, prompts, config), mlp(layer, rows, config)

        streams = (self._embedded(prompt_tokens_PT, prompt_segment_PT), self._embedded(tokens_RT, segment_RT))
        _, rows = self._through_layers(block, streams)
        return rms_norm(rows, self.final_norm[...], config.norm_eps)

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits: `hidden @ unembedding.T`."""
        return self.embed[...] if self.config.tied else self.unembed[...]

    def _embedded(self, tokens: Int[Array, "B T"], segment: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        check_ids(tokens, segment, self.config.vocab_size)
        return self.embed[...][tokens].astype(self.compute_dtype)

    def _through_layers(self, block: Callable[[Any, Layer], Any], stream: Any) -> Any:
        layers = {name: self.layers[name][...] for name in layer_shapes(self.config)}
        if self.remat or self.config.layers > _MOST_UNROLLED:
            body = jax.checkpoint(block) if self.remat else block
            stream, _ = jax.lax.scan(lambda x, layer: (body(x, layer), None), stream, layers)
            return stream
        # A scan would copy what the backward pass needs to stacked arrays and back: a fifth of a small update's time.
        for i in range(self.config.layers):
            stream = block(stream, {name: leaf[i] for name, leaf in layers.items()})
        return stream


def split(model: Transformer) -> tuple[nnx.GraphDef[Transformer], Params]:
    """Splits a model into its static part and its parameters.

    Args:
        model: the network.

    Returns:
        (graphdef, params): graphdef is hashable, params a plain nested dictionary of arrays.

    Raises:
        SamplerError: not a Transformer.
    """
    if not isinstance(model, Transformer):
        raise SamplerError(f"model must be a Transformer: got {brief(model)}.")
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef[Transformer], params: Params) -> Transformer:
    """Puts a model back together; inside jit this is free.

    Args:
        graphdef: from `split`.
        params: parameters of the same names, of any floating type.

    Returns:
        The network.

    Raises:
        SamplerError: not what `split` returned, or parameters of another model.
    """
    if not isinstance(graphdef, nnx.GraphDef):
        raise SamplerError(f"graphdef must be the first part of what `split` returns: got {brief(graphdef)}.")
    try:
        return nnx.merge(graphdef, params)
    except (ValueError, KeyError) as error:
        raise SamplerError(f"params must be the second part of what `split` returns: {error}.") from error


def abstract(config: ModelConfig, **options: Any) -> tuple[nnx.GraphDef[Transformer], Params]:
    """`split` of a network that is never allocated, for loaded parameters and for planning memory.

    Args:
        config: the model.
        options: `Transformer`'s keywords, without `rngs`.

    Returns:
        (graphdef, params) with `jax.ShapeDtypeStruct` leaves.
    """
    return split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options)))


def _initial(name: str, shape: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype) -> Array:
    if is_adapter(name):
        return initial_adapter(name, shape, rngs.params())
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    return (_INITIAL_STD * jax.random.normal(rngs.params(), shape)).astype(dtype)
