"""The arithmetic of one block as pure functions, which training, prefill and decoding share.

`layer` is the dictionary of one block: the leaves of `params["layers"]` without their leading L axis.
Products accumulate in float32 whatever the compute type; norms and rotations are computed in float32.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_sampler._config import ModelConfig
from grpo_sampler._rope import rotate

Layer = Mapping[str, Array]


def rms_norm(x: Float[Array, "*dims N"], scale: Float[Array, "*heads N"], eps: float) -> Float[Array, "*dims N"]:
    """Scales x to unit root mean square over its last axis.

    Args:
        x: activations.
        scale: one factor per channel, or per channel of each head.
        eps: added to the mean square.

    Returns:
        The normalized activations, in x's type.

    Source: arXiv:1910.07467.
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def project(x: Float[Array, "*dims"], weight: Float[Array, "*rest"], axes: int = 1) -> Float[Array, "*out"]:
    """The product of x and weight over x's last and weight's first `axes` axes, accumulated in float32.

    Args:
        x: activations.
        weight: any floating type; cast to x's type.
        axes: how many axes to sum over.

    Returns:
        The product, in x's type.
    """
    # One plain matrix product: with more axes, XLA's CPU backend would transpose the output's gradient element by
    # element in the backward pass, which costs more than the product.
    kept = x.shape[: x.ndim - axes]
    flat = x.reshape(math.prod(kept), math.prod(x.shape[x.ndim - axes :]))
    matrix = weight.astype(x.dtype).reshape(flat.shape[1], -1)
    product = jnp.dot(flat, matrix, preferred_element_type=jnp.float32).astype(x.dtype)
    return product.reshape(*kept, *weight.shape[axes:])


def product(
    layer: Layer, name: str, x: Float[Array, "*dims"], config: ModelConfig, axes: int = 1
) -> Float[Array, "*out"]:
    """The product of x and one of a block's matrices, and of the matrix's adapter if it has one.

    Args:
        layer: one block's parameters.
        name: of the matrix.
        x: activations.
        config: the model.
        axes: as for `project`.

    Returns:
        The sum, in x's type.

    Source: LoRA arXiv:2106.09685 eq. 3.
    """
    plain = project(x, layer[name], axes)
    if config.lora is None or f"{name}_a" not in layer:
        return plain
    low = project(x, layer[f"{name}_a"], axes)
    return plain + project(low, config.lora.scale * layer[f"{name}_b"])


def qkv(
    layer: Layer,
    x: Float[Array, "*dims D"],
    cos: Float[Array, "*dims half"],
    sin: Float[Array, "*dims half"],
    config: ModelConfig,
) -> tuple[Float[Array, "*dims H E"], Float[Array, "*dims K E"], Float[Array, "*dims K E"]]:
    """Queries, keys and values of a block, normalized and rotated, ready for attention or a cache.

    Args:
        layer: one block's parameters.
        x: residual stream before the block's norm.
        cos: from `rope_tables`, at x's positions.
        sin: likewise.
        config: the model.

    Returns:
        (q, k, v) in x's type; q is not scaled.
    """
    normed = rms_norm(x, layer["attn_norm"], config.norm_eps)
    if "qkv" in layer:
        return _fused_qkv(layer, normed, cos, sin, config)
    q, k, v = (product(layer, name, normed, config) for name in ("q", "k", "v"))
    if config.qkv_bias:
        q = q + layer["q_bias"].astype(x.dtype)
        k = k + layer["k_bias"].astype(x.dtype)
        v = v + layer["v_bias"].astype(x.dtype)
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config.norm_eps)
        k = rms_norm(k, layer["k_norm"], config.norm_eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def _fused_qkv(layer: Layer, normed: Array, cos: Array, sin: Array, config: ModelConfig) -> tuple[Array, Array, Array]:
    heads = project(normed, layer["qkv"])
    if config.qkv_bias:
        heads = heads + layer["qkv_bias"].astype(heads.dtype)
    turned, v = jnp.split(heads, [config.query_heads + config.kv_heads], axis=-2)
    if config.qk_norm:
        turned = rms_norm(turned, layer["qk_norm"], config.norm_eps)
    q, k = jnp.split(rotate(turned, cos, sin), [config.query_heads], axis=-2)
    return q, k, v


def fuse(layer: Layer, config: ModelConfig) -> Layer:
    """A block that computes queries, keys and values in one product, which saves calls when a CPU decodes few rows.

    The MLP's two products stay apart: fused, XLA would spread them over threads, which costs more.

    Args:
        layer: one block's parameters.
        config: the model.

    Returns:
        A block for `qkv`, `attention_out` and `mlp`.
    """
    fused = {name: layer[name] for name in ("attn_norm", "o", "mlp_norm", "gate", "up", "down")}
    fused["qkv"] = jnp.concatenate([layer["q"], layer["k"], layer["v"]], axis=1)
    if config.qkv_bias:
        fused["qkv_bias"] = jnp.concatenate([layer["q_bias"], layer["k_bias"], layer["v_bias"]])
    if config.qk_norm:
        counts = ("q_norm", config.query_heads), ("k_norm", config.kv_heads)
        fused["qk_norm"] = jnp.concatenate([jnp.tile(layer[name], (count, 1)) for name, count in counts])
    return fused


def attention_out(
    layer: Layer, x: Float[Array, "*dims D"], attended: Float[Array, "*dims H E"], config: ModelConfig
) -> Float[Array, "*dims D"]:
    """Adds the attention's output projection to the residual stream.

    Args:
        layer: one block's parameters.
        x: residual stream.
        attended: mixed values of every query head.
        config: the model.

    Returns:
        The new residual stream.
    """
    return x + product(layer, "o", attended, config, axes=2)


def mlp(layer: Layer, x: Float[Array, "*dims D"], config: ModelConfig) -> Float[Array, "*dims D"]:
    """Adds the block's gated MLP, including its norm, to the residual stream.

    Args:
        layer: one block's parameters.
        x: residual stream.
        config: the model.

    Returns:
        The new residual stream.

    Source: SwiGLU, arXiv:2002.05202.
    """
    normed = rms_norm(x, layer["mlp_norm"], config.norm_eps)
    hidden = jax.nn.silu(product(layer, "gate", normed, config)) * product(layer, "up", normed, config)
    return x + product(layer, "down", hidden, config)
