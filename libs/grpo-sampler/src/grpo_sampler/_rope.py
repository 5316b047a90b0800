"""Rotary positions: tables of cosines and sines, and the rotation."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_sampler._config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position, one for each pair of a head.

    Args:
        config: head size, base and scaling.

    Returns:
        float32 [E/2], in numpy: a constant of every program.

    Source: RoFormer (arXiv:2104.09864); Llama 3.1's piecewise stretching, `rope_type: llama3` of transformers.
    """
    exponent = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    plain = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    wavelength = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / scaling.factor + smooth * plain
    stretched = np.where(wavelength > scaling.original_max_positions / low, plain / scaling.factor, between)
    return np.where(wavelength < scaling.original_max_positions / high, plain, stretched).astype(np.float32)


def rope_tables(
    positions: Int[Array, "*dims"], config: ModelConfig
) -> tuple[Float[Array, "*dims half"], Float[Array, "*dims half"]]:
    """Cosines and sines of all angles at the given positions, in float32.

    Args:
        positions: absolute positions of tokens, any shape.
        config: head size, base and scaling.

    Returns:
        (cos, sin), each of the positions' shape with E/2 appended.
    """
    angle = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def rope_constants(
    end: int, config: ModelConfig
) -> tuple[Float[np.ndarray, "rows half"], Float[np.ndarray, "rows half"]]:
    """`rope_tables` of every position below `end`, as constants.

    A lookup is cheaper than computing angles, which XLA on CPUs repeats for every head.

    Args:
        end: positions in the tables.
        config: head size, base and scaling.

    Returns:
        (cos, sin), in numpy, rounded once from float64. After the last position comes a row of NaN, to which larger
        indices are clamped.
    """
    angle = np.arange(end, dtype=np.float32)[:, None] * inverse_frequencies(config)
    exact = np.pad(angle.astype(np.float64), ((0, 1), (0, 0)), constant_values=np.nan)
    return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)


def rotate(
    x: Float[Array, "*dims N E"], cos: Float[Array, "*dims half"], sin: Float[Array, "*dims half"]
) -> Float[Array, "*dims N E"]:
    """Rotates every head of x by its position; pairs consist of one element of each half of a head.

    Args:
        x: queries or keys, N heads of size E.
        cos: from `rope_tables`, at the positions of x.
        sin: likewise.

    Returns:
        The rotated heads, in x's type; computed in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
