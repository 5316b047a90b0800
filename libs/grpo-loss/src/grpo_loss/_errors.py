"""The library's one error class and the checks that raise it."""

import difflib
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from grpo_contracts import GrpoError


class LossError(GrpoError, ValueError):
    """An argument of grpo-loss breaks a stated rule; the message says which, what came and what to do."""


def check_choice(name: str, value: str, valid: Sequence[str], hints: dict[str, str] | None = None) -> None:
    """Raise unless `value` is one of `valid`, naming the nearest one.

    Args:
        name: the argument's name.
        value: what came.
        valid: the accepted strings.
        hints: advice for strings that are likely to be tried and are not accepted.

    Raises:
        LossError: `value` is not in `valid`.
    """
    if value in valid:
        return
    lower = str(value).lower().replace("_", "-")
    advice = (hints or {}).get(lower)
    if advice is None:
        nearest = difflib.get_close_matches(lower, valid, n=1, cutoff=0.0)[0]
        advice = f"Did you mean {name}={nearest!r}?"
    raise LossError(f"{name} must be one of {', '.join(map(repr, valid))}: got {value!r}. {advice}")


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], advice: str = "") -> None:
    """Raise unless `shape` equals `expected`.

    Raises:
        LossError: the shapes differ.
    """
    if tuple(shape) != tuple(expected):
        raise LossError(f"{name} must have shape {tuple(expected)}: got {tuple(shape)}. {advice}".rstrip())


def as_array(name: str, value: ArrayLike) -> jax.Array | np.ndarray:
    """An array of numbers from an array of jax or numpy, a number, or nested lists of them.

    Args:
        name: the argument's name.
        value: what came.

    Returns:
        The array itself if it is one, else a new one of numpy.

    Raises:
        LossError: it holds something else (text, None, complex numbers), or its rows differ in length.
    """
    try:
        array = value if isinstance(value, jax.Array | np.ndarray) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise LossError(f"{name} must be an array of numbers: got a {type(value).__name__}: {error}.") from error
    if not (
        array.dtype == np.bool_ or jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    ):
        raise LossError(f"{name} must hold real numbers: got {array.dtype}.")
    return array


def check_boolean(name: str, array: ArrayLike) -> None:
    """Raise unless a mask is boolean; a float mask would silently act as weights.

    Raises:
        LossError: it has another dtype.
    """
    dtype = as_array(name, array).dtype
    if dtype != np.bool_:
        raise LossError(f"{name} must be boolean: got {dtype}. Compare first (`mask > 0`).")


def check_integers(name: str, array: ArrayLike) -> None:
    """Raise unless an array holds integers.

    Raises:
        LossError: it has another dtype.
    """
    dtype = as_array(name, array).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise LossError(f"{name} must hold integers: got {dtype}.")


def check_number(name: str, value: object, least: float, most: float = math.inf) -> None:
    """Raise unless a plain number lies in [least, most]; a traced or an array's value is not looked at.

    Raises:
        LossError: it is no number, NaN, or out of range.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return
    if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not least <= value <= most:
        bounds = f"in [{least:g}, {most:g}]" if most < math.inf else f"of at least {least:g}"
        raise LossError(f"{name} must be a number {bounds}: got {value!r}.")


def check_called(name: str, value: object, makers: Sequence[Callable[..., object]], examples: str) -> None:
    """Raise unless `value` can be called and is not one of the functions that make such values.

    Args:
        name: the argument's name.
        value: what came.
        makers: functions whose result was meant, should one of them be passed itself.
        examples: what to pass.

    Raises:
        LossError: `value` is a string or the like, or one of `makers`.
    """
    for maker in makers:
        if value is maker:
            raise LossError(
                f"{name} must be what {maker.__name__}(...) returns: got the function itself. Call it: "
                f"{name}={maker.__name__}(...)."
            )
    if not callable(value):
        raise LossError(f"{name} must be a function such as {examples}: got {value!r}.")


def known(array: ArrayLike) -> np.ndarray | None:
    """The values of an array, or None where only the device will know them (inside `jit`, or on other hosts)."""
    if isinstance(array, Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)
