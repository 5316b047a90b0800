"""Checks of arguments that several modules share."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from grpo_sampler._errors import SamplerError


def check_int(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """Returns an argument as an int.

    Args:
        name: of the argument.
        value: what came: an int, or an integer of numpy.
        least: smallest value allowed.
        most: largest value allowed.

    Raises:
        SamplerError: it is no integer, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise SamplerError(f"{name} must be an integer: got {brief(value)}.")
    if not least <= value <= most:
        bounds = f"at least {least}" if value < least else f"at most {most}"
        raise SamplerError(f"{name} must be {bounds}: got {brief(int(value))}.")
    return int(value)


def check_ids(tokens: Any, segment: Any, vocabulary: int) -> None:
    """Raises for a token outside the vocabulary, unless only the device will know (inside `jit`, or on other hosts).

    Args:
        tokens: token ids.
        segment: 0 is padding, which may hold anything.
        vocabulary: number of ids.

    Raises:
        SamplerError: there is one; it names the first.
    """
    for array in (tokens, segment):
        if isinstance(array, Tracer) or (isinstance(array, jax.Array) and not array.is_fully_addressable):
            return
    tokens = np.asarray(tokens)
    outside = np.argwhere(((tokens < 0) | (tokens >= vocabulary)) & (np.asarray(segment) > 0))
    if outside.size:
        raise SamplerError(
            f"tokens must be in [0, {vocabulary}), the vocabulary: got {tokens[tuple(outside[0])]} at "
            f"{outside[0].tolist()}. Padding has segment 0."
        )


def check_number(name: str, value: Any) -> float:
    """Returns a positive finite argument as a float.

    Args:
        name: of the argument.
        value: what came.

    Raises:
        SamplerError: it is no number, not finite, or not positive.
    """
    plain = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    # An integer beyond the floats is no usable number either.
    if not plain or not 0 < value < 1e300 or not math.isfinite(value):
        raise SamplerError(f"{name} must be a positive number: got {brief(value)}.")
    return float(value)


def check_floating(name: str, dtype: Any) -> jnp.dtype:
    """Returns an argument as a floating type.

    Args:
        name: of the argument.
        dtype: what came.

    Raises:
        SamplerError: it is no type, or not a floating one.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise SamplerError(f"{name} must be a floating type such as jnp.bfloat16: got {brief(dtype)}.") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise SamplerError(f"{name} must be a floating type: got {found.name}.")
    return found


def brief(value: Any) -> str:
    """A value as text that fits a message."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer beyond 64 bits"
    text = repr(value) if value is None or isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."
