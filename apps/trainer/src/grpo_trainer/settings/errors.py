"""What the app raises when a person must change something."""

from grpo_contracts import GrpoError

__all__ = ["ConfigError", "RunFolderError"]


class ConfigError(GrpoError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""


class RunFolderError(GrpoError, RuntimeError):
    """A run folder cannot be used: another run's settings, a live process, damaged or unwritable files."""
