"""The errors that all libraries of the stack share."""

from __future__ import annotations

from collections.abc import Sequence


class GrpoError(Exception):
    """Root of all errors that the stack raises on purpose; each subclass also inherits the standard type it refines."""


class ContractError(GrpoError, ValueError):
    """A batch, sampling parameters or a file break the contract.

    Args:
        message: what must hold, what came, what to do.
        stage: the type that is wrong, for instance `"Rollout"`.
        field: its field, for instance `"logp_BT"`; None if all of it is wrong.
        rule: short name of the rule, as listed by `python -m grpo_contracts schema`.
        expected: what must hold.
        actual: what came.
        index: the first bad index in the field; None if the rule is about the whole field.
    """

    def __init__(
        self,
        message: str,
        *,
        stage: str | None = None,
        field: str | None = None,
        rule: str | None = None,
        expected: object = None,
        actual: object = None,
        index: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.field = field
        self.rule = rule
        self.expected = expected
        self.actual = actual
        self.index = index


def broken(
    stage: str,
    field: str | None,
    rule: str,
    expected: str,
    actual: object,
    *,
    index: Sequence[int] | None = None,
    hint: str = "",
    verb: str = "be",
) -> ContractError:
    """The ContractError for one broken rule, with a message composed of its parts.

    Args:
        stage, field, rule, expected, actual, index: as in ContractError.
        hint: what to do about it, in one sentence.
        verb: the verb between "must" and `expected`.

    Returns:
        The error, to be raised by the caller.
    """
    place = stage if field is None else f"{stage}.{field}"
    where = None if index is None else tuple(int(i) for i in index)
    if where:
        place += "[" + ", ".join(map(str, where)) + "]"
    message = f"{place} must {verb} {expected}: got {_short(actual)} (rule {rule!r})."
    if hint:
        message += f" {hint}"
    return ContractError(message, stage=stage, field=field, rule=rule, expected=expected, actual=actual, index=where)


def _short(value: object) -> str:
    # Python refuses to print integers of thousands of digits, and nobody reads a long text in an error message.
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer beyond 64 bits"
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."
