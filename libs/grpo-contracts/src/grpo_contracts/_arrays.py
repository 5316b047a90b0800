"""What counts as an array or an int, and how to read one on the host, without importing jax."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ._errors import broken


def is_array(value: Any) -> bool:
    """Whether a value is a numpy or a jax array (tracers included)."""
    # No other subclass: masked arrays and matrices compute differently, and an overridden method may raise anything.
    if isinstance(value, np.ndarray):
        return type(value) in (np.ndarray, np.memmap)
    jax = sys.modules.get("jax")  # a jax array can only exist where jax has been imported
    array = getattr(jax, "Array", None)
    return array is not None and isinstance(value, array)


def to_numpy(value: Any, stage: str, field: str) -> np.ndarray:
    """Read an array on the host.

    Args:
        value: anything numpy can read.
        stage, field: where it belongs, for errors.

    Returns:
        The numpy array, a view if possible.

    Raises:
        ContractError: this process cannot read it.
    """
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # tracers, deleted arrays, arrays of other processes
        reason = str(error).partition("\n")[0]
        hint = "Call this outside jit, on data that this process holds."
        raise broken(stage, field, "readable", "an array that numpy can read here", reason, hint=hint) from error


def check_int(value: object, name: str, least: int) -> None:
    """Raise a ContractError unless an argument is an int in [least, 2**31)."""
    if type(value) is not int or not least <= value < 2**31:
        came = value if type(value) is int else describe(value)
        raise broken("argument", name, "range", f"an int in [{least}, 2**31)", came)


def describe(value: object) -> str:
    """A value's type, or the value itself if it is short and safe to print."""
    if value is None or type(value) in (bool, float) or (type(value) is str and len(value) < 100):
        return repr(value)
    return f"a {type(value).__name__}"
