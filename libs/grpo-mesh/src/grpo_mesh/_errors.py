"""What this library raises. Every class is a `grpo_contracts.GrpoError` and the standard type a caller would guess."""

from __future__ import annotations

from grpo_contracts import GrpoError


class MeshError(GrpoError, ValueError):
    """A mesh, a sharding rule or an array that cannot be laid out as asked."""


class HostsError(GrpoError, RuntimeError):
    """A process that cannot be set up as asked, or processes of one job that cannot start together or disagree."""


class DeadlineError(GrpoError, TimeoutError):
    """A collective phase that not every process reached in time. `missing` holds the ranks that did not arrive."""

    def __init__(self, message: str, missing: tuple[int, ...] = ()):
        super().__init__(message)
        self.missing = missing


class RenderError(GrpoError, ValueError):
    """A launch configuration from which no manifest can be rendered."""
