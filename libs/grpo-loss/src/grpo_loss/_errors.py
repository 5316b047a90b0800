"""The library's one error class and the checks that raise it."""

import difflib
from collections.abc import Sequence

from grpo_contracts import GrpoError


class LossError(GrpoError, ValueError):
    """An argument of grpo-loss breaks a stated rule; the message says which, what came and what to do."""


def check_choice(name: str, value: str, valid: Sequence[str], hints: dict[str, str] | None = None) -> None:
    """Raise unless `value` is one of `valid`, naming the nearest one.

    Args:
        name: the argument's name.
        value: what came.
        valid: the accepted strings.
        hints: for names of the literature that are spelled as a combination of arguments here, what to write.

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


def check_unused(kind: str, used_by: str, **arguments: object) -> None:
    """Raise if an argument that `kind` would ignore was given.

    Raises:
        LossError: one of `arguments` is not None.
    """
    for name, value in arguments.items():
        if value is not None:
            raise LossError(f"{name} has no effect with {kind} (it belongs to {used_by}): got {value!r}. Leave it out.")
