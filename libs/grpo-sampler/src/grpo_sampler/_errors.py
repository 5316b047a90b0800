"""The errors of this library."""

from grpo_contracts import GrpoError


class SamplerError(GrpoError, ValueError):
    """An argument of the network or the sampler is invalid."""


class UnsupportedModelError(SamplerError):
    """A config.json needs an architecture that this library does not support."""


class WeightsError(SamplerError):
    """A checkpoint or parameter tree does not match its configuration."""
